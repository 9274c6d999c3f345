"""`secateur bench`: which linears go together, the bytes that they move, what is written where, and what can go wrong.

How long anything takes is the machine's to say: times are only looked at for being times.

O: output features, I: input features.
"""

import json
import math
import shutil
from functools import partial
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from random_weights import load_sparse
from safetensors.torch import load_file, save_file
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

import secateur
from secateur.errors import CheckpointError, UsageError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.kernels import BACKENDS
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.packed import PADDING, SparseWeight, nbytes
from secateur.kernels.triton.triton_weight import TritonWeight
from secateur.speed import bench as bench_file
from secateur.speed.bench import bench
from secateur.speed.bench_result import describe
from secateur.speed.timing import cache_bytes, free_bytes, large_copy, time_in_turn

CPU = torch.device("cpu")
# Of the tiny Llama: (O, I) of its linears, and how many there are in two blocks.
SHAPES = {(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2}
BITS, GROUP = 3, 16
RECIPES = {
    "bitmap": ({"prune": "magnitude", "sparsity": 0.5}, {}),
    "nm": ({"prune": "magnitude", "pattern": "2:4"}, {}),
    "packed-int": ({"quantize": "rtn"}, {"bits": BITS, "group_size": GROUP}),
    "spqr": ({"quantize": "spqr"}, {"bits": BITS, "group_size": GROUP, "outlier_share": 0.02}),
    "sparse-int": ({"prune": "magnitude", "sparsity": 0.5, "quantize": "rtn"}, {"bits": BITS, "group_size": GROUP}),
}
has_cpu = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
quick = partial(bench, seconds=0.01)
pytestmark = pytest.mark.usefixtures("small_cache")


@pytest.fixture(scope="module")
def folder(model_of, text_file, tmp_path_factory):
    """`folder("bitmap")`: a compressed tiny Llama in bfloat16. Not to be written to."""
    made = {}

    def make(layout, family="llama"):
        if (layout, family) not in made:
            options, quantization = RECIPES[layout]
            recipe = secateur.Recipe(
                **options,
                quantization={**quantization},
                calibration=secateur.Calibration(str(text_file), 8, 32),
            )
            out = tmp_path_factory.mktemp(layout) / "packed"
            secateur.compress(str(model_of(family, dtype=torch.bfloat16)), out, recipe)
            made[layout, family] = out
        return made[layout, family]

    return make


@pytest.fixture
def says(says, monkeypatch):
    """The same with quick measurements, and a table that is wide enough for them."""
    monkeypatch.setattr(bench_file, "bench", quick)
    monkeypatch.setenv("COLUMNS", "200")
    return says


@pytest.fixture
def fails(says):
    """Run a command that must fail with this exit code and one line on standard error; the line."""

    def run(code, *args):
        found, out, err = says(*args)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err.removeprefix("error: ").removesuffix("\n")

    return run


def weight_bytes(layout, parts, O, I):
    """What a backend of the CPU holds of a weight, counted from the tensors in the file."""

    def groups(stored):
        return -(-stored // GROUP)

    start = 8 * (O + 1)
    if layout in ("bitmap", "nm"):
        return 2 * len(parts["compressed"].flatten()) + PADDING + O * I // 8 + start
    if layout == "sparse-int":
        # All but the shape are kept as they are; rows are found by their first byte, their length and their first group.
        mask_OI = torch.tensor([[byte >> i & 1 for byte in row for i in range(8)] for row in parts["bitmask"].tolist()])
        stored_O = mask_OI[:, :I].sum(1).tolist()
        codes = sum(-(-stored * BITS // 8) for stored in stored_O)
        return codes + PADDING + O * I // 8 + 2 * start + 4 * O + 3 * sum(map(groups, stored_O))
    codes = O * I * BITS // 8 + PADDING + start
    if layout == "packed-int":
        return codes + 3 * O * groups(I)  # 16 bits for the scale, 8 for the zero point
    outliers = len(parts["outlier_value"])
    assert outliers > 0
    order = 4 * I if "order" in parts else 0
    tiles = -(-O // 16)
    return codes + O * groups(I) + 8 * tiles * groups(I) + 4 * (O + 1) + 6 * outliers + order


@pytest.mark.thin(2)
@has_cpu
@pytest.mark.parametrize("layout", RECIPES)
def test_figures(layout, folder):
    found = quick(str(folder(layout)), tokens=(1, 3))
    assert {case.shape: case.linears for case in found.cases} == SHAPES
    assert len(found.cases) == 2 * len(SHAPES)
    assert found.chosen == {"cpu": 14}
    assert found.fallback is None
    assert (found.backend, found.device, found.dtype, found.threads) == ("auto", "cpu", "bfloat16", 1)
    tensors = load_file(folder(layout) / "model.safetensors")
    expected = {}
    for name in {key.partition(".weight.")[0] for key in tensors if ".weight." in key}:
        parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{name}.weight.")}
        O, I = parts["shape"].tolist()
        expected.setdefault((O, I), []).append(weight_bytes(layout, parts, O, I))
    for case in found.cases:
        O, I = case.shape
        assert case.layout["layout"] == layout
        moved = 2 * case.tokens * (O + I)
        assert case.bytes == round(sum(expected[O, I]) / len(expected[O, I])) + moved
        assert case.dense_bytes == 2 * O * I + moved
        assert all(math.isfinite(t) and t > 0 for t in (case.seconds, case.dense_seconds))
        assert case.bandwidth == case.bytes / case.seconds
        assert case.speed_up == case.dense_seconds / case.seconds
        assert found.utilization(case) == case.bandwidth / found.copy_bandwidth
        assert not case.cached
    for total, T in zip(found.totals, (1, 3), strict=True):
        assert total.tokens == T
        seconds = sum(SHAPES[case.shape] * case.seconds for case in found.cases if case.tokens == T) / T
        assert total.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_other_backends_and_dtypes(backend, folder):
    found = quick(str(folder("bitmap")), backend, dtype="float32")
    assert found.chosen == {backend: 14}
    assert found.dtype == "float32"
    for case in found.cases:
        assert case.dense_bytes == 4 * (math.prod(case.shape) + sum(case.shape))
        assert (case.bytes == case.dense_bytes) == (backend == "dense")


def test_transposed_weights_are_output_by_input(folder):
    found = quick(str(folder("nm", "gpt2")), "torch")
    assert {case.shape: case.linears for case in found.cases} == {(96, 32): 2, (32, 32): 2, (64, 32): 2, (32, 64): 2}


def test_layouts_are_apart_and_dense_linears_left_out(folder, tmp_path):
    mixed = shutil.copytree(folder("nm"), tmp_path / "mixed")
    model = secateur.load(mixed, "dense").model
    tensors = load_file(mixed / "model.safetensors")
    config = json.loads((mixed / "config.json").read_text())
    down, up = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "up"))
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith((down, up))}
    W_OI = model.layers[0].mlp.down_proj.weight.detach()
    tensors |= {f"{down}.weight.{part}": tensor for part, tensor in Bitmap().pack(W_OI).items()}
    tensors[f"{up}.weight"] = model.layers[0].mlp.up_proj.weight.detach()
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    modules = config["quantization_config"]["modules"]
    config["quantization_config"]["modules"] = {down: {"layout": "bitmap"}, **modules}
    (mixed / "config.json").write_text(json.dumps(config))
    found = quick(str(mixed), "torch")
    assert {(case.layout["layout"], case.shape): case.linears for case in found.cases} == {
        **{("nm", shape): count for shape, count in SHAPES.items()},
        ("nm", (64, 32)): 3,
        ("nm", (32, 64)): 1,
        ("bitmap", (32, 64)): 1,
    }


def test_threads_are_put_back(folder):
    assert quick(str(folder("bitmap")), "torch", threads=2).threads == 2
    assert torch.get_num_threads() == 1


def test_little_memory(folder, monkeypatch, says):
    monkeypatch.setattr(bench_file, "free_bytes", lambda device: 1)
    found = quick(str(folder("bitmap")), "torch")
    assert all(case.cached for case in found.cases)
    assert sum(case.linears for case in found.cases) == 14
    code, out, _ = says("bench", folder("bitmap"), "--backend", "torch")
    assert code == 0
    assert "%*" in out
    assert "* out of the cache" in out


# --- its parts


def test_describe():
    assert describe({"layout": "bitmap"}) == "bitmap"
    assert describe({"layout": "nm", "n": 2, "m": 4}) == "nm 2:4"
    codes = {"layout": "packed-int", "bits": 4, "group_size": 64, "dtype": "bfloat16"}
    assert describe(codes) == "packed-int, 4 bits, groups of 64"
    assert describe({"layout": "sparse-int", "codes": codes}) == "sparse-int, codes: packed-int, 4 bits, groups of 64"
    assert describe({**codes, "symmetric": True, "tile_rows": 16}).endswith("groups of 64, symmetric, tile rows 16")
    assert describe({**codes, "symmetric": False}) == describe(codes)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_every_form_of_weight_is_counted():
    ten, four = torch.zeros(10, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    packed = SparseWeight((2, 8), ten, four, four)
    # What is in both of its forms is in memory once.
    assert nbytes(TritonWeight((2, 8), {"values_V": ten, "zero": None}, {"BITS": 4}, packed)) == 14
    sparse = SparseSemiStructuredTensorCUSPARSELT(torch.Size((32, 32)), ten, None, None, None, None)
    assert nbytes(sparse) == 10
    assert nbytes(ten) == 10


def test_copies_of_a_form_of_its_own_lie_elsewhere(monkeypatch):
    class Own(type(BACKENDS["torch"])):
        def prepare(self, weight, device, dtype):
            return {"weight": weight, "values": weight.values_V}

        def linear(self, weight, x_TI, bias_O):
            return super().linear(weight["weight"], x_TI, bias_O)

    monkeypatch.setitem(BACKENDS, "own", type("_", (Own,), {"name": "own"})())
    weights = [load_sparse(64, 64, seed=seed)[0] for seed in (1, 2)]
    for backend in ("own", "torch", "dense"):
        rotation = bench_file._Rotation(weights, backend, CPU, torch.float32)
        found = [ready.weight for ready in rotation.ready]
        if backend != "dense":
            found = [(weight["weight"] if backend == "own" else weight).values_V for weight in found]
        assert len({tensor.data_ptr() for tensor in found}) == len(found) > len(weights)
        assert all(torch.equal(tensor, found[i % 2]) for i, tensor in enumerate(found))
        assert sum(map(nbytes, found)) > 2**18 / 2
        assert len({W_OI.data_ptr() for W_OI in rotation.dense}) == len(rotation.dense) == 2**19 // (4 * 64 * 64)


def test_calls_are_made_round_and_round():
    made = []
    cases = [[partial(made.append, name) for name in names] for names in ("abc", "xy")]
    samples = time_in_turn(cases, CPU, 0.0)
    assert [len(each) for each in samples] == [7, 7]
    assert all(seconds > 0 for each in samples for seconds in each)
    for names in ("abc", "xy"):
        own = [name for name in made if name in names]
        assert own == [names[i % len(names)] for i in range(11)]  # 4 to warm up
    # Then one of each in turn.
    assert all((a in "abc") != (b in "abc") for a, b in pairwise(made[8:]))


def test_the_machine():
    assert cache_bytes(CPU) >= 2**15
    assert free_bytes(CPU) > 2**20
    copy, moved = large_copy(CPU)
    assert bool((copy() == 1).all())
    assert moved == 2 * copy().nbytes == 4 * 2**18


# --- the command


@has_cpu
def test_table(folder, says):
    code, out, err = says("bench", folder("sparse-int"), "--tokens", "1,2")
    assert (code, err) == (0, "")
    assert out.count("sparse-int, codes: packed-int, 3 bits, groups of 16") == 1
    assert all(sum(line.split()[:1] == ["{}×{}".format(*shape)] for line in out.splitlines()) == 2 for shape in SHAPES)
    assert all(len(line) <= 80 for line in out.splitlines() if "×" in line)
    assert "backend auto chose cpu for 14 linears" in out
    assert " GB/s, read and written, with 1 thread\n" in out
    assert "all linears: " in out
    assert "all linears, 2 tokens at a time: " in out
    assert says("bench", folder("sparse-int"), "--quiet") == (0, "", "")


def test_json(folder, says, tmp_path):
    file = tmp_path / "figures.json"
    args = ("bench", folder("packed-int"), "--backend", "torch", "--tokens", "2")
    code, out, _ = says(*args, "--json", file)
    assert code == 0
    assert "backend torch for 14 linears" in out
    written = json.loads(file.read_text())
    code, out, err = says(*args, "--json", "-")
    assert (code, err) == (0, "")
    for found in (written, json.loads(out)):
        assert found.keys() == {
            "model", "backend", "device", "dtype", "threads", "copy_bandwidth", "cases", "fallback", "chosen", "totals",
            "decoding", "product_flops", "streamed", "transfers",
        }  # fmt: skip
        assert found["model"] == str(folder("packed-int"))
        assert found["chosen"] == {"torch": 14}
        (total,) = found["totals"]
        assert total.keys() == {"tokens", "seconds", "dense_seconds", "speed_up"}
        for case in found["cases"]:
            assert case.keys() == {
                "layout", "shape", "linears", "backend", "tokens", "seconds", "dense_seconds", "bytes", "dense_bytes", "kept",
                "cached", "bandwidth", "utilization", "speed_up",
            }  # fmt: skip
            assert case["layout"]["bits"] == BITS
            assert case["tokens"] == 2
            assert case["utilization"] == pytest.approx(case["bandwidth"] / found["copy_bandwidth"])
        assert {tuple(case["shape"]): case["linears"] for case in found["cases"]} == SHAPES


def test_plot(folder, says, tmp_path):
    pytest.importorskip("matplotlib")
    png, svg = tmp_path / "figures.png", tmp_path / "figures.svg"
    for file in (png, svg):
        args = ("bench", folder("nm"), "--backend", "torch", "--tokens", "1,2", "--quiet", "--plot", file)
        assert says(*args) == (0, "", "")
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_without_compiled_kernels_auto_says_why(folder, says, monkeypatch):
    monkeypatch.setattr(cpu_backend, "missing", lambda: "its compiled kernels are not installed: reinstall")
    code, out, _ = says("bench", folder("bitmap"))
    assert code == 0
    assert "backend auto chose dense for 14 linears" in out
    assert "backend 'cpu' cannot be used: its compiled kernels are not installed: reinstall" in out


# --- what can go wrong


def test_a_backend_that_is_not_installed(folder, fails, monkeypatch):
    monkeypatch.setattr(cpu_backend, "missing", lambda: "its compiled kernels are not installed: reinstall")
    line = fails(2, "bench", folder("bitmap"), "--backend", "cpu")
    assert line.startswith("backend 'cpu' cannot be used: its compiled kernels are not installed: reinstall")
    assert line.endswith("use dense")


def test_backends_that_cannot_be_used(folder, fails):
    line = fails(2, "bench", folder("bitmap"), "--backend", "fast")
    assert line.startswith("backend 'fast' is not known: it can be auto, ")
    line = fails(2, "bench", folder("nm"), "--backend", "cuda-2:4")
    assert line == "backend 'cuda-2:4' cannot be used: it needs a CUDA device, not cpu: use auto or dense"
    line = fails(2, "bench", folder("bitmap"), "--backend", "cuda-2:4")
    assert "the weight has no N:M pattern, and it takes 2:4 only" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float64"], "--dtype 'float64' is not known: it can be auto, bfloat16, float16, float32"),
        (["--device", "nonsense"], "--device nonsense cannot be used here: "),
        (["--tokens", "1,x"], "--tokens '1,x' is not understood: give whole numbers, such as 1,16"),
        (["--tokens", ""], "--tokens is empty: give a value"),
        (["--tokens", "0"], "--tokens 0: there must be at least one number, and all at least 1"),
        (["--plot", "figures.pdf"], "--plot figures.pdf: the file must end in .png or .svg"),
        (
            ["--plot", "/no/such/folder/a.png"],
            "--plot /no/such/folder/a.png cannot be written: there is no folder /no/such/folder",
        ),
        (["--json", "/no/such/folder/a.json"], "--json /no/such/folder/a.json cannot be written: "),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense(options, message, folder, fails):
    assert fails(2, "bench", folder("bitmap"), *options).startswith(message)


def test_a_plot_without_matplotlib(folder, fails, monkeypatch, tmp_path):
    monkeypatch.setattr("secateur.report.bench_plot.find_spec", lambda name: None)
    line = fails(2, "bench", folder("bitmap"), "--plot", tmp_path / "a.png")
    assert line == "--plot needs matplotlib, which is not installed: pip install 'secateur[plots]'"


def test_models_that_have_nothing_to_measure(model_of, fails):
    line = fails(2, "bench", model_of("llama"))
    assert line.startswith(f"{model_of('llama')} has no linears packed by secateur to measure: make them by")
    assert fails(2, "bench", "./nothing").startswith("no such model: ")


def test_damage_is_named(folder, tmp_path):
    damaged = shutil.copytree(folder("packed-int"), tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight.codes"
    save_file({**tensors, key: tensors[key][:-1]}, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight cannot be read .*'packed-int'"):
        quick(str(damaged))


def test_no_tokens(folder):
    with pytest.raises(UsageError, match="there must be at least one number"):
        quick(str(folder("bitmap")), tokens=())
