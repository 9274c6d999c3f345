"""Activation sparsity from the recipe to the model that writes: what is read, when, and that nothing else changes."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import secateur
from secateur.core.histogram import FIRST
from secateur.errors import UsageError
from secateur.folder.reader import StoredTensors, weight_files
from secateur.gates.running import as_if_written, gates_of
from secateur.gates.section import parse_section

LEVELS = (0.25, 0.4, 0.5, 0.65)


@pytest.fixture(scope="module")
def gated(shared, model_of, text_file):
    """`gated("teal", "llama", …)`: a tiny model with gates; shared: not to be written to."""

    def make(method, family="llama", dtype=torch.float32, **options):
        calibration = secateur.Calibration(source=str(text_file), samples=8, seq_len=32)
        recipe = secateur.Recipe(activations=method, calibration=calibration, **options)
        name = f"gated-{method}-{family}-{dtype}-{sorted(options.items())}".replace("/", "")
        model = str(model_of(family, dtype=dtype))
        return shared(name, lambda folder: secateur.compress(model, folder / "out", recipe, verify=True)) / "out"

    return make


def section_of(folder):
    return parse_section(json.loads((folder / "config.json").read_text())["quantization_config"]["activations"])


def prompt_of(length=14, texts=1, seed=0):
    return torch.randint(2, 300, (texts, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids_BS, cache=None):
    with torch.no_grad():
        return model(input_ids=ids_BS, past_key_values=cache, use_cache=cache is not None).logits


def written(model, ids_BS, begin):
    """The logits behind each token from `begin` on, of which each is written by itself."""
    with torch.no_grad():
        out = model(input_ids=ids_BS[:, :begin], use_cache=True)
        found = []
        for i in range(begin, ids_BS.shape[1]):
            out = model(input_ids=ids_BS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def obvious(source, section, level):
    """The source with TEAL's equation as hooks on all tokens but the first, from the thresholds of a section."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()

    def zeroing(threshold):
        def hook(_, args):
            (x,) = args
            small = x.abs() <= threshold
            small[:, :FIRST] = False
            return (torch.where(small, torch.zeros_like(x), x),)

        return hook

    for each in section.inputs:
        for name in each.linears:
            threshold = each.thresholds_L[section.levels.index(level)]
            model.get_submodule(name).register_forward_pre_hook(zeroing(threshold))
    return model


# --- the whole way


def test_teal_writes_as_its_equation_says(gated, model_of):
    folder, section = gated("teal"), section_of(gated("teal"))
    assert section.levels == LEVELS
    assert section.level == 0.5
    model = secateur.load(folder)
    assert "columns" in json.dumps(model.config.quantization_config.to_dict()["modules"])
    ids = prompt_of(24)
    for level in LEVELS:
        secateur.activations(model, level)
        # A prompt of eight tokens is dense in both.
        expected = logits(obvious(model_of("llama"), section, level), ids)[:, FIRST:]
        assert torch.allclose(written(model, ids, FIRST), expected, atol=2e-4), level
    assert not torch.allclose(expected, logits(secateur.load(model_of("llama")), ids)[:, FIRST:], atol=2e-2)


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
def test_level_0_is_dense_and_so_are_prompts(gated, model_of, backend):
    model, dense = secateur.load(gated("teal"), backend), secateur.load(model_of("llama"))
    ids = prompt_of(20)
    assert torch.allclose(logits(model, ids), logits(dense, ids), atol=1e-5)
    assert not torch.allclose(written(model, ids, 9), written(dense, ids, 9), atol=1e-2)
    secateur.activations(model, 0)
    assert torch.allclose(written(model, ids, 9), written(dense, ids, 9), atol=1e-5)


def test_text_as_a_whole_as_if_written(gated):
    model, ids = secateur.load(gated("teal")), prompt_of(24, 2)
    alone = torch.cat([written(model, ids[i : i + 1], FIRST) for i in range(2)])
    with as_if_written(model):
        together = logits(model, ids)[:, FIRST:]
    assert torch.allclose(together, alone, atol=2e-4)
    assert logits(model, ids)[:, FIRST:].sub(together).abs().max() > 1e-2  # a prompt again


def test_all_backends_write_alike(gated):
    ids = prompt_of(20)
    found = [written(secateur.load(gated("teal"), backend), ids, 9) for backend in ("auto", "torch", "dense")]
    assert torch.allclose(found[0], found[1], atol=2e-4)
    assert torch.allclose(found[0], found[2], atol=2e-4)


def test_the_share_that_is_told_is_the_share_that_is_read(gated, monkeypatch):
    from secateur.kernels import module

    model, seen = secateur.load(gated("teal"), "torch"), []
    plain = module.linear

    def count(prepared, x, bias_O=None, kept=None):
        if kept is not None:
            seen.append((int(kept[:, FIRST:].sum()), kept[:, FIRST:].numel(), prepared.shape[0]))
        return plain(prepared, x, bias_O, kept)

    monkeypatch.setattr(module, "linear", count)
    with as_if_written(model):
        logits(model, prompt_of(40, 3))
        told = gates_of(model).share_read
    read, whole = sum(kept * O for kept, _, O in seen), sum(total * O for _, total, O in seen)
    assert len(seen) == 14  # every linear of two blocks
    assert told == read / whole
    assert 0.35 < told < 0.65


def test_what_several_texts_read_is_what_any_of_them_does(gated, monkeypatch):
    from secateur.kernels import module

    model, ids = secateur.load(gated("teal"), "torch"), prompt_of(12, 3)
    gates = gates_of(model)
    masks, plain = [], module.linear

    def note(prepared, x, bias_O=None, kept=None):
        masks.append((kept, prepared.shape))
        return plain(prepared, x, bias_O, kept)

    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        monkeypatch.setattr(module, "linear", note)
        gates.counting = True
        model(input_ids=ids[:, -1:], past_key_values=cache)
    union = [(int(kept.reshape(-1, I).any(0).sum()) * O, O * I) for kept, (O, I) in masks if kept is not None]
    assert gates.read / gates.whole == sum(r for r, _ in union) / sum(w for _, w in union)


def test_a_mask_is_made_once_for_each_input(gated, monkeypatch):
    from secateur.gates import running

    model, made = secateur.load(gated("teal")), []
    plain = running.scores
    monkeypatch.setattr(running, "scores", lambda *args: made.append(0) or plain(*args))
    ids = prompt_of(12)
    written(model, ids, 11)
    assert len(made) == 2 * 4  # q/k/v, o, gate/up and down of two blocks


# --- running


def test_batches_caches_and_generate(gated):
    model, ids = secateur.load(gated("teal")), prompt_of(12, 2)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    dynamic = model.generate(ids, **settings)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(dynamic, static)
    alone = torch.cat([model.generate(ids[i : i + 1], **settings) for i in range(2)])
    assert torch.equal(dynamic, alone)
    # Ten texts at a time read everything.
    many = ids[:1].repeat(10, 1)
    secateur.activations(model, 0)
    dense = model.generate(many, **settings)
    secateur.activations(model, 0.65)
    assert torch.equal(model.generate(many, **settings), dense)


def test_a_padded_text_writes_as_it_does_alone(gated):
    model, ids = secateur.load(gated("teal")), prompt_of(12)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    alone = model.generate(ids, **settings)[:, 12:]
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 17:], alone)


@pytest.mark.slow
def test_a_compiled_model_writes_the_same(gated):
    model, ids = secateur.load(gated("teal")), prompt_of(12)

    def step(model, cache):
        out = []
        with torch.no_grad():
            model(input_ids=ids[:, :-2], past_key_values=cache, cache_position=torch.arange(10))
            for i in (10, 11):
                got = model(input_ids=ids[:, i : i + 1], past_key_values=cache, cache_position=torch.tensor([i]))
                out.append(got.logits[:, -1])
        return torch.stack(out)

    expected = step(model, StaticCache(model.config, max_cache_len=32))
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=False)
    assert torch.allclose(step(compiled, StaticCache(model.config, max_cache_len=32)), expected, atol=1e-5)


def test_copies_have_gates_of_their_own(gated):
    model, ids = secateur.load(gated("teal")), prompt_of(20)
    before = written(model, ids, 9)
    twin = copy.deepcopy(model)
    secateur.activations(twin, 0)
    assert gates_of(model).level == 0.5
    assert torch.equal(written(model, ids, 9), before)
    assert not torch.equal(written(twin, ids, 9), before)


def test_training_reads_everything(gated):
    model, ids = secateur.load(gated("teal")), prompt_of(4)
    dense = logits(model, ids)
    model.get_input_embeddings().weight.requires_grad_(True)
    out = model(input_ids=ids)
    assert torch.allclose(out.logits, dense, atol=1e-5)
    out.logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["teal", "wina", "rsparse"])
def test_transformers_loads_and_saves_them(gated, tmp_path, method):
    folder, ids = gated(method), prompt_of(20)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = written(secateur.load(folder), ids, 9)
    assert torch.allclose(written(model, ids, 9), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again, first = (StoredTensors(weight_files(each)) for each in (tmp_path / "again", folder))
    assert sorted(again) == sorted(first)
    assert all(torch.equal(again[name], first[name]) for name in first if "activation_" in name)
    assert torch.allclose(written(secateur.load(tmp_path / "again"), ids, 9), expected, atol=1e-4)


def test_a_limit_on_memory_changes_nothing(gated):
    ids = prompt_of(14)
    streamed = secateur.load(gated("teal"), max_memory="64GiB")
    assert torch.allclose(written(streamed, ids, 9), written(secateur.load(gated("teal")), ids, 9), atol=1e-5)


# --- methods


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "falcon", "qwen3"])
def test_families(gated, model_of, family):
    model, dense = secateur.load(gated("teal", family)), secateur.load(model_of(family))
    ids = prompt_of(20)
    with as_if_written(model):
        sparse = logits(model, ids)
        share = gates_of(model).share_read
    full = logits(dense, ids)
    assert torch.allclose(sparse[:, :FIRST], full[:, :FIRST], atol=1e-4)
    assert sparse[:, FIRST:].sub(full[:, FIRST:]).abs().max() > 1e-3
    assert 0.2 < share < 0.65
    assert torch.allclose(written(model, ids, FIRST), sparse[:, FIRST:], atol=5e-4)


def test_wina_reads_as_many_inputs_for_every_token(gated):
    folder = gated("wina", activation_sparsity=0.4)
    model, ids = secateur.load(folder, "torch"), prompt_of(20)
    stored = StoredTensors(weight_files(folder))
    name = "model.layers.1.mlp.gate_proj"
    layer = model.get_submodule(name.rpartition(".")[0])
    norm_I = torch.cat([layer.gate_proj.dense(), layer.up_proj.dense()]).norm(dim=0)
    assert torch.allclose(stored[f"{name}.weight.activation_scale"], norm_I, rtol=1e-5)
    seen = []
    layer.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args))
    written(model, ids, 12)
    x, kept = seen[-1]
    assert int(kept.sum()) == round(0.6 * 32)
    score = x.abs() * norm_I
    assert score[kept].min() >= score[~kept].max()


def test_rsparse_has_a_low_rank_stand_for_the_rest(gated):
    folder = gated("rsparse", gating={"rank_share": 0.3})
    model, ids = secateur.load(folder, "torch"), prompt_of(16)
    down = model.model.layers[0].mlp.down_proj
    stored = StoredTensors(weight_files(folder))
    name = "model.layers.0.mlp.down_proj.weight"
    left_OR, right_RI = stored[f"{name}.activation_left"].float(), stored[f"{name}.activation_right"].float()
    rank = int(0.3 * 0.5 * 32 * 64 / 96)
    assert left_OR.shape == (32, rank)
    W_OI = down.dense()
    value = torch.linalg.svdvals(W_OI)
    assert (left_OR @ right_RI - W_OI).norm() == pytest.approx(value[rank:].norm().item(), rel=0.02)
    seen = []
    down.register_forward_pre_hook(lambda _, args: seen.append(args))
    down.register_forward_hook(lambda _, __, out: seen.append(out))
    written(model, ids, 15)
    (x, kept), out = seen[-2:]
    expected = (x * kept) @ W_OI.T + (x * ~kept) @ right_RI.T @ left_OR.T
    assert torch.allclose(out, expected, atol=1e-4)
    with as_if_written(model):
        logits(model, prompt_of(40, 4))
        assert gates_of(model).share_read == pytest.approx(0.5, abs=0.08)  # with what the rank reads


@pytest.mark.parametrize("rule", ["often", "norm"])
def test_coreinfer_keeps_the_neurons_of_the_prompt(gated, rule):
    model, ids = secateur.load(gated("coreinfer", gating={"neurons": rule}), "torch"), prompt_of(30)
    down = model.model.layers[0].mlp.down_proj
    assert {each.name.rpartition(".")[2] for each in gates_of(model).gates} == {"down_proj"}
    seen = []
    down.register_forward_pre_hook(lambda _, args: seen.append(args))
    written(model, ids, 20)
    (prompt,), *rest = seen
    size = prompt[0, FIRST:].abs()
    if rule == "often":
        largest = torch.zeros_like(size).scatter_(1, size.topk(round(0.4 * 64), 1).indices, 1.0).sum(0)
        least = largest.sort(descending=True).values[31]
        must, may = largest > least, largest >= least
    else:
        votes = (size / size.norm(dim=1, keepdim=True)).square().sum(0)
        must = may = votes >= votes.sort(descending=True).values[31]
    kept = rest[0][1][0, 0]
    assert int(kept.sum()) == 32
    assert bool((kept >= must).all())
    assert bool((kept <= may).all())
    assert all(torch.equal(args[1][0, 0], kept) for args in rest)
    # The next text has its own, and one without a prompt reads all.
    seen.clear()
    written(model, prompt_of(30, seed=1), 20)
    assert not torch.equal(seen[1][1][0, 0], kept)
    seen.clear()
    written(model, ids, 3)
    assert all(len(args) == 1 or bool(args[1].all()) for args in seen)


def test_zeros_of_a_relu_are_free(shared, model_of, text_file, tmp_path):
    calibration = secateur.Calibration(source=str(text_file), samples=4, seq_len=32)
    recipe = secateur.Recipe(activations="teal", activation_sparsity=0.25, calibration=calibration)
    report = secateur.compress(str(model_of("opt")), tmp_path / "out", recipe)
    assert any("zero as they are" in note for note in report.notes)
    fc2 = next(each for each in section_of(tmp_path / "out").inputs if each.linears[0].endswith("fc2"))
    assert fc2.thresholds_L[0] == 0  # a ReLU leaves more than a quarter
    model, seen = secateur.load(tmp_path / "out", "torch"), []
    model.model.decoder.layers[0].fc2.register_forward_pre_hook(lambda _, args: seen.append(args))
    written(model, prompt_of(14), 12)
    x, kept = seen[-1]
    assert torch.equal(kept, x != 0)


# --- together with quantization and pruning


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"quantize": "rtn", "quantization": {"bits": 4, "group_size": 16}}, "columns-int"),
        ({"quantize": "gptq", "quantization": {"bits": 4, "group_size": 16}}, "columns-int"),
        ({"prune": "magnitude", "sparsity": 0.5}, "columns-bitmap"),
        ({"prune": "wanda", "pattern": "2:4"}, "columns-bitmap"),
    ],
)
def test_packed_weights_have_gates_too(gated, model_of, tmp_path, text_file, options, layout):
    folder = gated("teal", **options)
    manifest = json.loads((folder / "secateur.json").read_text())
    assert {each["layout"] for each in manifest["linears"].values()} == {layout}
    calibration = secateur.Calibration(source=str(text_file), samples=8, seq_len=32)
    secateur.compress(str(model_of("llama")), tmp_path / "out", secateur.Recipe(calibration=calibration, **options))
    model, plain, ids = secateur.load(folder), secateur.load(tmp_path / "out"), prompt_of(20)
    secateur.activations(model, 0)
    assert torch.allclose(written(model, ids, 9), written(plain, ids, 9), atol=1e-4)
    secateur.activations(model, 0.5)
    assert torch.allclose(written(model, ids, 9), written(secateur.load(folder, "dense"), ids, 9), atol=2e-4)


def test_the_manifest_repeats_the_run(gated, model_of, tmp_path):
    folder = gated("rsparse")
    secateur.compress(str(model_of("llama")), tmp_path / "out", folder / "secateur.json")
    for file in weight_files(folder):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert section_of(folder) == section_of(tmp_path / "out")
    assert secateur.Recipe.read(folder / "secateur.json").activation_sparsity == 0.5


def test_what_is_made_of_such_a_folder_has_no_gates(gated, tmp_path):
    folder = gated("rsparse")
    secateur.export(str(folder), tmp_path / "dense", "dense")
    assert not any("activation" in name for name in StoredTensors(weight_files(tmp_path / "dense")))
    secateur.compress(str(folder), tmp_path / "rtn", {"quantize": "rtn"})
    assert not any("activation" in name for name in StoredTensors(weight_files(tmp_path / "rtn")))
    assert gates_of(secateur.load(tmp_path / "rtn")) is None


# --- what is refused


def test_levels_that_were_not_calibrated(gated, model_of):
    model = secateur.load(gated("teal"))
    with pytest.raises(UsageError, match=r"level 0.45 was not calibrated: it can be 0.25, 0.4, 0.5, 0.65, or 0"):
        secateur.activations(model, 0.45)
    for level in (-0.1, 0.96, 2, True, "0.5", float("nan")):
        with pytest.raises(UsageError, match="not possible"):
            secateur.activations(model, level)
    assert gates_of(model).level == 0.5
    with pytest.raises(UsageError, match="no thresholds"):
        secateur.activations(secateur.load(model_of("llama")), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_sparsity": 0.96}, "from 0 to 95%"),
        ({"activation_sparsity": -0.1}, "from 0 to 95%"),
        ({"quantize": "spqr"}, "`quantize` spqr does not go with"),
        ({"quantize": "trellis"}, "`quantize` trellis does not go with"),
        ({"quantize": "squeezellm"}, "`quantize` squeezellm does not go with"),
        ({"quantize": "gptq", "quantization": {"order": "permuted"}}, "`quantize` gptq does not go with.*order"),
        ({"prune": "wanda", "sparsity": 0.5, "quantize": "rtn"}, "does not go with.*sparse-int"),
        ({"prune": "flap", "sparsity": 0.5, "pattern": "structured"}, "structured"),
        ({"target_size": "50%"}, "search for a size"),
        ({"format": "dense"}, "`format` dense"),
        ({"calibration": secateur.Calibration(seq_len=8)}, "`seq_len` 8"),
        ({"activations": "coreinfer", "allocation": "search"}, "by a prompt"),
        ({"activations": "tael"}, "did you mean 'teal'"),
        ({"activations": None, "activation_sparsity": 0.5}, "`activations` is missing"),
        ({"gating": {"rank_share": 0.1}}, "not an option of teal"),
    ],
)
def test_recipes_that_make_no_sense(model_of, tmp_path, options, message):
    recipe = secateur.Recipe(**{"activations": "teal", **options})
    with pytest.raises(UsageError, match=message):
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
