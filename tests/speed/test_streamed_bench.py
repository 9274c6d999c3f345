"""`bench` of a model that memory does not hold."""

import json
import math

import pytest

import secateur
from secateur.errors import UsageError
from secateur.folder.extents import find_extents
from secateur.model import streaming

SECONDS = 0.01


@pytest.fixture
def folder(packed_of, monkeypatch):
    monkeypatch.setattr(streaming, "room_here", lambda *_: 0)
    return packed_of("llama", "bitmap")


def test_steps_read_every_byte_of_the_blocks(folder):
    found = secateur.bench(str(folder), max_memory="1GiB", tokens=(1, 3), seconds=SECONDS)
    [file] = folder.glob("*.safetensors")
    names = {name: extent.size for name, extent in find_extents(file).items() if ".layers." in name}
    blocks = sum(size for name, size in names.items() if not name.endswith(".shape"))
    assert [each.tokens for each in found.streamed] == [1, 3]
    for each in found.streamed:
        assert each.bytes_read == blocks
        assert each.bytes_copied == 0
        of_disk, of_bus = found.shares(each)
        assert 0 < of_disk < math.inf
        assert of_bus == 0
    assert found.cases == ()
    assert found.transfers.disk > 0
    assert json.loads(json.dumps(found.to_dict()))["streamed"][1]["tokens"] == 3


def test_on_the_command_line(folder, says, tmp_path):
    code, out, err = says("bench", folder, "--max-memory", "1GiB", "--tokens", "1,2", "--json", tmp_path / "bench.json")
    assert (code, err) == (0, "")
    assert "of disk" in out
    assert "without computing the same reader gives" in out
    assert "of bus" not in out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["copy_bandwidth"] is None
    assert len(found["streamed"]) == 2
    code, _, err = says("bench", folder, "--max-memory", "1GiB", "--plot", tmp_path / "bench.svg")
    assert code == 2
    assert "--plot shows linears in memory" in err


def test_what_fits_is_said(packed_of):
    with pytest.raises(UsageError, match="all of the model fits into `max_memory`"):
        secateur.bench(str(packed_of("llama", "bitmap")), max_memory="64GiB")
