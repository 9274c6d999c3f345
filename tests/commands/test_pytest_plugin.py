"""The fixture `secateur_gate`, in a run of pytest inside this one."""

import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import reseal

import secateur
import secateur_pytest
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.baseline import Baseline, write_baseline

pytest_plugins = "pytester"


@pytest.fixture(scope="module")
def good(model_of, tmp_path_factory):
    """A tiny Llama at 50 %. Not to be written to."""
    out = tmp_path_factory.mktemp("plugin") / "good"
    secateur.compress(str(model_of("llama")), out, secateur.Recipe("magnitude", 0.5))
    return out


@pytest.fixture(scope="module")
def bad(good):
    """The same with a head that is far too sure."""
    out = Path(shutil.copytree(good, good.with_name("bad")))
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] *= 3
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    reseal(out)
    return out


@pytest.fixture
def project(pytester, good, text_file):
    """A folder with a baseline; `project(test)` runs pytest on a test there."""
    write_baseline(str(good), pytester.path / "baseline.json", Text(str(text_file), 24, 8))

    def run(test, *options):
        pytester.makepyfile(test)
        # In this process, where the plugin is loaded already: it must not be loaded by a second name.
        plugin = (
            () if any(e.value == "secateur_pytest" for e in entry_points(group="pytest11")) else ("secateur_pytest",)
        )
        return pytester.inline_run(*options, "-p", "no:cacheprovider", plugins=plugin)

    return run


def outcome(run):
    return tuple(len(reports) for reports in run.listoutcomes())


def test_it_is_an_entry_point():
    (entry,) = [entry for entry in entry_points(group="pytest11") if entry.name == "secateur"]
    assert entry.load() is secateur_pytest


def test_an_unchanged_checkpoint_passes(project, good):
    run = project(f"""
        def test_quality(secateur_gate):
            found = secateur_gate({str(good)!r}, "baseline.json")
            assert found.quality.windows == 8
    """)
    assert outcome(run) == (1, 0, 0)


def test_a_worse_one_fails_with_the_table(project, bad):
    run = project(f"""
        def test_quality(secateur_gate):
            secateur_gate({str(bad)!r}, "baseline.json")
    """)
    assert outcome(run) == (0, 0, 1)
    (failure,) = run.getfailures()
    told = str(failure.longrepr)
    assert told.startswith("### secateur gate: failed\n")
    assert "| ❌ | perplexity |" in told
    assert "| ✅ | size |" in told
    assert "Traceback" not in told


def test_limits_and_the_reference_are_passed_on(project, good, bad, model_of):
    run = project(f"""
        def test_lax(secateur_gate):
            secateur_gate({str(bad)!r}, "baseline.json", perplexity_rise="100000000000%")

        def test_divergence(secateur_gate):
            secateur_gate({str(good)!r}, "baseline.json", reference={str(model_of("llama"))!r}, max_kl=0.0)
    """)
    assert outcome(run) == (1, 0, 1)
    assert "| ❌ | kl |" in str(run.getfailures()[0].longrepr)


def test_a_text_must_be_the_baselines(project, good, text_file):
    run = project(f"""
        import pytest
        from secateur import UsageError
        from secateur.evaluation.eval_text import Text

        def test_same(secateur_gate):
            secateur_gate({str(good)!r}, "baseline.json", text=Text({str(text_file)!r}, 24, 8))

        def test_other(secateur_gate):
            with pytest.raises(UsageError, match="was measured with `windows` 8, not 9"):
                secateur_gate({str(good)!r}, "baseline.json", text=Text({str(text_file)!r}, 24, 9))

        def test_none(secateur_gate):
            with pytest.raises(UsageError, match="there is no baseline"):
                secateur_gate({str(good)!r}, "none.json")
    """)
    assert outcome(run) == (3, 0, 0)


def test_baselines_are_written_anew(project, pytester, bad, text_file):
    """The old one on its own windows, a new one on those that are named."""
    test = f"""
        from secateur.evaluation.eval_text import Text

        def test_quality(secateur_gate):
            assert secateur_gate({str(bad)!r}, "baseline.json").quality.windows == 8

        def test_new(secateur_gate):
            secateur_gate({str(bad)!r}, "new.json", text=Text({str(text_file)!r}, 16, 5))
    """
    assert outcome(project(test)) == (0, 0, 2)
    before = Baseline.read(pytester.path / "baseline.json")
    assert outcome(project(test, "--secateur-write")) == (2, 0, 0)
    after, new = (Baseline.read(pytester.path / name) for name in ("baseline.json", "new.json"))
    assert after.text == before.text
    assert after.per_window != before.per_window
    assert (new.text.seq_len, new.text.windows) == (16, 5)
    assert outcome(project(test)) == (2, 0, 0)


def test_a_baseline_without_a_text_is_of_the_windows_that_the_command_takes(project, pytester, good):
    """`docs`: too long for this model, which is said, and nothing is written."""
    run = project(
        f"""
        def test_quality(secateur_gate):
            secateur_gate({str(good)!r}, "new.json")
        """,
        "--secateur-write",
    )
    assert outcome(run) == (0, 0, 1)
    assert "windows of 512 tokens are longer than the model's 64 positions" in str(run.getfailures()[0].longrepr)
    assert not (pytester.path / "new.json").exists()


def test_pytest_starts_without_torch(pytester):
    """The plugin is imported at every start of pytest, in projects that use it in one test of a thousand."""
    pytester.makepyfile("""
        import sys

        def test_nothing():
            assert "torch" not in sys.modules
            assert "secateur_pytest" in sys.modules
    """)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)


def test_the_option_is_in_the_help(pytester):
    assert "--secateur-write" in pytester.runpytest_subprocess("--help").stdout.str()
