"""Bringing blocks: what overlaps, what waits for what, and that nothing is left running."""

import gc
import os
import threading
import time
from collections import defaultdict

import pytest
import torch
from fake_link import FakeLink

import secateur
from secateur.errors import UsageError
from secateur.folder.extents import OpenFiles, find_extents
from secateur.model import streaming
from secateur.model.source import open_source
from secateur.model.stream_room import Limits
from secateur.model.streaming import load_streamed
from secateur.offload import streamer
from secateur.offload.streamer import StreamedBlock

WAYS = {
    "dense": None,
    "bitmap": {"prune": "magnitude", "sparsity": 0.5},
    "packed-int": {"quantize": "rtn"},
    "sparse-int": {"prune": "magnitude", "sparsity": 0.5, "quantize": "rtn"},
}
BLOCKS = 5


@pytest.fixture
def ids():
    return torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(model_of, text_file, tmp_path):
    """A model of five blocks, compressed one way."""

    def make(way):
        model = str(model_of("llama", num_hidden_layers=BLOCKS))
        if WAYS[way] is None:
            return model
        calibration = secateur.Calibration(str(text_file), 4, 16)
        secateur.compress(model, tmp_path / way, secateur.Recipe(**WAYS[way], calibration=calibration))
        return str(tmp_path / way)

    return make


@pytest.fixture
def brought(monkeypatch):
    """Loads a model of which so many bytes of blocks stay on the device, and so many in the host's memory."""

    def load(folder, link=None, there=0, here=0, **options):
        source = open_source(folder)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "room_here", lambda *_: here)
            patch.setattr(streaming, "room_there", lambda *_: there)
            return load_streamed(source, source.dtype, Limits(2**40, 2**40, link), "auto", **options)

    return load


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.thin(2)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_copies_to_a_device_give_the_same_logits(way, late, made, brought, ids):
    folder = made(way)
    link = FakeLink(late)
    model = brought(folder, link)
    wanted = logits(secateur.load(folder, "torch" if way == "sparse-int" else None), ids)
    for _ in range(3):
        torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=0)
    with torch.no_grad():
        written = model.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        whole = secateur.load(folder).generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(written, whole)
    assert model.streamer.bytes_copied >= model.streamer.bytes_read > 0


def test_a_buffer_is_filled_only_after_what_was_computed_in_it(made, brought, ids):
    link = FakeLink(late=True)
    model = brought(made("packed-int"), link)
    for _ in range(2):
        logits(model, ids)
    numbers = [number for number, _ in link.copies]
    assert numbers == [i % 2 for i in range(len(numbers))], "one buffer, then the other"
    # The copy of a turn waits for what was computed two turns before, in the same buffer.
    assert [after for _, after in link.copies] == [None, None, *range(1, len(numbers) - 1)]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("there", "here"), [(0, 10**9), (60_000, 0), (60_000, 10**9), (10**9, 0)])
def test_what_fits_stays_on_the_device_or_in_the_host_s_memory(there, here, made, brought, ids):
    folder = made("bitmap")
    model = brought(folder, FakeLink(late=True), there, here)
    for _ in range(2):
        assert torch.equal(logits(model, ids), logits(secateur.load(folder), ids))
    if there == 10**9:
        assert not hasattr(model, "streamer")
        return
    count = len(model.streamer.blocks)
    assert count == BLOCKS if there == 0 else 0 < count < BLOCKS
    assert (model.streamer.bytes_read == 0) == (here > 0)
    assert model.streamer.bytes_copied > 0


def test_a_broken_off_pass_leaves_a_device_in_order(made, brought, ids):
    model = brought(made("packed-int"), FakeLink(late=True))
    wanted = logits(model, ids)
    for number in (0, 1, BLOCKS - 1):

        def stop(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[number].mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids)
        hook.remove()
        assert torch.equal(logits(model, ids), wanted)


def test_a_block_is_read_while_the_one_before_computes(made, brought, ids, monkeypatch):
    """Each waits for the other to have begun: were they one after the other, they would wait in vain."""
    model = brought(made("packed-int"))
    reading, computing = defaultdict(threading.Event), defaultdict(threading.Event)
    whole, seen = StreamedBlock.read, []

    def read(self, files, buffer):
        turn = len(seen)
        seen.append(next(i for i, each in enumerate(model.streamer.blocks) if each is self))
        reading[turn].set()
        assert turn == 0 or computing[turn - 1].wait(20)
        return whole(self, files, buffer)

    monkeypatch.setattr(StreamedBlock, "read", read)
    turns = iter(range(100))

    def begin(*_):
        turn = next(turns)
        computing[turn].set()
        assert reading[turn + 1].wait(20)

    for block in model.model.layers:
        block.register_forward_pre_hook(begin)
    for _ in range(2):
        logits(model, ids)
    assert seen[: 2 * BLOCKS] == 2 * list(range(BLOCKS))


def test_a_slow_disk(made, brought, ids, monkeypatch):
    """Whatever comes late is waited for."""
    folder = made("bitmap")
    whole = os.preadv

    def slow(*args):
        time.sleep(0.002)
        return whole(*args)

    monkeypatch.setattr(os, "preadv", slow)
    for link in (None, FakeLink(late=True)):
        assert torch.equal(logits(brought(folder, link), ids), logits(secateur.load(folder), ids))


def test_a_network_disk(made, brought, ids, monkeypatch):
    """It may not take advice, and systems need not have calls that others have."""
    folder = made("bitmap")
    wanted = logits(secateur.load(folder), ids)

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert torch.equal(logits(brought(folder), ids), wanted)
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "preadv")
    assert torch.equal(logits(brought(folder), ids), wanted)


def test_a_file_that_is_gone(made, tmp_path, monkeypatch):
    """As a network disk says of one that was replaced: also where it is only asked how large it is."""
    [file] = [each for each in map(tmp_path.joinpath, [made("bitmap")]) for each in each.glob("*.safetensors")]
    extent = next(iter(find_extents(file).values()))
    opened = OpenFiles([file])

    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(OpenFiles, "_look", stale)
    with pytest.raises(secateur.CheckpointError, match=rf"cannot be read at tensor '{extent.name}': Stale file handle"):
        opened.read([(extent, memoryview(bytearray(extent.size)))])


@pytest.mark.parametrize("link", [None, FakeLink(late=True)], ids=["cpu", "device"])
def test_the_thread_ends_with_the_model(link, made, brought, ids):
    """Also where Ctrl-C came."""

    before = set(threading.enumerate())
    model = brought(made("packed-int"), link)
    logits(model, ids)
    [thread] = [each for each in set(threading.enumerate()) - before if each.name.startswith("secateur-stream")]

    def stop(*_):
        raise KeyboardInterrupt

    model.model.layers[2].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids)
    del model
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_what_streamed_models_cannot_do(made, brought, ids):
    """Gradients would be those of other weights, and copies read into the same buffers."""
    import copy
    import pickle

    model = brought(made("packed-int"))
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="can be neither copied nor pickled"):
            act(model)
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    with pytest.raises(UsageError, match="when gradients are wanted"):
        model(inputs_embeds=embeds)
    linear = model.model.layers[1].mlp.up_proj
    with pytest.raises(UsageError, match="when gradients are wanted"):
        linear(torch.zeros(1, linear.in_features, requires_grad=True))
    with pytest.raises(UsageError, match="stays where it is"):
        linear._apply(lambda tensor: _Elsewhere())


class _Elsewhere:
    device = torch.device("cuda")


def test_a_weight_that_is_away_can_be_asked_for(made, brought):
    folder = made("packed-int")
    model, whole = brought(folder), secateur.load(folder)
    for name in ("up_proj", "down_proj"):
        mine, other = (getattr(each.model.layers[3].mlp, name) for each in (model, whole))
        assert mine.away
        assert mine.nbytes == other.nbytes
        assert torch.equal(mine.dense(), other.dense())
        assert torch.equal(mine.weight @ torch.ones(mine.in_features), other.weight @ torch.ones(mine.in_features))
        assert all(torch.equal(mine.parts()[part], tensor) for part, tensor in other.parts().items())


@pytest.mark.parametrize("free", [0, 2**40])
def test_what_the_system_has_memory_for_it_may_keep(free, made, brought, ids, monkeypatch):
    """A cycle longer than its cache would find nothing there, and push out what others have."""
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advice.append(args[3]))
    monkeypatch.setattr(streamer, "free_memory", lambda: free)
    model = brought(made("packed-int"))
    model.set_input_embeddings(torch.nn.Embedding(320, 32))  # whose rows are none of it
    advice.clear()
    logits(model, ids)
    assert bool(advice) == (not free)
    assert set(advice) <= {os.POSIX_FADV_DONTNEED}
