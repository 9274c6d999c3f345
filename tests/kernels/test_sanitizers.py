"""The compiled kernels under the address and undefined-behaviour sanitizers, on buffers that are not a byte too long."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "secateur" / "kernels" / "cpu"
CXX = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O1", "-g", "-Wno-unknown-pragmas", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux" or CXX is None, reason="needs a C++ compiler on Linux"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}")
    if subprocess.run([CXX, *FLAGS, "empty.cpp", "-o", "empty"], cwd=folder, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    sources = [file for file in sorted(KERNELS.glob("*.cpp")) if not file.stem.endswith("ops")]
    sources.append(ROOT / "tests" / "native" / "check_kernels.cpp")
    subprocess.run([CXX, *FLAGS, f"-I{KERNELS}", *map(str, sources), "-o", "check"], cwd=folder, check=True)
    return folder / "check"


def test_kernels_stay_inside_their_buffers_and_agree(program):
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("plain C++\n")
    assert done.stdout.endswith("all agree\n")


def test_without_padding_they_would_not(program):
    """So the test above can fail."""
    done = subprocess.run([program, "unpadded"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
