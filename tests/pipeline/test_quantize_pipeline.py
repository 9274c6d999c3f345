"""Quantizing from end to end: what `compress` writes, every way of reading it, and what is said when something is wrong.

O: output features, I: input features.
"""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.inspect import inspect
from secateur.core.registry import PRUNERS
from secateur.errors import CheckpointError, SecateurError
from secateur.formats.stored_weights import find_entry, parse_quantization_config
from secateur.model.source import open_source
from secateur.pipeline.outcome import LinearReport
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Calibration, Recipe

pytestmark = pytest.mark.usefixtures("dense_backend")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
METHODS = {
    "rtn": ("rtn", {"bits": 4, "group_size": 16}),
    "rtn-rows": ("rtn", {"bits": 8, "group_size": "row", "symmetric": True}),
    "gptq": ("gptq", {"bits": 3, "group_size": 24}),
    "gptq-permuted": ("gptq", {"bits": 2, "group_size": 8, "order": "permuted", "symmetric": True}),
    "spqr": ("spqr", {"bits": 3, "outlier_threshold": 0.1}),
    "spqr-natural": (
        "spqr",
        {"bits": 2, "group_size": 8, "scale_bits": 4, "tile_rows": 12, "order": "natural", "outlier_threshold": 0.3},
    ),
    "spqr-share": ("spqr", {"outlier_share": 0.02, "search_range": False, "damping": 0.1}),
    "squeezellm": ("squeezellm", {"bits": 2, "sensitivity": "hessian", "outlier_share": 0.02}),
    "squeezellm-fisher": ("squeezellm", {"bits": 3}),
    "trellis": ("trellis", {"bits": 3}),
    "trellis-2": ("trellis", {"bits": 2, "states": 256}),
    "sq": ("sq", {"bank": 16, "high_share": 0.25}),
    "sq-static": ("sq", {"bank": 12, "high_share": 0.5, "high_bits": 6, "low_bits": 3, "static_mask": True}),
}
PRUNINGS = {
    "alone": {},
    **{f"{method} {share}": {"prune": method, **({"sparsity": 0.5} if share == "50%" else {"pattern": "2:4"})}
       for method in ("magnitude", "wanda", "sparsegpt") for share in ("50%", "2:4")},
}  # fmt: skip
# With each method, what is tried by default: every way to prune with one of them.
USUAL = {
    "rtn": ("alone", "magnitude 50%", "sparsegpt 2:4"),
    "gptq": ("alone", "magnitude 2:4"),
    "spqr": ("alone", "wanda 50%"),
    "squeezellm": ("sparsegpt 50%", "wanda 2:4"),
}
# Llama in bfloat16 with everything; GPT-2, whose Conv1D are transposed and which has biases, in float16 with a part of it.
CASES = [("llama", BF16, method, pruning) for method in ("rtn", "gptq", "spqr", "squeezellm") for pruning in PRUNINGS]
CASES += [("gpt2", FP16, m, "alone") for m in ("rtn-rows", "spqr-share", "squeezellm")]
CASES += [("gpt2", FP16, m, "wanda 2:4") for m in ("rtn", "gptq-permuted", "spqr-natural", "squeezellm-fisher")]
CASES += [
    ("llama", BF16, "trellis", "alone"),
    ("gpt2", FP16, "trellis-2", "alone"),
    ("llama", FP32, "trellis-2", "alone"),
    ("llama", BF16, "sq", "alone"),
    ("gpt2", FP16, "sq-static", "alone"),
]
CASES += [("llama", FP32, "gptq-permuted", "sparsegpt 50%"), ("llama", FP32, "rtn-rows", "alone")]
SELDOM = [case for case in CASES if case[1] is BF16 and case[3] not in USUAL.get(case[2], ("alone",))]
SELDOM += [
    ("gpt2", FP16, "rtn-rows", "alone"),
    ("gpt2", FP16, "rtn", "wanda 2:4"),
    ("llama", FP32, "trellis-2", "alone"),
]
EACH = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case in SELDOM)) for case in CASES],
    ids=lambda case: "-".join(map(str, case)).replace("torch.", ""),
)
SOME_CASES = [
    ("llama", BF16, "rtn", "alone"),
    ("llama", BF16, "spqr", "wanda 50%"),
    ("gpt2", FP16, "gptq-permuted", "wanda 2:4"),
    ("gpt2", FP16, "squeezellm", "alone"),
    ("gpt2", FP16, "trellis-2", "alone"),
    ("llama", BF16, "trellis", "alone"),
]
SOME = pytest.mark.parametrize("case", SOME_CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))


@pytest.fixture(scope="module")
def recipe_of(text_file):
    def make(method, pruning="alone", **more):
        name, options = METHODS[method]
        text = Calibration(str(text_file), 12, 24)
        return Recipe(quantize=name, quantization=options, calibration=text, **PRUNINGS[pruning], **more)

    return make


@pytest.fixture(scope="module")
def compressed(model_of, recipe_of, tmp_path_factory):
    """A case's source, its folder, that with `--format dense`, and the masks of its pruner. Not to be written to."""
    made = {}

    def make(family, dtype, method, pruning):
        case = (family, dtype, method, pruning)
        if case not in made:
            source, folder = model_of(family, dtype=dtype), tmp_path_factory.mktemp("case")
            masks = []
            with pytest.MonkeyPatch.context() as patch:
                for pruner in (each for each in PRUNERS.values() if hasattr(each, "prune")):
                    patch.setattr(pruner, "prune", spy(pruner.prune, masks))
                report = secateur.compress(str(source), folder / "packed", recipe_of(method, pruning))
            dense = secateur.compress(str(source), folder / "dense", recipe_of(method, pruning, format="dense"))
            assert {linear.layout for linear in dense.linears} == {"dense"}
            kept = dict(zip([linear.name for linear in report.linears], masks, strict=True)) if masks else {}
            made[case] = SimpleNamespace(
                source=source, packed=folder / "packed", dense=folder / "dense", report=report, kept=kept,
                linears=linears_of(family), transposed=family == "gpt2", dtype=dtype,
            )  # fmt: skip
        return made[case]

    return make


def spy(prune, masks):
    def spying(self, stack, pattern):
        pruned = prune(self, stack, pattern)
        masks.extend(stack.split(pruned.keep_OI.clone()))
        return pruned

    return spying


def linears_of(family):
    found = FAMILIES[family]
    return [f"{found.prefix}.{i}.{name}" for i in range(2) for group in found.groups for name in group]


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def parts_of(tensors, linear):
    start = f"{linear}.weight."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def config_of(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def same_bytes(a, b):
    """Tensors under the same names with the same bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


def has_weights(model, expected):
    same_bytes({name: p.detach() for name, p in model.named_parameters()}, expected)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what is written, and how it is read


@EACH
def test_every_reader_finds_the_same_weights(case, compressed, tmp_path):
    made = compressed(*case)
    expected = stored(made.dense)
    before = stored(made.source)
    assert expected.keys() == before.keys()
    packed = stored(made.packed)
    plain = {name: tensor for name, tensor in packed.items() if name in before}
    assert plain.keys() == before.keys() - {f"{linear}.weight" for linear in made.linears}
    same_bytes(plain, {name: before[name] for name in plain})  # biases, norms, embeddings and the head
    same_bytes(plain, {name: expected[name] for name in plain})
    has_weights(secateur.load(made.packed), expected)
    has_weights(AutoModelForCausalLM.from_pretrained(made.packed, dtype="auto"), expected)
    entries = parse_quantization_config(config_of(made.packed))
    for linear in made.linears:
        W, parts = expected[f"{linear}.weight"], parts_of(packed, linear)
        layout, transposed = find_entry(entries, linear)
        assert transposed == made.transposed
        assert torch.equal(layout.unpack(parts).T if transposed else layout.unpack(parts), W)
        error = (W.float() - before[f"{linear}.weight"].float()).square().sum() / W.float().square().sum()
        assert 0 < error < 3, linear
    assert config_of(made.dense) is None


@EACH
def test_the_mask_of_the_pruner_is_held(case, compressed):
    made = compressed(*case)
    model, packed, entries = secateur.load(made.packed), stored(made.packed), config_of(made.packed)["modules"]
    assert set(made.kept) == (set() if case[3] == "alone" else set(made.linears))
    inner = {"rtn": "packed-int", "gptq": "packed-int", "squeezellm": "codebook"}
    method = case[2].partition("-")[0]
    for entry in entries.values():
        if made.kept:
            assert entry["layout"] == "sparse-int"
            entry = entry["codes"]
        assert entry["layout"] == inner.get(method, method)
    for linear, keep_OI in made.kept.items():
        weight = model.get_parameter(f"{linear}.weight")
        W_OI = weight.T if made.transposed else weight
        assert not W_OI[~keep_OI].any()
        # Exactly those: a kept one may be zero all the same.
        found = find_entry(parse_quantization_config(config_of(made.packed)), linear)[0].read(parts_of(packed, linear))
        if found.order_I is not None:
            keep_OI = keep_OI[:, found.order_I]
        assert torch.equal(found.keep_OI, keep_OI)
        assert keep_OI.float().mean() == 0.5
        if "2:4" in case[3] and found.order_I is None:
            assert (keep_OI.view(len(keep_OI), -1, 4).sum(2) == 2).all()


@EACH
def test_what_is_reported_is_what_is_in_the_file(case, compressed):
    made = compressed(*case)
    packed, manifest = stored(made.packed), json.loads((made.packed / "secateur.json").read_text())
    inspected = inspect(open_source(str(made.packed)))
    by_name = {linear.name: linear for linear in made.report.linears}
    assert set(by_name) == set(made.linears) == {linear.name for linear in inspected.linears}
    assert {linear.name: linear for linear in inspected.linears} == by_name
    for name, linear in by_name.items():
        parts = parts_of(packed, name)
        O, I = linear.shape
        assert parts["shape"].tolist() == [O, I]
        assert linear.bytes == sum(tensor.nbytes for tensor in parts.values())
        assert linear.bits * O * I / 8 == pytest.approx(linear.bytes, rel=1e-12)
        assert linear.sparsity == (0.5 if made.kept else 0)
        assert linear.outliers == parts.get("outlier_column", torch.empty(0)).numel() / (O * I)
        plain = {**asdict(linear), "shape": [O, I]}
        told = {key: plain[key] for key in plain if key not in ("name", *LinearReport.CHOSEN)}
        assert manifest["linears"][name] == {**told, **linear.chosen()}
    weights = sum(linear.shape[0] * linear.shape[1] for linear in by_name.values())
    assert made.report.bits * weights / 8 == pytest.approx(inspected.linear_bytes, rel=1e-12)
    assert manifest["bits"] == made.report.bits
    assert manifest["sparsity"] == made.report.sparsity == inspected.sparsity == (0.5 if made.kept else 0)
    assert made.report.bytes == inspected.weight_bytes == (made.packed / "model.safetensors").stat().st_size


@SOME
def test_save_pretrained_writes_the_same_parts(case, compressed, tmp_path):
    made = compressed(*case)
    for i, model in enumerate(
        [secateur.load(made.packed), AutoModelForCausalLM.from_pretrained(made.packed, dtype="auto")]
    ):
        model.save_pretrained(tmp_path / str(i), max_shard_size="6KB")
        assert len(list((tmp_path / str(i)).glob("*.safetensors"))) > 1
        same_bytes(stored(tmp_path / str(i)), stored(made.packed))
        assert config_of(tmp_path / str(i)) == config_of(made.packed)
    has_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "0", dtype="auto"), stored(made.dense))
    has_weights(secateur.load(tmp_path / "1"), stored(made.dense))
    linear = made.linears[3]
    with torch.no_grad():
        model.get_parameter(f"{linear}.weight")[1, 2] += 1
    with pytest.raises(CheckpointError, match=rf"{linear}\.weight is not the weight that was loaded.*--to dense"):
        model.save_pretrained(tmp_path / "changed")
    assert not list((tmp_path / "changed").glob("*.safetensors"))


@pytest.mark.thin(3)
@SOME
def test_a_quantized_folder_is_compressed_like_the_dense_one(case, compressed, recipe_of, tmp_path):
    made = compressed(*case)
    again = ("gptq", "magnitude 2:4") if SOME_CASES.index(case) % 2 else ("squeezellm-fisher", "alone")
    for name in ("packed", "dense"):
        secateur.compress(str(getattr(made, name)), tmp_path / name, recipe_of(*again, ignore=("*.1.*",)))
    same_bytes(stored(tmp_path / "packed"), stored(tmp_path / "dense"))
    assert config_of(tmp_path / "packed") == config_of(tmp_path / "dense")
    secateur.compress(str(made.packed), tmp_path / "pruned", Recipe("magnitude", 0.75))
    assert {linear.layout for linear in inspect(open_source(str(tmp_path / "pruned"))).linears} == {"bitmap"}


@SOME
def test_export(case, compressed, says, tmp_path):
    made = compressed(*case)
    for to in ("dense", "secateur"):
        assert says("export", made.packed, tmp_path / to, "--to", to, "--quiet") == (0, "", "")
        has_weights(AutoModelForCausalLM.from_pretrained(tmp_path / to, dtype="auto"), stored(made.dense))
        assert json.loads((tmp_path / to / "secateur.json").read_text())["linears"].keys() == set(made.linears)
    same_bytes(stored(tmp_path / "dense"), stored(made.dense))
    assert config_of(tmp_path / "dense") is None
    same_bytes(stored(tmp_path / "secateur"), stored(made.packed))
    assert config_of(tmp_path / "secateur") == config_of(made.packed)


@pytest.mark.thin(3)
@pytest.mark.parametrize("read", [AutoModelForCausalLM.from_pretrained, secateur.load], ids=["from_pretrained", "load"])
@pytest.mark.parametrize("wanted", [BF16, FP16, FP32], ids=str)
@SOME
def test_read_in_another_dtype(case, wanted, read, compressed):
    """As the weights that the files stand for, rounded once more: the parts are what they are, whatever the model's dtype."""
    expected = {name: tensor.to(wanted) for name, tensor in stored(compressed(*case).dense).items()}
    has_weights(read(compressed(*case).packed, dtype=wanted), expected)


def test_written_in_another_dtype(model_of, recipe_of, tmp_path):
    for name, more in (("packed", {}), ("dense", {"format": "dense"})):
        secateur.compress(str(model_of("llama")), tmp_path / name, recipe_of("gptq", dtype="bfloat16", **more))
    expected = stored(tmp_path / "dense")
    assert {tensor.dtype for tensor in expected.values()} == {BF16}
    has_weights(secateur.load(tmp_path / "packed"), expected)


def test_some_linears_are_left_alone(model_of, recipe_of, tmp_path):
    alone = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    recipe = recipe_of("spqr", ignore=("*.1.mlp.up_proj", "*.o_proj"))
    secateur.compress(str(model_of("llama", dtype=BF16)), tmp_path / "out", recipe)
    before, after = stored(model_of("llama", dtype=BF16)), stored(tmp_path / "out")
    plain = before.keys() & after.keys()
    assert plain & {f"{linear}.weight" for linear in linears_of("llama")} == {f"{linear}.weight" for linear in alone}
    same_bytes({name: after[name] for name in plain}, {name: before[name] for name in plain})
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").save_pretrained(tmp_path / "again")
    same_bytes(stored(tmp_path / "again"), after)


# --- recipes and the command line


@pytest.fixture
def fails(says, tmp_path):
    """A command that must fail with this exit code and leave nothing behind: the one line that it says."""

    def run(code, *args):
        before = set(tmp_path.rglob("*"))
        found, out, err = says(*args)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (found, out, len(errors)) == (code, "", 1), err
        assert err.endswith(f"{errors[0]}\n")
        assert set(tmp_path.rglob("*")) == before
        return errors[0].removeprefix("error: ")

    return run


@pytest.mark.thin(2)
@pytest.mark.parametrize("method", ["rtn-rows", "gptq-permuted", "spqr-natural", "squeezellm-fisher"])
def test_a_run_is_repeated_to_the_byte(method, model_of, recipe_of, says, text_file, tmp_path):
    """By the same recipe from Python, YAML, the manifest, and options; of all methods but one, files are read and no more."""
    recipe = recipe_of(method, "wanda 50%", ignore=("*.o_proj",))
    outs = [tmp_path / name for name in ("python", "yaml", "manifest", "options")]
    secateur.compress(str(model_of("llama")), outs[0], recipe)
    known = Recipe.read(outs[0] / "secateur.json")
    assert replace(known, quantization=recipe.quantization, pruning=recipe.pruning) == recipe
    # The defaults of this version are written down, too.
    assert known.quantization == {
        name: value for name, value in asdict(plan(recipe).quantizer).items() if value is not None
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe
    options = ["--quantize", recipe.quantize, "--prune", "wanda", "--sparsity", 0.5, "--ignore", "*.o_proj"]
    options += ["--calibration", text_file, "--samples", 12, "--seq-len", 24]
    for name, value in recipe.quantization.items():
        options += ["--symmetric"] if value is True else [f"--{name.replace('_', '-')}", value]
    recipes = (["--recipe", tmp_path / "recipe.yaml"], ["--recipe", outs[0] / "secateur.json"], options)
    for out, given in list(zip(outs[1:], recipes, strict=True))[0 if method == "rtn-rows" else 2 :]:
        assert says("compress", model_of("llama"), out, *given, "--quiet") == (0, "", "")
        assert files(out) == files(outs[0])


def test_inspect_says_what_the_report_says(says, model_of, recipe_of, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    report = secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of("spqr", "wanda 50%"))
    found = json.loads(says("inspect", tmp_path / "out", "--json")[1])
    assert found["linears"] == [{**asdict(linear), "shape": list(linear.shape)} for linear in report.linears]
    assert found["linear_bytes"] == sum(linear.bytes for linear in report.linears)
    code, table, _ = says("inspect", tmp_path / "out")
    assert (code, table.count("sparse-int"), table.count("50.00%")) == (0, 14, 15)
    assert f"{report.bits:.2f}" in next(line for line in table.splitlines() if "all linears" in line)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--quantize rtn --bits 9", "--bits 9 is not possible with rtn: give 2, 3, 4, 5, 6, 7 or 8"),
        ("--quantize rtn --group-size 1", "--group-size 1 is not possible"),
        ("--quantize gptq --group-size half", "--group-size half is not possible"),
        ("--quantize spqr --group-size row", "--group-size of spqr is 'row', which is not a whole number"),
        ("--quantize spqr --bits 1", "--bits 1 is not possible with spqr"),
        ("--quantize squeezellm --bits 8", "--bits 8 is not possible"),
        ("--quantize spqr --outlier-share 0.3", "--outlier-share 0.3 is not possible with spqr: give at least 0"),
        ("--quantize spqr --outlier-share 0.1 --outlier-threshold 1", "say the same in two ways"),
        ("--quantize spqr --scale-bits 9", "--scale-bits 9 is not possible"),
        ("--quantize spqr --tile-rows 1", "--tile-rows 1 is not possible"),
        ("--quantize gptq --order random", "--order random is not possible with gptq: give natural, activation or permuted"),
        ("--quantize gptq --damping 0", "--damping 0 is not possible"),
        ("--quantize squeezellm --sensitivity magic", "--sensitivity magic is not possible with squeezellm: give fisher"),
        ("--bits 4", "--bits is an option of gptq, rtn, spqr, squeezellm, trellis: name one by --prune or --quantize"),
        ("--bits 4 --prune wanda --sparsity 0.5", "spqr, squeezellm, trellis: wanda would not heed it"),
        ("--quantize rtn --sparsity 0.5", "--sparsity says how to prune, but no method is given: --prune is missing"),
        ("--quantize rtn --damping 0.1", "tyr, gptq, spqr, sq, ternary, trellis, cospadi, svd: rtn would not heed it"),
        ("--quantize squeezellm --tile-rows 16", "--tile-rows is an option of spqr: squeezellm would not heed it"),
        ("--quantize rtn --format bitmap", "--format bitmap does not hold quantized weights: give auto or dense"),
        ("--quantize rtn --format nm --prune wanda --pattern 2:4", "--format nm does not hold quantized weights"),
        ("--quantize rtn --format packed-int", "format 'packed-int' is not known"),
        ("--quantize gtpq", "quantization method 'gtpq' is not known: did you mean 'gptq'?"),
        ("--quantize x", "quantization method 'x' is not known: it can be gptq, rtn, spqr, sq, squeezellm"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options, words, fails, model_of, text_file, tmp_path):
    line = fails(2, "compress", model_of("llama"), tmp_path / "out", *options.split(), "--calibration", text_file)
    assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"bits": "4"}, "--bits of rtn is '4', which is not a whole number"),
        ({"bits": True}, "--bits of rtn is True, which is not a whole number"),
        ({"symmetric": 1}, "--symmetric of rtn is 1, which is not a true or false"),
        ({"group": 16}, "`group` is not an option of rtn, which has --bits, --group-size"),
        ([4], "'quantization' of the recipe must be a mapping of options to values"),
    ],
    ids=str,
)
def test_recipes_that_make_no_sense(content, words, fails, model_of, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"quantize": "rtn", "quantization": content}))
    assert words in fails(2, "compress", model_of("llama"), tmp_path / "out", "--recipe", tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("case", "to", "words"),
    [
        (("llama", BF16, "rtn", "wanda 50%"), "compressed-tensors", "a mask of kept weights"),
        (("llama", BF16, "spqr", "alone"), "compressed-tensors", "not on a uniform grid"),
        (("gpt2", FP16, "rtn-rows", "alone"), "compressed-tensors", "[in, out]"),
        (("llama", BF16, "spqr", "wanda 50%"), "spqr", "a mask of kept weights"),
        (("llama", BF16, "rtn", "alone"), "spqr", "holds two-level codes only"),
        (("llama", BF16, "squeezellm", "magnitude 2:4"), "spqr", "holds two-level codes only"),
        (("gpt2", FP16, "spqr-share", "alone"), "spqr", "[in, out]"),
    ],
    ids=str,
)
def test_what_cannot_be_exported(case, to, words, compressed, fails, tmp_path):
    line = fails(2, "export", compressed(*case).packed, tmp_path / "out", "--to", to)
    linear = compressed(*case).linears[0]
    assert line.startswith(f"{linear} cannot be written as {to}: ")
    assert words in line
    assert line.endswith("--to dense writes any model")


@pytest.mark.parametrize("to", ["compressed-tensors", "spqr"])
def test_what_has_nothing_to_export(to, fails, model_of, tmp_path):
    assert "no quantized linears to write" in fails(2, "export", model_of("llama"), tmp_path / "out", "--to", to)


@pytest.mark.parametrize("method", ["rtn", "gptq", "spqr", "squeezellm", "squeezellm-fisher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value, method, own_model, recipe_of, tmp_path):
    source, name = own_model("llama"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SecateurError) as caught:
        secateur.compress(str(source), tmp_path / "out", recipe_of(method))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- what strangers write


def cut(part):
    return lambda parts: {**parts, part: parts[part][:-1].clone()}


def put(part, place, value):
    def change(parts):
        parts[part].view(-1)[place] = value
        return parts

    return change


def drop(part):
    return lambda parts: {name: tensor for name, tensor in parts.items() if name != part}


DAMAGES = {
    "rtn": [
        (cut("codes"), "its codes has"), (cut("scale"), "its scale has"), (cut("zero"), "its zero has"),
        (drop("scale"), "'scale' is missing"), (drop("shape"), "'shape' is missing"), (put("shape", 1, -1), "'shape' is"),
        (put("shape", 0, 2**31 - 1), "its codes are truncated"), (put("scale", 7, torch.nan), "its scale holds"),
        (lambda parts: {}, "missing"),
    ],
    "spqr": [
        (cut("bitmask"), "'bitmask' has"), (cut("scale_codes"), "its scale_codes has"), (cut("second"), "'second' has"),
        (cut("outlier_value"), "its outlier_count says"), (drop("outlier_count"), "'outlier_count' is missing"),
        (put("second", 3, torch.inf), "not finite"), (cut("order"), "its order has"), (drop("codes"), "'codes' is missing"),
    ],
    "squeezellm": [
        (cut("table"), "'table' has"), (put("table", -1, -torch.inf), "not finite"), (cut("codes"), "its codes has"),
        (cut("outlier_column"), "its outlier_count says"),
    ],
}  # fmt: skip
EACH_DAMAGE = [(case, *damage) for case in SOME_CASES if case[2] in DAMAGES for damage in DAMAGES[case[2]]]


def broken(folder, out, linear="", change=None, config=None):
    """The folder with a change to the parts of one weight, or to its quantization_config."""
    out.mkdir()
    for file in folder.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        parts = parts_of(tensors, linear)
        tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{linear}.weight.")}
        tensors.update({f"{linear}.weight.{part}": tensor for part, tensor in change(parts).items()})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        content = json.loads((out / "config.json").read_text())
        for entry in content["quantization_config"]["modules"].values():
            config(entry)
        (out / "config.json").write_text(json.dumps(content))
    return out


def nobody_reads(folder, name, words, fails):
    lines = [fails(1, "inspect", folder)]
    for read in (secateur.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        lines.append(str(caught.value))
    for line in lines:
        assert name in line
        assert words in line
        assert "\n" not in line


@pytest.mark.parametrize(("case", "change", "words"), EACH_DAMAGE, ids=lambda x: x if isinstance(x, str) else "")
def test_a_damaged_part_is_found_by_every_reader(case, change, words, compressed, fails, tmp_path):
    made = compressed(*case)
    linear = made.linears[-1]
    nobody_reads(broken(made.packed, tmp_path / "broken", linear, change), f"{linear}.weight", words, fails)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, "its zero has"),
        ({"group_size": 2**31 - 1}, "its scale has"),
        ({"group_size": 8}, "its scale has"),
        ({"layout": "codebook"}, "'table' is missing"),
        ({"layout": "spqr", "scale_bits": 3, "tile_rows": 2}, "'scale_codes' is missing"),
    ],
    ids=str,
)
def test_a_config_of_another_form_is_found_by_every_reader(changes, words, compressed, fails, tmp_path):
    made = compressed(*SOME_CASES[0])
    folder = broken(made.packed, tmp_path / "broken", config=lambda entry: entry.update(changes))
    nobody_reads(folder, "model.layers.0.", words, fails)


@pytest.mark.parametrize(
    "changes", [{"bits": 9}, {"bits": True}, {"group_size": 0}, {"group_size": 2**40}, {"dtype": "int8"}, {"symmetric": None}],
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_found_by_every_reader(changes, compressed, fails, tmp_path):
    folder = broken(compressed(*SOME_CASES[0]).packed, tmp_path / "broken", config=lambda entry: entry.update(changes))
    (key, value), *_ = changes.items()
    nobody_reads(folder, "layout 'packed-int' with parameters that make no sense", f"{key} is {value!r}", fails)
