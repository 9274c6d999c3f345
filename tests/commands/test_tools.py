"""What a folder says of how to open it, and tools that are run so that they can."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import processes
import pytest
from transformers.utils import logging

import secateur
from secateur.checkpoint.card import write_card
from secateur.checkpoint.export import export
from secateur.runs import run_tool as tool

TASKS = Path(__file__).parents[1] / "tasks"
LOADS = """
import sys
from transformers import AutoModelForCausalLM
if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(sys.argv[2:], type(model.model.layers[0].mlp.up_proj).__mro__[1].__name__)
    sys.exit(7)
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """A tool that runs in this process is not to change it for other tests."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def installed(monkeypatch):
    """Make a function the console script `my-tool`."""

    def install(function):
        script = EntryPoint("my-tool", "my_tool:main", "console_scripts")
        monkeypatch.setattr(EntryPoint, "load", lambda self: function)
        monkeypatch.setattr(tool, "entry_points", lambda group, name: [script] if name == "my-tool" else [])

    return install


def test_a_file(packed_of, tmp_path, says):
    (tmp_path / "loads.py").write_text(LOADS)
    with secateur.backend("torch"):
        code, out, _ = says("run", tmp_path / "loads.py", packed_of("llama", "nm"), "--x", "-h", "--", "y")
    assert (code, out) == (7, "['--x', '-h', '--', 'y'] PackedLinear\n")


def test_a_module(packed_of, tmp_path, says, monkeypatch):
    for name in ("loads_module.py", "loads_package/__main__.py", "loads_package/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "__init__" in name else LOADS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("loads_module", "loads_package"):
        with secateur.backend("torch"):
            code, out, _ = says("run", "--", "-m", name, packed_of("llama", "nm"), "-m")
        assert (code, out) == (7, "['-m'] PackedLinear\n")


@pytest.mark.parametrize(
    ("result", "code", "said"),
    [(None, 0, ""), (3, 3, ""), ("no luck", 1, "no luck\n"), (SystemExit(4), 4, ""), (SystemExit("bad"), 1, "bad\n"),
     (SystemExit(), 0, ""), (KeyboardInterrupt(), 130, "")],
    ids=repr,
)  # fmt: skip
def test_a_console_script_and_its_exit_code(result, code, said, installed, says):
    def main():
        assert sys.argv[1:] == ["--model", "hf"]
        if isinstance(result, BaseException):
            raise result
        return result

    installed(main)
    found, _, err = says("run", "--", "my-tool", "--model", "hf")
    assert (found, err) == (code, said)


def test_errors_of_a_tool_are_its_own(installed, says):
    def main():
        raise RuntimeError("its own")

    installed(main)
    code, _, err = says("run", "my-tool")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("RuntimeError: its own\n")


def test_a_damaged_checkpoint_is_one_line(installed, packed_of, tmp_path, says):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in packed_of("llama", "nm").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layout_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))

    def main():
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(folder)

    installed(main)
    code, _, err = says("run", "my-tool")
    assert code == 1
    assert err.startswith("error: the checkpoint has layout version 99")
    assert err.count("\n") == 1


def test_what_cannot_be_run(says, tmp_path):
    for command, message in (
        (["no-such-tool"], "'no-such-tool' is neither a command of a package that is installed beside secateur"),
        (["-m", "no_such_module"], "there is no module 'no_such_module' that could be run"),
        (["-m", "json"], "there is no module 'json' that could be run"),
        (["-m"], "-m needs the name of a module"),
        (["sh"], "is not written in Python"),
    ):
        code, _, err = says("run", "--", *command)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    code, _, err = says("run")
    assert code == 2
    assert "missing argument" in err


def test_what_transformers_says_is_up_to_the_tool(installed, says, monkeypatch):
    found = []
    installed(lambda: found.append(logging.get_verbosity()))
    logging.set_verbosity_error()
    says("run", "my-tool")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    says("run", "my-tool")
    assert found == [logging.WARNING, logging.INFO]


def test_signals_do_what_they_do_to_a_tool(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text("import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    # What a shell starts in the background does not heed SIGINT.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    for number, code in {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM}.items():
        process = processes.Process.of_code(f"{start}; from secateur.cli import main; main()", "run", script)
        process.wait_for("ready\n", "stdout")
        process.send_signal(number)
        done = process.end(timeout=60)
        assert (done.returncode, done.stdout) == (code, "ready\n"), done.stderr


@pytest.mark.slow
def test_lm_eval(packed_of, tmp_path):
    """Its own command, on a folder that it could not open by itself."""
    pytest.importorskip("lm_eval")
    arguments = [
        *("--model", "hf", "--model_args", f"pretrained={packed_of('llama', 'packed-int')}", "--device", "cpu"),
        *("--include_path", str(TASKS), "--tasks", "secateur_words", "--output_path", str(tmp_path / "out")),
    ]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "secateur", "run", "--", "lm_eval", "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TASKS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "secateur_words" in done.stdout


def card(folder):
    return (folder / "README.md").read_text()


def matter_of(library, begin="license: unknown\n"):
    return f"---\n{begin}tags:\n- secateur\nlibrary_name: {library}\npipeline_tag: text-generation\n---\n"


def test_every_folder_says_how_to_open_it(packed_of, tmp_path):
    packed = packed_of("llama", "packed-int")
    text = card(packed)
    assert text.startswith(f"{matter_of('secateur')}# model, written by secateur\n\n```python\nimport secateur")
    assert "secateur run -- lm_eval" in text
    assert "secateur export FOLDER OUT --to dense" in text
    assert not secateur.verify(packed)
    code = text.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(packed))
    exec(code, found := {})
    assert type(found["model"]).__name__ == "LlamaForCausalLM"
    export(str(packed), tmp_path / "dense", "dense")
    text = card(tmp_path / "dense")
    assert "import secateur" not in text
    assert "every tool that reads Hugging Face folders" in text
    assert text.count("written by secateur") == 1
    assert not secateur.verify(tmp_path / "dense")
    export(str(packed), tmp_path / "others", "compressed-tensors")
    assert "`compressed-tensors` is installed" in card(tmp_path / "others")


def test_the_card_of_the_source_is_kept_below(own_model, tmp_path):
    source = own_model("llama")
    matter, own = "---\nlicense: apache-2.0\n---\n", b"# Their model\n\n---\n\nWhat they say: \xff\n"
    (source / "README.md").write_bytes(matter.encode() + own)
    recipe = secateur.Recipe(prune="magnitude", sparsity=0.5)
    secateur.compress(str(source), tmp_path / "once", recipe)
    secateur.compress(str(tmp_path / "once"), tmp_path / "twice", recipe)
    for folder, name in (("once", "own-llama"), ("twice", "once")):
        found = (tmp_path / folder / "README.md").read_bytes()
        begin = matter_of("secateur", "license: apache-2.0\n")
        assert found.startswith(f"{begin}# {name}, written by secateur\n\n```python\nimport secateur".encode())
        assert found.endswith(own)
        assert found.count(b"written by secateur") == found.count(b"license: apache-2.0") == 1
        assert not secateur.verify(tmp_path / folder)
    (tmp_path / "twice" / "README.md").write_text("Other words")
    assert [problem.where for problem in secateur.verify(tmp_path / "twice")] == ["README.md"]


@pytest.mark.parametrize(
    "text", ["", "\n", "---\nnot closed", "---\r\na: b\r\n---\r\nText\r\n", "---", "Text without an end"]
)
def test_cards_of_all_kinds(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    write_card(tmp_path, "org/name", {"auto_map": {"AutoConfig": "x.Y"}})
    found = path.read_bytes().decode()
    begin = matter_of("transformers", ("a: b\n" if "a: b" in text else "") + "license: unknown\n")
    assert found.startswith(f"{begin}# name, written by secateur\n\n```python\nfrom transformers")
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in found
    assert found.strip().endswith(text.removeprefix("---\r\na: b\r\n---\r\n").strip())
    write_card(tmp_path, "org/name", {"auto_map": {"AutoConfig": "x.Y"}})
    assert path.read_bytes().decode() == found
