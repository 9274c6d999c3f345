"""Coverage-guided fuzzing of checkpoints, by atheris: `python tests/fuzz/checkpoint.py FOLDERS SCRATCH [libFuzzer's options]`.

FOLDERS holds sound tiny checkpoints (tests/formats/test_hostile.py makes them). What libFuzzer hands over decides how one of
them is changed, by the same rules as in the tests.
"""

import shutil
import sys
from pathlib import Path

import atheris

sys.path[:0] = map(str, Path(__file__).parents[1:3])
with atheris.instrument_imports(include=["secateur"]):
    from hostile import attempt, mutate


class Draw:
    def __init__(self, data):
        self.provider = atheris.FuzzedDataProvider(data)

    def number(self, low, high):
        return self.provider.ConsumeIntInRange(low, high)


def main():
    folders = sorted(file.parent for file in Path(sys.argv[1]).glob("*/secateur.json"))
    changed = Path(sys.argv[2]) / "changed"

    def once(data):
        draw = Draw(data)
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(folders[draw.number(0, len(folders) - 1)], changed)
        mutate(changed, draw)
        complaints = attempt(changed)
        assert not complaints, complaints

    for folder in folders:
        assert not attempt(folder), folder
    # Long inputs from the start: each change takes a dozen bytes, and several are made.
    atheris.Setup([sys.argv[0], "-len_control=0", "-max_len=256", *sys.argv[3:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
