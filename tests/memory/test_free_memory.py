"""Free memory within the limits of a container, of both versions of control groups."""

import psutil
import pytest
import torch

from secateur.memory.free_memory import free_memory
from secateur.speed.timing import free_bytes

MiB = 2**20
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture
def system(tmp_path):
    """`system(membership, {folder: (limit, used, cache)}, files)`: a root of a file system with these groups."""

    def make(membership, groups, files):
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/cgroup").write_text(membership)
        for name, (limit, used, cache) in groups.items():
            folder = tmp_path / "sys/fs/cgroup" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / files[0]).write_text(f"{limit}\n")
            (folder / files[1]).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{files[2]} {cache}\nactive_file 3\n")
        return tmp_path

    return make


V1_LINES = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "groups", "files", "free"),
    [
        # A container of version 2, which sees its own group as the root.
        ("0::/\n", {"": (10 * MiB, 6 * MiB, MiB)}, V2, 5 * MiB),
        # A service: its own group, and one around it that is tighter.
        ("0::/user.slice/app\n", {"user.slice/app": (9 * MiB, MiB, 0), "user.slice": (4 * MiB, MiB, 0)}, V2, 3 * MiB),
        ("0::/user.slice/app\n", {"user.slice/app": (2 * MiB, MiB, 0), "user.slice": ("max", MiB, 0)}, V2, MiB),
        # A container that is told the host's name of its group.
        ("0::/kubepods/pod1\n", {"": (8 * MiB, 2 * MiB, 0)}, V2, 6 * MiB),
        ("0::/../..\n", {"": (8 * MiB, 2 * MiB, 0)}, V2, 6 * MiB),
        # More in use than is allowed from now on.
        ("0::/\n", {"": (MiB, 6 * MiB, 0)}, V2, 0),
        (V1_LINES, {"memory/docker/abc": (7 * MiB, 4 * MiB, MiB), "memory": (2**63 - 4096, 9 * MiB, 0)}, V1, 4 * MiB),
        (V1_LINES, {"memory": (7 * MiB, 4 * MiB, MiB)}, V1, 4 * MiB),
    ],
)
def test_a_limit_is_kept_to(system, membership, groups, files, free):
    assert free_memory(system(membership, groups, files)) == free


@pytest.mark.parametrize(
    ("membership", "groups", "files"),
    [
        ("0::/\n", {"": ("max", 6 * MiB, 0)}, V2),
        ("0::/\n", {}, V2),
        ("0::/\n", {"": ("nonsense", 6 * MiB, 0)}, V2),
        ("0::/\n", {"": (MiB, "", 0)}, V2),
        ("", {"": (MiB, MiB, 0)}, V2),
        ("nonsense\n\n::\n", {}, V2),
        (V1_LINES, {"memory": (2**63 - 4096, 9 * MiB, 0)}, V1),
        ("4:cpu:/docker/abc\n", {"memory/docker/abc": (MiB, 0, 0)}, V1),
    ],
)
def test_without_a_limit_it_is_what_the_machine_has(system, membership, groups, files, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 123 * MiB}))
    assert free_memory(system(membership, groups, files)) == 123 * MiB


def test_the_machine_may_have_less_than_the_limit(system, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 3 * MiB}))
    assert free_memory(system("0::/\n", {"": (10 * MiB, MiB, 0)}, V2)) == 3 * MiB


def test_a_system_without_groups(tmp_path):
    assert 0 < free_memory(tmp_path) <= psutil.virtual_memory().total
    assert free_memory() > 0


def test_who_asks(monkeypatch, says, model_of, tmp_path):
    """`plan` and `bench`; how `compress` chooses by it is in test_memory.py."""

    for module in ("runs.forecast", "speed.timing", "memory.footprint"):
        monkeypatch.setattr(f"secateur.{module}.free_memory", lambda: 123 * MiB)
    assert free_bytes(torch.device("cpu")) == 123 * MiB
    _, stdout, _ = says("plan", model_of("llama"), "--quantize", "rtn", "-q")
    assert "129.0 MB" in stdout
