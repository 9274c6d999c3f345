"""The walk through the blocks, against a slow and obvious one; and what it promises: order, determinism, clear failures.

O: output features, I: input features, T: tokens, N: windows, S: tokens of a window.
"""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import EVERY_KIND, FAMILIES, VOCABULARY
from methods import dsnot
from methods import prune as prune_by
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.calibration import kept_windows as calibrate
from secateur.calibration.kept_windows import cache_folder, calibration_ids
from secateur.calibration.text import read_text
from secateur.calibration.tokens import Named, windows
from secateur.checkpoint.export import export
from secateur.core.patterns import parse_pattern
from secateur.core.stats import InputStats, Level
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.folder.manifest import sha256_of
from secateur.model import source as source_module
from secateur.model.block_names import generalise
from secateur.model.source import open_source
from secateur.model.structure import weight_matrix
from secateur.pipeline import calibrate as windows_module
from secateur.unfinished.hidden import HiddenStates
from secateur.walking import walker

pytestmark = pytest.mark.usefixtures("dense_backend")

SAMPLES, SEQ_LEN = 12, 24


def recipe(text, **options):
    calibration = secateur.Calibration(source=str(text), samples=SAMPLES, seq_len=SEQ_LEN)
    return secateur.Recipe(**{"prune": "wanda", "sparsity": 0.5, "calibration": calibration, **options})


def compress(source, out, wanted, **options):
    """Compress to a dense folder; its tensors and the report."""
    report = secateur.compress(str(source), out, replace(wanted, format="dense"), **options)
    return load_file(out / "model.safetensors"), report


@torch.no_grad()
def reference(source, wanted, groups, prefix, dtype=torch.float32):
    """The walk as anyone would first write it: for each group of linears, run the whole model as it is by then.

    Wanda alone, by N:M, has each block looked at before any of it changes.

    Returns:
        The weights `[O, I]` of every linear, and the relative squared error of its output.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    documents = read_text(wanted.calibration.source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    seed, bos = wanted.calibration.seed, wanted.calibration.bos
    ids_NS = windows(documents, tokenizer, SEQ_LEN, SAMPLES, seed=seed, bos=bos, named=Named("it"))
    pattern = parse_pattern(wanted.pattern, wanted.sparsity)
    weights, errors = {}, {}
    looks_first = wanted.prune == "wanda" and wanted.pattern is not None and wanted.refine is None

    def read_by(name):
        inputs = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(input_ids=ids_NS, use_cache=False)
        handle.remove()
        return inputs[0].reshape(-1, inputs[0].shape[-1])

    for block in range(model.config.num_hidden_layers):
        seen = [read_by(f"{prefix}.{block}.{group[0]}") if looks_first else None for group in groups]
        for group, before_TI in zip(groups, seen, strict=True):
            names = [f"{prefix}.{block}.{part}" for part in group]
            linears = [model.get_submodule(name) for name in names]
            x_TI = before_TI if looks_first else read_by(names[0])
            stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
            stats.add(x_TI)
            for name, linear in zip(names, linears, strict=True):
                # Each by itself, where the walk solves them stacked.
                W_OI = weight_matrix(linear).clone()
                pruned = prune_by(wanted.prune, W_OI, stats, pattern)
                new_OI = pruned.W_OI
                if wanted.refine:
                    new_OI = W_OI * dsnot(W_OI, pruned.keep_OI, stats, pattern)
                weights[name] = new_OI.to(dtype)
                y_TO = x_TI @ W_OI.T
                errors[name] = ((x_TI @ weights[name].float().T - y_TO).square().sum() / y_TO.square().sum()).item()
                weight_matrix(linear).copy_(weights[name])
    return weights, errors


def assert_like(found, expected, transposed):
    """Masks that differ in one weight of a thousand at most, and weights that differ as little, all linears together.

    Sums in another order may turn a close decision, and what comes later with it.
    """
    pairs = []
    for name, expected_OI in expected.items():
        found_OI = found[f"{name}.weight"].T if transposed else found[f"{name}.weight"]
        assert found_OI.dtype == expected_OI.dtype
        assert found_OI.shape == expected_OI.shape
        pairs.append((found_OI.flatten().float(), expected_OI.flatten().float()))
    all_found, all_expected = map(torch.cat, zip(*pairs, strict=True))
    assert ((all_found == 0) == (all_expected == 0)).float().mean() >= 0.999
    assert torch.linalg.norm(all_found - all_expected) < 0.03 * torch.linalg.norm(all_expected)


# --- what is computed


# By default SparseGPT is tried with one of each kind, and Wanda, whose walk keeps less, with some ways to order linears.
_SELDOM = FAMILIES.keys() - {"cohere", "gpt2", "falcon"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*each.values, {"prune": "sparsegpt"}, id=f"{each.values[0]}-sparsegpt", marks=each.marks)
        for each in EVERY_KIND
    ]
    + [
        pytest.param(
            name,
            {"prune": "wanda", "sparsity": None, "pattern": "2:4"},
            id=f"{name}-wanda 2:4",
            marks=[pytest.mark.slow] * (name in _SELDOM),
        )
        for name in FAMILIES
    ],
)
def test_the_walk_does_what_the_obvious_one_does(name, options, model_of, text_file, tmp_path):
    source, family = model_of(name), FAMILIES[name]
    wanted = recipe(text_file, **options)
    expected, errors = reference(source, wanted, family.groups, family.prefix)
    found, report = compress(source, tmp_path / "out", wanted, batch_tokens=3 * SEQ_LEN)
    assert_like(found, expected, transposed=name == "gpt2")
    assert len(report.linears) == len(expected)
    if wanted.prune == "sparsegpt":
        assert {linear.error_kind for linear in report.linears} == {"output"}
        for linear in report.linears:
            assert linear.error == pytest.approx(errors[linear.name], rel=0.02), linear.name


@pytest.mark.thin(2)
@pytest.mark.parametrize("share", [{"sparsity": 0.6}, {"sparsity": None, "pattern": "2:4"}], ids=["0.6", "2:4"])
@pytest.mark.parametrize("prune", ["magnitude", "wanda", "sparsegpt"])
def test_a_refined_mask_is_that_of_the_obvious_walk(prune, share, model_of, text_file, tmp_path):
    source, family = model_of("llama"), FAMILIES["llama"]
    wanted = recipe(text_file, **{"sparsity": None, "prune": prune, "refine": "dsnot", **share})
    expected, _ = reference(source, wanted, family.groups, family.prefix)
    found, report = compress(source, tmp_path / "out", wanted)
    assert_like(found, expected, transposed=False)
    assert report.calibration["level"] == ("gram" if prune == "sparsegpt" else "moments")
    plain, _ = compress(source, tmp_path / "plain", replace(wanted, refine=None))
    dense = load_file(source / "model.safetensors")
    changed = 0
    for name in expected:
        key = f"{name}.weight"
        keep, before = found[key] != 0, plain[key] != 0
        changed += int((keep != before).sum())
        assert torch.equal(found[key], dense[key] * keep)
        if wanted.pattern:
            assert (keep.view(-1, 4).sum(1) == 2).all()
    assert changed > 0


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("name", "prune"), [("llama", "wanda"), ("gpt2", "sparsegpt"), ("falcon", "wanda"), ("gemma3", "sparsegpt")]
)
def test_the_batch_size_does_not_matter(name, prune, model_of, text_file, tmp_path):
    source, wanted = model_of(name), recipe(text_file, prune=prune)
    sizes = []
    runs = []
    for tokens in (1, 3 * SEQ_LEN, 5 * SEQ_LEN + 1, 10**6):
        found, report = compress(source, tmp_path / f"{tokens}", wanted, batch_tokens=tokens)
        runs.append({linear.name: found[f"{linear.name}.weight"] for linear in report.linears})
        sizes.append(report.calibration["tokens"])
    assert set(sizes) == {SAMPLES * SEQ_LEN}
    for run in runs[1:]:
        assert_like({f"{name}.weight": W for name, W in run.items()}, runs[0], transposed=False)


def test_statistics_of_the_recipes_level_are_gathered_and_no_more(model_of, text_file, tmp_path, monkeypatch):
    levels = set()
    empty = InputStats.empty.__func__

    def spy(cls, features, level, device="cpu"):
        levels.add(level)
        return empty(cls, features, level, device)

    monkeypatch.setattr(InputStats, "empty", classmethod(spy))
    for prune, level in (("magnitude", Level.NONE), ("wanda", Level.MOMENTS), ("sparsegpt", Level.GRAM)):
        levels.clear()
        _, report = compress(model_of("llama"), tmp_path / prune, recipe(text_file, prune=prune))
        assert levels == {level}
        assert report.calibration["level"] == level.name.lower()


def test_linears_are_solved_in_the_order_of_a_forward_pass(model_of, text_file, tmp_path):
    told = []
    _, report = compress(model_of("llama"), tmp_path / "out", recipe(text_file), progress=told.append)
    order = [f"model.layers.{i}.{part}" for i in range(2) for group in FAMILIES["llama"].groups for part in group]
    assert [linear.name for linear in report.linears] == order
    steps = [progress for progress in told if progress.linear is not None]
    assert [step.linear.name for step in steps] == order
    assert [step.block for step in steps] == [0] * 7 + [1] * 7
    assert all(step.blocks == 2 and step.seconds_left >= 0 and step.peak_bytes > 0 for step in steps)
    assert steps[-1].seconds_left == pytest.approx(0)


def test_leaving_out_the_output_of_the_last_block_changes_nothing(model_of, text_file, tmp_path, monkeypatch):
    found, _ = compress(model_of("llama"), tmp_path / "short", recipe(text_file, prune="sparsegpt"))
    walk = walker.walk
    lasts = []

    def whole(passage, target, way, beside=None):
        lasts.append(passage.outputs is None)
        outputs = HiddenStates(torch.device("cpu")) if passage.outputs is None else passage.outputs
        walk(replace(passage, outputs=outputs), target, way, beside)
        assert [shape[1] for shape in outputs.shapes] == [SEQ_LEN]

    monkeypatch.setattr(walker, "walk", whole)
    again, _ = compress(model_of("llama"), tmp_path / "long", recipe(text_file, prune="sparsegpt"))
    assert lasts == [False, True]
    assert all(torch.equal(found[key], again[key]) for key in found)


# --- the same bytes


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "magnitude"},
        {"prune": "wanda", "refine": "dsnot"},
        {"prune": "sparsegpt", "sparsity": None, "pattern": "2:4"},
    ],
    ids=["magnitude", "wanda dsnot", "sparsegpt 2:4"],
)
def test_the_same_seed_gives_the_same_bytes(options, model_of, text_file, tmp_path):
    for out in ("one", "two"):
        secateur.compress(str(model_of("qwen2")), tmp_path / out, recipe(text_file, **options))
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert {"config.json", "model.safetensors", "secateur.json", "tokenizer.json"} <= files.keys()
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}


def test_another_seed_takes_other_text(model_of, text_file, tmp_path):
    wanted = recipe(text_file)
    one, _ = compress(model_of("llama"), tmp_path / "one", wanted)
    other = replace(wanted, calibration=replace(wanted.calibration, seed=1))
    two, _ = compress(model_of("llama"), tmp_path / "two", other)
    assert any(not torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compressed_checkpoint_is_a_model_like_any_other(name, model_of, text_file, tmp_path):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    secateur.compress(str(model_of(name)), packed, recipe(text_file, sparsity=0.3))
    export(str(packed), dense, "dense")
    wanted = recipe(text_file, prune="sparsegpt", sparsity=None, pattern="2:4")
    one, _ = compress(packed, tmp_path / "one", wanted)
    two, _ = compress(dense, tmp_path / "two", wanted)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()


# --- which linears


@pytest.mark.parametrize("prune", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"targets": ("*.mlp.*",)}, {f"{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")}),
        ({"targets": ("*.v_proj", "*.down_proj"), "ignore": ("*.0.*",)}, {"1.self_attn.v_proj", "1.mlp.down_proj"}),
        (
            {"ignore": ("model.layers.1.*", "*.q_proj", "*.mlp.*")},
            {"0.self_attn.k_proj", "0.self_attn.v_proj", "0.self_attn.o_proj"},
        ),
    ],
    ids=["targets", "nothing in the first block", "nothing in the last block"],
)
def test_targets_and_ignore(options, chosen, prune, model_of, text_file, tmp_path):
    source, wanted = model_of("llama"), recipe(text_file, prune=prune, sparsity=None, pattern="2:4", **options)
    report = secateur.compress(str(source), tmp_path / "out", wanted)
    names = {f"model.layers.{name}" for name in chosen}
    assert {linear.name for linear in report.linears} == names
    dense, loaded = load_file(source / "model.safetensors"), secateur.load(tmp_path / "out").state_dict()
    for key, tensor in dense.items():
        sparsity = 1 - torch.count_nonzero(loaded[key]) / tensor.numel()
        if key.removesuffix(".weight") in names:
            assert sparsity == 0.5
        else:
            assert torch.equal(loaded[key], tensor), key
    if prune == "sparsegpt":
        groups = [[p for p in group if any(f"{i}.{p}" in chosen for i in (0, 1))] for group in FAMILIES["llama"].groups]
        if "ignore" not in options:
            expected, _ = reference(source, wanted, [group for group in groups if group], "model.layers")
            assert_like(loaded, expected, transposed=False)


def test_patterns_that_match_nothing(model_of, text_file, tmp_path):
    for options, message in (
        (
            {"targets": ("*.fc1",)},
            r"`targets` '\*\.fc1' matches none of the linears, which are called like model\.layers",
        ),
        ({"ignore": ("lm_head",)}, r"`ignore` 'lm_head' matches none"),
        ({"ignore": ("*",)}, "nothing is left to compress"),
        ({"targets": ("*.q_proj",), "ignore": ("*.self_attn.*",)}, "nothing is left to compress"),
    ):
        with pytest.raises(UsageError, match=message):
            compress(model_of("llama"), tmp_path / "out", recipe(text_file, **options))


def test_generalise_puts_a_star_for_the_number_where_nothing_else_is_matched():
    same, other = {"layout": "bitmap"}, {"layout": "nm", "n": 2, "m": 4}
    entries = {f"h.{i}.{part}": dict(same) for i in range(12) for part in ("fc1", "fc2", "a.fc2", "o")}
    entries["h.3.o"] = other
    entries["h.10.extra"] = dict(same)
    del entries["h.7.fc1"]
    found = generalise(entries, ["h"], absent={"h.7.fc1", "h.0.gate"})
    # h.*.fc2 would match h.0.a.fc2 as well, h.*.fc1 the absent h.7.fc1, and the o are not alike.
    assert found["h.*.a.fc2"] == same
    assert found["h.*.extra"] == same
    assert not {"h.*.fc1", "h.*.fc2", "h.*.o"} & found.keys()
    assert found["h.3.o"] == other
    assert {name for name in found if name.endswith(".fc1")} == {f"h.{i}.fc1" for i in range(12) if i != 7}
    exact = {name: found.get(name) or found[f"h.*.{name.split('.', 2)[2]}"] for name in entries}
    assert exact == entries


def test_the_config_names_modules_by_pattern_where_it_can(model_of, text_file, tmp_path):
    for ignore, expected in (
        ((), {f"model.layers.*.{part}" for group in FAMILIES["llama"].groups for part in group}),
        (
            ("*.0.mlp.up_proj", "*.self_attn.*"),
            {"model.layers.*.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.*.mlp.down_proj"},
        ),
    ):
        out = tmp_path / f"out{len(ignore)}"
        secateur.compress(str(model_of("llama")), out, recipe(text_file, ignore=ignore))
        found = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
        assert found == {name: {"layout": "bitmap"} for name in expected}


# --- dtypes


@pytest.mark.thin(2)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_the_dtype_of_what_is_written(stored, dtype, model_of, text_file, tmp_path):
    source, wanted = model_of("llama", dtype=stored), recipe(text_file, prune="sparsegpt", dtype=dtype)
    expected_dtype = stored if dtype == "auto" else getattr(torch, dtype)
    expected, _ = reference(source, wanted, FAMILIES["llama"].groups, "model.layers", expected_dtype)
    found, _ = compress(source, tmp_path / "out", wanted)
    assert {tensor.dtype for tensor in found.values()} == {expected_dtype}
    for name in expected:
        assert 2 * torch.count_nonzero(found[f"{name}.weight"]) == found[f"{name}.weight"].numel()
    if expected_dtype == torch.float32:
        assert_like(found, expected, transposed=False)
    dense = load_file(source / "model.safetensors")
    for key in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(found[key], dense[key].to(expected_dtype))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["dtype"] == str(expected_dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == expected_dtype


def spoil(folder, **changes):
    """Change tensors of a folder: `spoil(folder, norm=("model.norm.weight", function))`."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.values():
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_what_does_not_fit_the_dtype_is_named(name, own_model, text_file, tmp_path):
    source = spoil(own_model("llama"), it=(name, lambda tensor: tensor * 1e7))
    with pytest.raises(SecateurError, match=rf"{name.removesuffix('.weight')}.* overflow torch\.float16: give .*dtype"):
        compress(source, tmp_path / "out", recipe(text_file, prune="magnitude", dtype="float16"))
    assert not (tmp_path / "out").exists()


# --- values that are not finite


@pytest.fixture
def ids_of_words(monkeypatch):
    """Calibration windows of random words, with token 319 in window 5 alone."""
    generator = torch.Generator().manual_seed(0)
    ids_NS = torch.randint(2, VOCABULARY - 1, (SAMPLES, SEQ_LEN), generator=generator)
    ids_NS[5, 17] = VOCABULARY - 1
    monkeypatch.setattr(windows_module, "calibration_ids", lambda source, settings, *_: (ids_NS, settings, []))


@pytest.mark.parametrize("batch_tokens", [1, 4 * SEQ_LEN, None])
def test_activations_that_are_not_finite_name_linear_and_sample(
    batch_tokens, ids_of_words, own_model, text_file, tmp_path
):
    def enormous(E):
        E[VOCABULARY - 1] = 3e38  # Gemma scales embeddings up
        return E

    source = spoil(own_model("gemma"), it=("model.embed_tokens.weight", enormous))
    message = r"input of model\.layers\.0\.self_attn\.q_proj is not finite in calibration sample 5:"
    with pytest.raises(SecateurError, match=message):
        compress(source, tmp_path / "out", recipe(text_file), batch_tokens=batch_tokens)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parts", "factor", "message"),
    [
        (
            "1.mlp.gate_proj 1.mlp.up_proj",
            1e20,
            r"input of model\.layers\.1\.mlp\.down_proj is not finite in .* sample 0:",
        ),
        (
            "0.mlp.gate_proj 0.mlp.up_proj",
            1e12,
            r"inputs of model\.layers\.0\.mlp\.down_proj are so large that the sum",
        ),
        ("0.mlp.down_proj", 1e39, r"model\.layers\.0\.mlp\.down_proj\.weight holds NaN or infinity"),
        ("1.self_attn.k_proj", float("nan"), r"model\.layers\.1\.self_attn\.k_proj\.weight holds NaN or infinity"),
    ],
    ids=["product overflows", "squares overflow", "infinite weight", "NaN weight"],
)
@pytest.mark.parametrize("prune", ["wanda", "sparsegpt"])
def test_weights_that_make_the_model_overflow(parts, factor, message, prune, own_model, text_file, tmp_path):
    source = own_model("llama")
    spoil(source, **{part: (f"model.layers.{part}.weight", lambda W: W * factor) for part in parts.split()})
    with pytest.raises(SecateurError, match=message):
        compress(source, tmp_path / "out", recipe(text_file, prune=prune))
    assert not (tmp_path / "out").exists()


def test_a_block_whose_output_overflows_is_named(own_model, text_file, tmp_path):
    source = spoil(own_model("llama"), it=("model.layers.0.mlp.down_proj.weight", lambda W: W.sign() * 3e38))
    with pytest.raises(SecateurError, match=r"the output of model\.layers\.0 is not finite"):
        compress(source, tmp_path / "out", recipe(text_file))


@pytest.mark.parametrize("prune", ["magnitude", "wanda"])
def test_one_nan_in_a_weight_names_the_tensor(prune, own_model, text_file, tmp_path):
    def one(W):
        W[3, 5] = float("nan")
        return W

    source = spoil(own_model("gpt2"), it=("transformer.h.1.mlp.c_proj.weight", one))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight holds NaN"):
        compress(source, tmp_path / "out", recipe(text_file, prune=prune))


# --- text


def without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    return folder


def test_magnitude_needs_no_text_and_no_tokenizer(own_model, text_file, tmp_path):
    source = without_tokenizer(own_model("llama"))
    found, report = compress(source, tmp_path / "out", recipe("/no/such/file.txt", prune="magnitude"))
    assert report.calibration == {"level": "none"}
    assert {linear.error_kind for linear in report.linears} == {"weights"}
    for name, W_OI in load_file(source / "model.safetensors").items():
        if "_proj" in name:
            threshold_O1 = W_OI.abs().sort(1).values[:, W_OI.shape[1] // 2 - 1 :][:, :1]
            assert torch.equal(found[name], W_OI * (W_OI.abs() > threshold_O1))
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        compress(source, tmp_path / "wanda", recipe(text_file))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder


SELF = secateur.Calibration(samples=5, seq_len=20)


def sampled(source, settings=SELF):
    said = []
    ids_NS, *_ = calibration_ids(open_source(str(source)), settings, torch.device("cpu"), said.append)
    return ids_NS, said


def test_the_model_writes_its_own_text_once(cache, own_model, tmp_path, monkeypatch):
    source, wanted = own_model("llama"), secateur.Recipe("wanda", 0.5, calibration=SELF)
    secateur.compress(str(source), tmp_path / "one", wanted)
    assert len(list(cache().iterdir())) == 1

    def fail(*_):
        raise AssertionError("sampled again")

    monkeypatch.setattr(calibrate, "sample_windows", fail)
    secateur.compress(str(source), tmp_path / "two", wanted)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    # Another seed, another size or another model is another text.
    for changed in (replace(SELF, seed=1), replace(SELF, samples=6), replace(SELF, seq_len=19)):
        with pytest.raises(AssertionError, match="sampled again"):
            sampled(source, changed)
    spoil(source, it=("model.norm.weight", lambda tensor: tensor * 2))
    with pytest.raises(AssertionError, match="sampled again"):
        sampled(source)


@pytest.mark.parametrize("max_memory", [None, "100GiB"])
def test_the_model_is_hashed_once(max_memory, cache, own_model, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(source_module, "sha256_of", lambda *files: (hashed.append(files), sha256_of(*files))[1])
    source, wanted = str(own_model("llama")), secateur.Recipe("wanda", 0.5, calibration=SELF)
    secateur.compress(source, tmp_path / "out", wanted, max_memory=max_memory)
    assert len(hashed) == 1
    secateur.forecast(source, wanted, out=tmp_path, max_memory=max_memory)
    assert len(hashed) == 2


def test_the_same_seed_writes_the_same_text(cache, own_model):
    # Without a tokenizer too: the config says which token begins a text.
    source = without_tokenizer(own_model("llama"))
    ids_NS, said = sampled(source)
    assert ids_NS.shape == (5, 20)
    assert (ids_NS[:, 0] == 0).all()
    assert ids_NS[:, 1:].unique().numel() > 40
    assert said[0] == "letting the model write its calibration text"
    next(cache().iterdir()).unlink()
    again_NS, said = sampled(source)
    assert torch.equal(again_NS, ids_NS)
    assert "using cached calibration text" not in said
    assert not torch.equal(sampled(source, replace(SELF, seed=1))[0], ids_NS)


def test_texts_are_drawn_from_the_models_own_distribution(cache, own_model):
    """A model whose head knows one token, besides the first, writes that token and no other."""

    def one_word(W):
        W.zero_()
        return W

    source = own_model("llama")
    spoil(source, it=("lm_head.weight", one_word))
    ids_NS, _ = sampled(source, replace(SELF, samples=40))
    counts = torch.bincount(ids_NS[:, 1:].flatten(), minlength=VOCABULARY)
    assert counts.max() < 15  # a head of zeros: every token as likely as any other
    assert (counts > 0).float().mean() > 0.8


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another shape", "unknown token", "other dtype"])
def test_a_damaged_cache_is_sampled_anew(damage, cache, own_model):
    source = own_model("llama")
    ids_NS, _ = sampled(source)
    (file,) = cache().iterdir()
    raw = file.read_bytes()
    if damage in ("truncated", "empty", "garbage"):
        size = {"truncated": len(raw) // 2, "empty": 0, "garbage": len(raw)}[damage]
        file.write_bytes(random.Random(0).randbytes(size) if damage == "garbage" else raw[:size])
    else:
        other = {"another shape": ids_NS[:, :-1], "unknown token": ids_NS + VOCABULARY, "other dtype": ids_NS.int()}
        save_file({"ids": other[damage].contiguous()}, file)
    again_NS, said = sampled(source)
    assert torch.equal(again_NS, ids_NS)
    assert said[0] == "letting the model write its calibration text"
    assert file.read_bytes() == raw
    assert sampled(source)[1] == ["using cached calibration text"]


def test_a_cache_that_cannot_be_written_is_done_without(own_model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sampled(own_model("llama"))[0].shape == (5, 20)


def test_windows_longer_than_the_models_positions(model_of, text_file, tmp_path):
    wanted = recipe(text_file)
    too_long = replace(wanted, calibration=replace(wanted.calibration, seq_len=65))
    with pytest.raises(UsageError, match="`seq_len` 65 is more than the 64 positions"):
        compress(model_of("llama"), tmp_path / "out", too_long)
    # Without a word on it, windows are as long as the model takes.
    _, report = compress(
        model_of("llama"), tmp_path / "out", replace(too_long, calibration=replace(wanted.calibration, seq_len=None))
    )
    assert report.calibration["seq_len"] == 64
