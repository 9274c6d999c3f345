"""The wheel in a bare virtual environment: no compiler, no sources, and maybe another torch than the one it was built with.

`make release` has the files that it made tried here, in the folder SECATEUR_DIST; otherwise they are made first. Its torch has
the version of this one, or the one that OTHER_TORCH names, such as 2.14.1. The environment is kept in the cache of pytest.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from smollm2 import ROOT
from tiny import make_source

import secateur

pytestmark = pytest.mark.slow
TORCH = os.environ.get("OTHER_TORCH") or torch.__version__.partition("+")[0]
TRY = """
import sys, torch, secateur
from secateur.kernels.cpu.cpu_backend import missing
from secateur.kernels.expand import HAVE_NATIVE
assert torch.__version__.startswith(sys.argv[3]), torch.__version__
assert missing() is None, missing()
assert HAVE_NATIVE
recipe = secateur.Recipe(quantize="rtn", quantization={"bits": 4, "group_size": 4})
secateur.compress(sys.argv[1], sys.argv[2], recipe)
secateur.generate(sys.argv[2], "a b", max_new_tokens=2, backend="cpu")
print(sorted(secateur.bench(sys.argv[2], "cpu", tokens=[1, 16], seconds=0.01).chosen))
"""


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that has an sdist and a wheel, the latter made of the former as pip makes it."""
    if made := os.environ.get("SECATEUR_DIST"):
        return Path(made)
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("tree") / "tree"
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=source)
    wheel = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", *wheel, next(folder.glob("*.tar.gz")))
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (found,) = dist.glob("*.whl")
    return found


def test_the_wheel_has_kernels_and_no_sources(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"secateur-{secateur.__version__}-cp310-abi3-")
    compiled = (
        "secateur/kernels/_cpu.abi3.so",
        "secateur/kernels/_expand.abi3.so",
        "secateur/solvers/_viterbi.abi3.so",
    )
    assert set(compiled) <= set(names)
    assert [name for name in names if name.endswith((".c", ".cpp", ".h", ".inl")) or name.startswith("tests")] == []
    assert {"secateur/py.typed", "secateur/report/page/page.js", "secateur_pytest.py"} <= set(names)
    assert any(name.startswith("secateur/recipes/builtin/") for name in names)


def test_the_sdist_has_sources_tests_and_docs(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "secateur/kernels/cpu/ops.cpp",
        "secateur/kernels/_expand.c",
        "secateur/solvers/_viterbi.c",
    }
    wanted |= {
        "tests/test_wheel.py",
        "tests/conftest.py",
        "docs/index.md",
        "benchmarks/README.md",
        "examples/sweep.ipynb",
    }
    assert wanted - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


def test_a_bare_environment_has_packed_tokens_without_a_compiler(request, wheel, tmp_path):
    bare = Path(request.config.cache.mkdir("bare")) / f"torch-{TORCH}"
    python, ready = bare / "bin" / "python", bare / "ready"
    env = {"PATH": "/nothing", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    if not ready.exists():
        run(sys.executable, "-m", "venv", "--clear", bare)
        run(python, "-m", "pip", "install", "--quiet", f"torch=={TORCH}")  # alone first: the build that the index has
        ready.touch()
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", wheel)
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    source = make_source(tmp_path / "model")
    said = run(python, "-c", TRY, source, tmp_path / "out", TORCH, cwd=tmp_path, env=env)
    assert said.splitlines()[-1] == "['cpu']"
    assert secateur.verify(tmp_path / "out") == []
