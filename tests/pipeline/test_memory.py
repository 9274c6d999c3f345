"""What a run takes in memory: counted while it computes, foretold before, and kept to a limit."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import mixtures
import processes
import pytest
import torch
from conftest import config_of
from methods import prune as prune_by
from methods import reconstruct

import secateur
from secateur.core.patterns import parse_pattern
from secateur.core.stats import InputStats, Level
from secateur.errors import SecateurError, UsageError
from secateur.memory.footprint import Footprint, Group, Polynomial, Settings
from secateur.memory.live_bytes import LiveBytes
from secateur.memory.room import limit_memory
from secateur.unfinished.hidden import HiddenStates
from secateur.units import enough, parse_size, words

CPU = torch.device("cpu")
MiB = 2**20


# --- counting


def test_what_is_alive_is_counted():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = torch.zeros(256)
        assert live.now == 1024
        view = a[10:].view(2, 123)
        view += before[:246].view(2, 123)
        assert live.now == 1024, "views and what was there before take nothing"
        b = a + 1
        assert live.now == 2048
        del a, view
        assert live.now == 1024
        del b
        assert (live.now, live.peak) == (0, 2048)


def test_what_operators_return_together_is_counted():
    with LiveBytes() as live:
        values, places = torch.rand(64).sort()
        assert live.now == 64 * 4 + 64 * 8
        del values
        assert live.now == 64 * 8
    assert places.numel() == 64


@pytest.mark.parametrize("prune", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_solving_leaves_nothing_alive(prune):
    W_OI, x_TI = torch.randn(48, 64), torch.randn(200, 64)
    stats = InputStats.empty(64, Level.GRAM)
    stats.add(x_TI)
    with LiveBytes() as live:
        prune_by(prune, W_OI, stats, parse_pattern(None, 0.5), (48,))
        stats.forget()  # what the next solve would share
        # Nor is there a cycle of references that keeps it until the next collection.
        assert live.now == 0
    assert live.peak >= W_OI.nbytes


def test_sparsegpt_needs_three_matrices_besides_the_gram_matrix():
    W_OI, x_TI = torch.randn(8, 512), torch.randn(600, 512)
    stats = InputStats.empty(512, Level.GRAM)
    stats.add(x_TI)
    with LiveBytes() as live:
        prune_by("sparsegpt", W_OI, stats, parse_pattern(None, 0.5), (8,))
    assert live.peak < 3.3 * stats.upper().nbytes


def test_alps_and_reconstruction_need_few_matrices_of_the_weights(monkeypatch):
    """Most of what they compute with is of some rows at a time."""
    monkeypatch.setattr("secateur.solvers.conjugate_gradients._LEAST_ROWS", 64)
    monkeypatch.setattr("secateur.solvers.conjugate_gradients._PIECE", 64 * 96)
    W_OI, x_TI = torch.randn(2048, 96), torch.randn(300, 96)
    stats = InputStats.empty(96, Level.GRAM)
    stats.add(x_TI)
    for pattern, most in ((parse_pattern("2:4", None), 5), (parse_pattern(None, 0.5), 7)):
        with LiveBytes() as live:
            keep_OI = prune_by("alps", W_OI, stats, pattern, (2048,)).keep_OI
        assert live.peak < most * W_OI.nbytes
    with LiveBytes() as live:
        reconstruct(W_OI, keep_OI, stats)
    assert live.peak < 5 * W_OI.nbytes


# --- sizes in words


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 * 2**29),
        ("2000000", 2_000_000),
        ("64 KiB", 65536),
        ("7b", 7),
    ],
)
def test_sizes_are_understood(text, size):
    assert parse_size(text, "`max_memory`") == size


@pytest.mark.parametrize("text", ["", "GiB", "8 bananas", "-1GB", "1e9", "8GiBs", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match=re.escape(f"`max_memory` {text!r} is not a size: write it like 8GB")):
        parse_size(text, "`max_memory`")


@pytest.mark.parametrize(("given", "limit"), [("2 KiB", 2048), (5, 5), (None, None)])
def test_what_is_freed_is_given_back_under_a_limit_only(given, limit, monkeypatch):
    told = []
    monkeypatch.setattr("secateur.memory.room.return_freed", lambda: told.append("return it"))
    assert limit_memory(given) == limit
    assert told == ([] if limit is None else ["return it"])


def test_sizes_in_words():
    assert [words(n) for n in (5, 2048, 3e6, 4.5e9)] == ["5 B", "2.0 kB", "3.0 MB", "4.50 GB"]


def test_what_is_said_to_be_enough_is():
    for size in (5, 2048, 1_000_001, 123_456_789, 4_567_890_123):
        said = parse_size(enough(size), "it")
        assert size <= said <= 1.1 * size + 100


@pytest.mark.parametrize(("linear", "square"), [(3, 0), (5, 2), (0, 1)])
def test_two_points_tell_a_polynomial(linear, square):
    points = [(n, linear * n + square * n * n) for n in (8, 32)]
    found = Polynomial.through(points)
    assert found(500) == pytest.approx(linear * 500 + square * 500**2)
    assert Polynomial.through(points[:1])(16) == pytest.approx(2 * points[0][1])


# --- choosing


@pytest.fixture
def need():
    """Of a run over 64 windows of 128 tokens."""
    return Footprint(
        base=100 * MiB,
        mapped=10 * MiB,
        outside=20 * MiB,
        embeddings=0,
        block=50 * MiB,
        written=25 * MiB,
        hidden=4096,
        forward=Polynomial(40_000, 0),
        groups=(Group(Polynomial(20_000, 0), 5 * MiB, 30 * MiB),),
        tokens=64 * 128,
        seq_len=128,
        device="cpu",
    )


def test_the_fastest_way_that_fits_is_chosen(need):
    chosen = []
    limit = 2**40
    while True:
        try:
            settings = need.choose(limit, None, None)
        except UsageError as error:
            least = parse_size(re.search(r"needs? ([\d.]+ \w+) at least", str(error)).group(1), "--max-memory")
            break
        assert need.peaks(settings)[0] <= limit
        if settings not in chosen:
            chosen.append(settings)
        limit = need.peaks(settings)[0] - 1
    assert chosen[0] == Settings(2048, True, "device")
    assert chosen[-1] == Settings(128, False, "file")
    assert [(s.pause, s.hidden) for s in chosen] == sorted(
        ((s.pause, s.hidden) for s in chosen), key=lambda s: (not s[0], s[1])
    )
    need.choose(least + MiB, None, None)
    with pytest.raises(UsageError, match=r"`max_memory` .* is too little for this run, which needs"):
        need.choose(least - MiB, None, None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_and_what_is_outside_them_are_not_there_together(need, device):
    need, settings = replace(need, device=device), Settings(128, False, "device")
    within = need.peaks(settings)[0]
    assert within >= need.base + need.mapped + need.written
    assert replace(need, outside=0).peaks(settings)[0] == within
    assert replace(need, outside=2**40).peaks(settings)[0] == need.base + need.mapped + 2**40


def test_what_is_freed_half_way_is_there_still_without_a_limit(need):
    """Of linears whose windows hold 4 and 8 KiB a token, what is kept is the first's and what a batch took on its way."""
    groups = [Group(Polynomial(size, 0), 0, 0) for size in (4096, 8192)]
    need, settings = replace(need, groups=tuple(groups), outside=0), Settings(128, True, "device")
    outside = need.base + need.mapped + need.written
    running, live = 128 * 40_000, need.block + need.tokens * 8192 + 128 * 40_000
    assert need.peaks(settings) == (int(outside + 1.15 * live), 0)
    kept = replace(need, keeps=True).peaks(settings)[0]
    assert kept == outside + live + need.tokens * 4096 + running
    # Less than the margin is no more than the margin; where nothing stands half way, all was given back; GPUs keep otherwise.
    little = replace(need, keeps=True, block=2**32)
    assert little.peaks(settings) == replace(little, keeps=False).peaks(settings)
    alone = replace(need, keeps=True, groups=(Group(Polynomial(0, 0), 0, 2**30),))
    assert alone.peaks(settings) == replace(alone, keeps=False).peaks(settings)
    on_device = replace(need, keeps=True, device="cuda")
    assert on_device.peaks(settings) == replace(on_device, keeps=False).peaks(settings)


def test_on_a_gpu_the_host_holds_no_more_than_what_waits_there(need):
    need = replace(need, device="cuda")
    within = need.base + need.mapped + need.written
    assert need.peaks(Settings(128, False, "device"))[0] == within
    assert need.peaks(Settings(128, False, "host"))[0] == within + need.tokens * need.hidden


def test_without_a_limit_nothing_is_refused(need, monkeypatch):
    monkeypatch.setattr("secateur.memory.footprint.free_memory", lambda: 1)
    assert need.choose(None, None, None) == Settings(128, False, "file")


def test_batches_that_were_asked_for_are_kept(need):
    assert {settings.batch_tokens for settings in need.choices(300)} == {300}


def test_on_a_gpu_hidden_states_may_wait_in_the_hosts_memory(need):
    need = replace(need, device="cuda")
    ways = list(dict.fromkeys((s.pause, s.hidden) for s in need.choices(None)))
    assert ways == [(True, "device"), (False, "device"), (False, "host"), (False, "file")]
    tight = need.peaks(Settings(128, False, "host"))[1]
    assert need.choose(2**40, tight, None) == Settings(128, False, "host")


# --- hidden states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_file", [False, True])
def test_hidden_states_are_kept_to_the_bit(in_file, dtype, tmp_path):
    batches = [torch.randn(n, 5, 6).to(dtype) for n in (3, 1, 2)]
    kept = HiddenStates(CPU, tmp_path / "here" if in_file else None)
    for batch in batches:
        kept.append(batch)
    assert len(kept) == 3
    file = tmp_path / "here" if in_file else tmp_path / "saved"
    digest = kept.save(file)
    assert file.read_bytes() == b"".join(batch.view(torch.uint8).numpy().tobytes() for batch in batches)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    again = HiddenStates.open(file, kept)
    if not in_file:
        file.unlink()
    for i in (2, 0, 1):
        assert torch.equal(again.read(i), batches[i])
        assert torch.equal(kept.read(i), batches[i])
        assert torch.equal(kept.take(i), batches[i])


def test_hidden_states_that_are_not_finite_are_noticed(tmp_path):
    kept = HiddenStates(CPU, tmp_path / "file")
    kept.append(torch.zeros(1, 2, 3))
    assert kept.finite
    kept.append(torch.tensor([[[1.0, float("inf"), 0.0]]]))
    kept.append(torch.zeros(1, 2, 3))
    assert not kept.finite


def test_a_file_of_hidden_states_that_is_cut_off(tmp_path):
    kept = HiddenStates(CPU, tmp_path / "file")
    kept.append(torch.zeros(4, 5, 6))
    (tmp_path / "file").write_bytes(bytes(100))
    with pytest.raises(SecateurError, match="has 100 bytes, and 480 are needed"):
        HiddenStates.open(tmp_path / "file", kept)
    with pytest.raises(SecateurError, match="ends too early"):
        kept.read(0)


# --- whole runs


@pytest.fixture(scope="module")
def middling(build, tmp_path_factory):
    """A model large enough that its weights and activations are to be seen beside the interpreter."""
    config = config_of(
        "llama",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    return build(tmp_path_factory.mktemp("middling") / "model", config, torch.bfloat16, shard="4MB")


@pytest.mark.parametrize(
    ("prune", "more"),
    # The second block holds as much as the first, and its inputs besides: ALPS takes its time.
    [
        ("sparsegpt", 30),
        pytest.param("sparsegpt", 120, marks=pytest.mark.slow),
        pytest.param("alps --targets *.1.*", 30, marks=pytest.mark.slow),
        pytest.param("sparsegpt --match-dense --damping auto", 30, marks=pytest.mark.slow),
    ],
)
def test_a_run_keeps_to_its_limit(prune, more, middling, text_file, tmp_path):
    options = [
        "--prune",
        *prune.split(),
        "--sparsity",
        "0.5",
        "--calibration",
        text_file,
        "--samples",
        32,
        "--seq-len",
        256,
    ]

    def run(limit):
        options_of_run = [*options, "--max-memory", limit, "--json", "--quiet", "--overwrite"]
        return processes.command("compress", middling, tmp_path / f"{limit}", *options_of_run)

    refused = run("100MB")
    assert refused.returncode == 2
    least = re.fullmatch(
        r"error: --max-memory 100.0 MB is too little for this run, which needs ([\d.]+) MB at least\n",
        refused.stderr,
    )
    assert least is not None, refused.stderr
    limit = int(float(least.group(1))) + more
    done = run(f"{limit}MB")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_bytes"] <= limit * 10**6


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        (
            {"prune": "wanda", "sparsity": 0.5, "calibration": secateur.Calibration(samples=3, seq_len=32)},
            "`calibration` docs",
        ),
        ({"quantize": "squeezellm"}, "`sensitivity` hessian"),
    ],
)
def test_what_needs_the_whole_model_is_refused_under_a_limit(options, instead, middling, text_file, tmp_path):
    calibration = secateur.Calibration(str(text_file), 4, 64)
    recipe = secateur.Recipe(**{"calibration": calibration, **options})
    with pytest.raises(
        UsageError, match=f"loads the model as a whole, and `max_memory` 21.0 MB is too little.*{instead}"
    ):
        secateur.compress(str(middling), tmp_path / "out", recipe, max_memory="20MiB")
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_in_memory_while_the_first_block_is_solved(own_model, text_file, tmp_path):
    model = own_model("llama", dtype=torch.bfloat16)
    seen = []

    def look(step):
        if step.linear is not None and step.block == 0:
            seen.append(str(model) in Path("/proc/self/maps").read_text())

    recipe = secateur.Recipe("wanda", 0.5, calibration=secateur.Calibration(str(text_file), 4, 16))
    secateur.compress(str(model), tmp_path / "out", recipe, progress=look)
    assert seen == [False] * 7


# --- foretelling


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "magnitude", "sparsity": 0.5},
        pytest.param({"prune": "wanda", "pattern": "2:4"}, marks=pytest.mark.slow),
        {"quantize": "gptq"},
        pytest.param({"quantize": "squeezellm"}, marks=pytest.mark.slow),
        {"quantize": "trellis"},
    ],
    ids=["magnitude", "wanda 2:4", "gptq", "squeezellm", "trellis"],
)
def test_the_size_on_disk_is_foretold(options, model_of, text_file, tmp_path):
    model = model_of("llama", num_hidden_layers=6)
    recipe = secateur.Recipe(**options, calibration=secateur.Calibration(str(text_file), 8, 32))
    told = secateur.forecast(str(model), recipe, out=tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == [], "nothing is left of measuring"
    report = secateur.compress(str(model), tmp_path / "out", recipe)
    assert told.disk == pytest.approx(report.bytes, rel=0.05)
    assert told.blocks == 6
    assert set(report.phases) == set(told.seconds)
    assert told.total_seconds == pytest.approx(sum(told.seconds.values()))
    assert all(seconds >= 0 for seconds in told.seconds.values())
    looks_at_text = options not in ({"prune": "magnitude", "sparsity": 0.5}, {"quantize": "squeezellm"})
    assert (told.settings is not None) == looks_at_text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name, options in {
            "deepseek_v3": {"prune": "wanda", "sparsity": 0.5},
            "nemotron_h": {"quantize": "rtn"},
        }.items()
        if mixtures.known([name])
    ],
    ids=str,
)
def test_blocks_of_each_kind_are_measured(name, options, text_file, build, tmp_path):
    """The first block has no experts, and is smaller than the others by far."""
    sizes = {"layers_block_type": ["mamba", "moe", "attention", "moe", "moe"], "num_hidden_layers": 5}
    sizes = sizes if name == "nemotron_h" else {"num_hidden_layers": 5}
    model = build(tmp_path / "model", mixtures.config_of(name, **sizes))
    recipe = secateur.Recipe(**options, calibration=secateur.Calibration(str(text_file), 8, 32))
    told = secateur.forecast(str(model), recipe, out=tmp_path / "not")
    report = secateur.compress(str(model), tmp_path / "out", recipe)
    assert told.disk == pytest.approx(report.bytes, rel=0.05)
    assert set(report.phases) == set(told.seconds)


def test_plan_on_the_command_line(says, model_of, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--prune", "sparsegpt", "--pattern", "2:4", "--calibration", text_file, "--samples", 8, "--seq-len", 32]
    code, out, err = says("plan", model_of("llama"), *options)
    assert code == 0, err
    for word in (
        "memory",
        "disk, new checkpoint",
        "time, solving",
        "time in all",
        "2 blocks",
        "batches of 2048 tokens pause",
    ):
        assert word in " ".join(out.split()), out
    code, out, _ = says("plan", model_of("llama"), *options, "--json", "--quiet")
    found = json.loads(out)
    assert found["settings"] == {"batch_tokens": 2048, "pause": True, "hidden": "device", "experts": 1}
    assert found["total_seconds"] > 0
    assert found["host"] > found["disk"] > 0
    code, out, err = says("plan", model_of("llama"), *options, "--max-memory", "50MB")
    assert code == 2
    assert "--max-memory 50.0 MB is too little" in err
    assert says("plan", model_of("llama"), "--max-memory", "lots", "--prune", "wanda")[0] == 2
    assert list(tmp_path.iterdir()) == []
