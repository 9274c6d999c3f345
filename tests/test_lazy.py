"""`import secateur` loads nothing that is large, and transformers knows the quantizer in whatever order both are imported."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest

import secateur

ROOT = Path(secateur.__file__).parent.parent


def run(code, *args):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_importing_it_loads_nothing_that_is_large():
    run("""
        import sys
        import secateur
        assert not {"torch", "transformers", "rich", "typer"} & set(sys.modules)
        assert "compress" in dir(secateur)
        assert secateur.UsageError.exit_code == 2
        assert "torch" not in sys.modules
    """)


def test_loading_a_model_imports_its_own_layout_alone(packed_of):
    """Importing others took longer than reading a small model did."""
    found = run(
        """
        import sys
        import secateur
        secateur.load(sys.argv[1], "torch")
        print(*sorted(name for name in sys.modules if name.startswith("secateur.")))
        """,
        packed_of("llama", "bitmap"),
    ).split()
    assert "secateur.formats.layouts.bitmap" in found
    absent = ("packed_int", "columns", "trellis", "gguf_", "teal", "rsparse", "streaming", "column_weight", "low_rank")
    assert [name for name in found if name.rpartition(".")[2].startswith(absent)] == ["secateur.folder.gguf_header"]
    foreign = [name.rpartition(".")[2] for name in found if name.startswith("secateur.foreign.")]
    assert foreign == ["format", "quick_gguf"]


def test_every_name_is_there():
    for name in secateur.__all__:
        assert getattr(secateur, name) is getattr(secateur, name)
    assert set(secateur.__all__) <= set(dir(secateur))
    everything = {}
    exec("from secateur import *", everything)
    assert set(secateur.__all__) <= set(everything)
    homes = [name for names in secateur._HOMES.values() for name in names]
    assert sorted([*homes, "__version__"]) == sorted(secateur.__all__)
    with pytest.raises(AttributeError, match="module 'secateur' has no attribute 'nothing'"):
        _ = secateur.nothing


_OPEN = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.hf_quantizer).__name__ == "SecateurQuantizer"
assert AUTO_QUANTIZER_MAPPING["secateur"] is type(model.hf_quantizer)
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("secateur")]
print(type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__.startswith("Packed"))
"""


@pytest.mark.parametrize(
    "first",
    [
        "import secateur\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport secateur",
        # As the first, with more of transformers before, or of secateur between the two.
        *(
            pytest.param(f"{first}\nfrom transformers import AutoModelForCausalLM", marks=pytest.mark.slow)
            for first in ("import transformers\nimport secateur", "import secateur.runs.compress")
        ),
    ],
    ids=str,
)
def test_transformers_knows_the_quantizer(first, packed_of):
    folder = packed_of("llama", "nm")
    if not first.startswith("import"):
        done = processes.script(first + _OPEN, folder)  # there, all of transformers is imported first
        assert done.stdout == "True\n", done.stderr
    else:
        assert run(first + _OPEN, folder).strip() == "True"


def test_an_import_that_fails_is_tried_again(tmp_path):
    """The action waits for the one that succeeds, and comes once; finding a module is not importing it."""
    (tmp_path / "flaky.py").write_text("import sys\nif not hasattr(sys, 'ready'):\n    raise ImportError('not yet')\n")
    run(
        """
        import importlib.util, sys
        sys.path.insert(0, sys.argv[1])
        from secateur.registration import when_imported
        done = []
        when_imported("flaky", lambda: done.append(1))
        when_imported("flaky", lambda: done.append(2))
        try:
            import flaky
        except ImportError:
            pass
        assert importlib.util.find_spec("flaky") is not None
        assert importlib.util.find_spec("no_such") is None
        assert done == []
        sys.ready = True
        import flaky
        assert sorted(done) == [1, 2]
        importlib.reload(flaky)
        assert sorted(done) == [1, 2]
        when_imported("flaky", lambda: done.append(3))
        assert done[-1] == 3
        """,
        tmp_path,
    )
