"""The compiled kernels under the address and undefined-behaviour sanitizers, on buffers that are not a byte too long."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
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


SEARCHES = """
import ctypes, random, struct, sys
sys.path.insert(0, sys.argv[1])
import _viterbi
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
draw, count = random.Random(0), 0
for K in (2, 3, 4):
    for L in range(K, 13):
        for T in {-(-L // K), -(-L // K) + 1, L + 7, 31}:
            values = (draw.choice([draw.gauss(0, 1), draw.gauss(0, 1), 1e30, -1e30]) for _ in range(2 * T))
            x = struct.pack(f"{2 * T}f", *values)
            found = set()
            for isa in range(_viterbi.BEST_ISA + 1):
                buffers = [libc.malloc(size) for size in (8 * T, 2 * T, 8 * T)]
                ctypes.memmove(buffers[0], x, len(x))
                _viterbi.encode(isa, tuple(buffers), (0, 2, T), (K, L, min(T // 2, 8 * -(-L // K))))
                found.add(ctypes.string_at(buffers[1], 2 * T))
                count += 1
                for buffer in buffers:
                    libc.free(buffer)
            assert len(found) == 1
print(count)
"""


def test_the_search_for_trellis_codes_stays_inside_its_buffers(program, tmp_path):
    source = ROOT / "secateur" / "solvers" / "_viterbi.c"
    flags = [flag for flag in FLAGS if not flag.startswith("-std")]
    options = ["-shared", "-fPIC", *flags, "-DPy_LIMITED_API=0x030a0000", f"-I{sysconfig.get_paths()['include']}"]
    cc = os.environ.get("CC", "gcc")
    subprocess.run([cc, *options, str(source), "-o", str(tmp_path / "_viterbi.abi3.so")], check=True)
    found = [
        subprocess.check_output([cc, f"-print-file-name=lib{name}.so"], text=True).strip() for name in ("asan", "ubsan")
    ]
    env = {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own
    done = subprocess.run([sys.executable, "-c", SEARCHES, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100
