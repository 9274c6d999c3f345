"""Models that memory does not hold: logits equal to the bit, every byte read once a pass, and faults that are told."""

import os
import shutil
from pathlib import Path

import mixtures
import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.folder.extents import OpenFiles, find_extents
from secateur.model import streaming
from secateur.model.load import load_within
from secateur.model.source import open_source
from secateur.model.stream_room import Sizes

WAYS = {
    "dense": None,
    "bitmap": {"prune": "magnitude", "sparsity": 0.5},
    "nm": {"prune": "magnitude", "sparsity": None, "pattern": "2:4"},
    "packed-int": {"quantize": "rtn"},
    "sparse-int": {"prune": "magnitude", "sparsity": 0.5, "quantize": "rtn"},
    "spqr": {"quantize": "spqr"},
}


@pytest.fixture
def ids():
    return torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def streamed(monkeypatch):
    """Loads a model of which so many bytes of blocks stay in memory."""

    def load(folder, resident=0, **options):
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "room_here", lambda *_: resident)
            return secateur.load(folder, max_memory="1GiB", **options)

    return load


@pytest.fixture
def made(model_of, text_file, tmp_path):
    """A model of a family, compressed one way."""

    def make(family, way, **options):
        model = model_of(family, **options)
        if WAYS[way] is None:
            return str(model)
        calibration = secateur.Calibration(str(text_file), 4, 16)
        secateur.compress(str(model), tmp_path / way, secateur.Recipe(**WAYS[way], calibration=calibration))
        return str(tmp_path / way)

    return make


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.thin(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
def test_every_layout_gives_the_same_logits(way, backend, made, streamed, ids):
    folder = made("llama", way, num_hidden_layers=3)
    if backend == "dense" and way != "dense":
        with pytest.raises(UsageError, match="does not lie in the files"):
            streamed(folder, backend=backend)
        return
    options = {} if way == "dense" else {"backend": backend}
    model, whole = streamed(folder, **options), secateur.load(folder, **options)
    wanted = logits(whole, ids)
    for _ in range(3):
        assert torch.equal(logits(model, ids), wanted)
    with torch.no_grad():
        texts = [each.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0) for each in (model, whole)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "qwen3", "phi3"])
def test_families(family, made, streamed, ids):
    folder = made(family, "packed-int")
    assert torch.equal(logits(streamed(folder), ids), logits(secateur.load(folder), ids))


def test_what_is_not_computed_on_as_it_lies_in_the_files(made, streamed):
    """Linears of a class of their own are unpacked."""
    with pytest.raises(UsageError, match=r"query_key_value\.weight does not lie in the files"):
        streamed(made("falcon", "packed-int"))


@pytest.mark.parametrize("name", mixtures.known(["qwen2_moe", "deepseek_v3"]))
def test_mixtures(name, build, streamed, ids, tmp_path):
    source = build(tmp_path / "source", mixtures.config_of(name))
    secateur.compress(str(source), tmp_path / "out", secateur.Recipe(quantize="rtn"))
    model, whole = streamed(tmp_path / "out"), secateur.load(tmp_path / "out")
    # BLAS may round by where a weight lies, as that of a shared expert's gate, which is dense.
    torch.testing.assert_close(logits(model, ids), logits(whole, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["dense", "bitmap", "nm"])
def test_a_pass_reads_every_byte_of_the_blocks_once(way, made, streamed, ids):
    folder = made("llama", way, num_hidden_layers=4)
    model = streamed(folder)
    [file] = [file for file in os.listdir(folder) if file.endswith(".safetensors")]
    extents = find_extents(Path(folder) / file)
    blocks = sum(extent.size for name, extent in extents.items() if ".layers." in name)
    spare = sum(extent.size for name, extent in extents.items() if name.endswith(".shape"))
    logits(model, ids)
    first = model.streamer.bytes_read
    logits(model, ids)
    assert model.streamer.bytes_read - first == first == blocks - spare


def test_what_fits_stays_in_memory(made, streamed, ids):
    folder = made("llama", "bitmap", num_hidden_layers=4)
    wanted, read = logits(secateur.load(folder), ids), []
    for resident in (0, 40_000, 10**9):
        model = streamed(folder, resident)
        assert torch.equal(logits(model, ids), wanted)
        read.append(model.streamer.bytes_read if hasattr(model, "streamer") else 0)
    assert read[0] > read[1] > read[2] == 0


def test_two_models_at_once(made, streamed, ids):
    folder = made("llama", "packed-int", num_hidden_layers=3)
    wanted = logits(secateur.load(folder), ids)
    models = [streamed(folder) for _ in range(2)]
    for _ in range(2):
        for model in models:
            assert torch.equal(logits(model, ids), wanted)


def test_a_pass_that_was_broken_off(made, streamed, ids):
    folder = made("llama", "packed-int", num_hidden_layers=3)
    model = streamed(folder)
    wanted = logits(model, ids)

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids)
    hook.remove()
    assert torch.equal(logits(model, ids), wanted)


def test_files_that_change(made, streamed, ids):
    folder = made("llama", "packed-int", num_hidden_layers=3)
    model = streamed(folder)
    logits(model, ids)
    [file] = Path(folder).glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        [logits(model, each) for each in (ids, ids)]


def test_reads_that_fail(made, streamed, ids, monkeypatch):
    model = streamed(made("llama", "packed-int", num_hidden_layers=3))
    logits(model, ids)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    message = r"safetensors cannot be read at tensor 'model.*Input/output error"
    with pytest.raises(CheckpointError, match=message):
        [logits(model, each) for each in (ids, ids)]


def test_short_reads_are_completed(made, monkeypatch, tmp_path):
    folder = Path(made("llama", "dense"))
    [file] = folder.glob("*.safetensors")
    extents = sorted(find_extents(file).values(), key=lambda extent: extent.start)[:5]
    wanted = [bytearray(extent.size) for extent in extents]
    OpenFiles([file]).read([(e, memoryview(b)) for e, b in zip(extents, wanted, strict=True)])
    content = file.read_bytes()
    assert [bytes(b) for b in wanted] == [content[e.start : e.start + e.size] for e in extents]
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:3]], at))
    again = [bytearray(extent.size) for extent in extents]
    OpenFiles([file]).read([(e, memoryview(b)) for e, b in zip(extents, again, strict=True)])
    assert again == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:4], "no safetensors file"),
        (lambda content: (10**9).to_bytes(8, "little") + content[8:], "header is longer"),
        (lambda content: content[:-100], "beyond its end"),
        (lambda content: content[:8] + b"[" + content[9:], "no safetensors file"),
        (lambda content: content.replace(b'"shape":[', b'"shape":[-', 1), "is said to be"),
        (lambda content: content.replace(b'"shape":[', b'"shape":[.', 1), "no safetensors file"),
    ],
)
def test_files_that_are_none(change, message, model_of, tmp_path):
    [file] = model_of("llama").glob("*.safetensors")
    other = tmp_path / "bad.safetensors"
    other.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        find_extents(other)


def test_what_cannot_be_done(made, model_of, streamed, ids, tmp_path, monkeypatch):
    folder = made("llama", "packed-int", num_hidden_layers=3)
    with pytest.raises(UsageError, match=r"`max_memory` 10\.5 MB is too little for .*, which needs .* at least"):
        secateur.load(folder, max_memory="10MiB")
    with pytest.raises(UsageError, match="offload_folder is for a device_map"):
        secateur.load(folder, offload_folder=tmp_path)
    with pytest.raises(UsageError, match=r"names several devices \(cuda:0, cuda:1\)"):
        secateur.load(folder, max_memory={"cuda:0": "4GiB", "cuda:1": "4GiB"})
    with pytest.raises(UsageError, match="`max_memory` 0 B is too little"):
        secateur.load(folder, max_memory=0)
    with pytest.raises(UsageError, match=r"`max_memory` .lots. is not a size"):
        secateur.load(folder, max_memory={"cpu": "lots"})
    with pytest.raises(UsageError, match="says what each device may hold"):
        secateur.load(folder, device_map="auto", max_memory="4GiB")
    with pytest.raises(UsageError, match="leave `dtype` out"):
        streamed(str(model_of("llama")), dtype=torch.bfloat16)
    model = streamed(folder)
    with pytest.raises(UsageError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(streaming, "room_here", lambda *_: 0)
    model = load_within(open_source(folder), torch.float32, torch.device("cpu"), 0, "auto", 10)
    with torch.no_grad(), pytest.raises(UsageError, match="keys and values of 10 tokens"):
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)


def test_generate_on_the_command_line(made, says, monkeypatch):
    folder = made("llama", "packed-int", num_hidden_layers=3)
    wanted = says("generate", folder, "hello there", "--max-new-tokens", 5)
    code, _, err = says("generate", folder, "hello there", "--max-memory", "10MiB")
    assert code == 2
    assert "--max-memory 10.5 MB is too little" in err
    monkeypatch.setattr(streaming, "room_here", lambda *_: 0)
    assert says("generate", folder, "hello there", "--max-new-tokens", 5, "--max-memory", "1GiB") == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_there_is_no_room_for(family, made, monkeypatch, ids):
    """It is read in parts, as blocks are; where the table of embeddings is the same, its rows are read, too."""
    folder = made(family, "dense")
    whole = secateur.load(folder)
    head = whole.get_output_embeddings().weight.nbytes
    monkeypatch.setattr(streaming, "room_here", lambda *_: -head)
    sizes = Sizes(block=head // 3, part=0, loading=0, kept=0, head=head)
    monkeypatch.setattr(streaming.Sizes, "of", lambda *_: sizes)
    model = secateur.load(folder, max_memory="1GiB")
    assert len(model.get_output_embeddings().slices) >= 3
    for _ in range(2):
        assert torch.equal(logits(model, ids), logits(whole, ids))
    with torch.no_grad():
        texts = [each.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for each in (model, whole)]
    assert torch.equal(*texts)


def test_one_size_and_the_same_by_device(made, ids):
    folder = made("llama", "packed-int")
    wanted = logits(secateur.load(folder), ids)
    for limit in ("16GiB", {"cpu": "16GiB"}, {"cpu": 2**34}, {"cpu": None}, {}):
        assert torch.equal(logits(secateur.load(folder, max_memory=limit), ids), wanted)


# By default each way once.
_NO_ROOM = [*(("llama", way) for way in WAYS if way not in ("nm", "spqr")), ("phi3", "nm"), ("gpt2", "spqr")]


@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(family, way, marks=[pytest.mark.slow] * ((family, way) not in _NO_ROOM))
        for family in ("llama", "gpt2", "phi3")
        for way in WAYS
    ],
)
def test_blocks_that_there_is_no_room_for_two_of(family, way, made, monkeypatch, ids):
    """Each of their linears is read when it runs."""
    folder = made(family, way)
    whole = secateur.load(folder)
    monkeypatch.setattr(streaming, "room_here", lambda *_: -(10**9))
    model = secateur.load(folder, max_memory="1GiB")
    assert len(model.streamer.blocks) > 8
    for _ in range(2):
        assert torch.equal(logits(model, ids), logits(whole, ids))
    with pytest.raises(UsageError, match="keys and values of 2048 tokens"), torch.no_grad():
        model(ids.repeat(200, 1), past_key_values=model(ids.repeat(200, 1)).past_key_values)


def test_a_head_with_values_that_are_not_finite(model_of, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(model_of("llama"), folder)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"][3, 4] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(streaming, "_CHECKED", 128)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN or infinity"):
        secateur.load(folder, max_memory="16GiB")
