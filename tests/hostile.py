"""Checkpoints changed by somebody who wants no good, and what may come of them: an error that says what is wrong, or a model.

Run as a program it is a worker: it takes a folder a line and answers with the complaints about it, within a limit of memory.
"""

import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.errors import SecateurError
from secateur.folder.manifest import MANIFEST_NAME, seal
from secateur.folder.reader import INDEX_NAME, SINGLE_NAME
from secateur.plugin.packed_modules import packed_linears

# Far above what the tiny folders need, which have ten kilobytes, and far below what their numbers can ask for.
MEMORY = 512 * 2**20
SECONDS = 60
#: The end of a folder's name for which a worker asks for more than it may have.
GREEDY = "#greedy"

NUMBERS = [0, 1, 2, 3, 4, 7, 8, 9, 64, 128, 255, 2**16 - 1, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**53]
NUMBERS += [2**63 - 1, 2**63, 2**64 - 1, 10**30, -1, -8, -(2**31), -(2**63)]
VALUES = [
    *NUMBERS,
    0.5,
    1e9,
    1e308,
    float("nan"),
    float("inf"),
    None,
    True,
    False,
    "",
    "x",
    "../x",
    "/etc/hostname",
    "a\0",
]
VALUES += ["\ud800", "float16", "nm", [], {}, [1], [[1]], ["x"], {"x": 1}, {"layout": "bitmap"}, [2**40, 2**40]]
DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
]
DTYPES += ["F64", "I64", "U64", "F6_E2M3", "x", ""]
TORCH_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.int16,
    torch.uint16,
]
TORCH_DTYPES += [torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64, torch.complex64]


def mutate(folder, draw):
    """Change a sound folder in one way or a few. `draw.number(low, high)` decides."""
    for _ in range(draw.number(1, 3)):
        pick(
            draw, [change_header, change_tensor, change_tensor, change_config, change_config, change_bytes, change_json]
        )(folder, draw)

    if draw.number(0, 1):
        seal_again(folder)


def seal_again(folder):
    """Give the manifest the SHA-256 that it has to end in: whoever changes it can do that."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text())
        content["files"] = dict.fromkeys(content["files"], "")
        content.pop("sha256", None)
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return  # changed beyond that
    (folder / MANIFEST_NAME).write_bytes(seal(content))


def pick(draw, options):
    return options[draw.number(0, len(options) - 1)]


def read_header(folder):
    content = (folder / SINGLE_NAME).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def change_header(folder, draw):
    """What the header of the weights says, with the same bytes after it."""
    try:
        header, body = read_header(folder)
    except (OSError, ValueError, RecursionError):
        return  # changed before
    name = pick(draw, sorted(header))
    entry = header[name]
    if not isinstance(entry, dict):
        return  # changed before
    what = draw.number(0, 7)
    length = None
    if what == 0 and "dtype" in entry:
        entry["dtype"] = pick(draw, DTYPES)
    elif what == 1 and "shape" in entry:
        entry["shape"] = [pick(draw, NUMBERS) for _ in range(draw.number(0, 4))]
    elif what == 2 and "data_offsets" in entry:
        entry["data_offsets"][draw.number(0, 1)] = pick(draw, NUMBERS)
    elif what == 3:
        header[pick(draw, [*sorted(header), "x", "", "a\n\x1b[2J", name + ".shape"])] = header.pop(name)
    elif what == 4:
        header.pop(name)
    elif what == 5:
        header[name] = pick(draw, VALUES)
    elif what == 6:
        length = pick(draw, [number for number in NUMBERS if 0 <= number < 2**64])
    else:
        body = body[: draw.number(0, len(body))] + bytes(draw.number(0, 9))
    encoded = json.dumps(header).encode("utf-8", "surrogatepass")
    size = len(encoded) if length is None else length
    (folder / SINGLE_NAME).write_bytes(size.to_bytes(8, "little") + encoded + body)


def change_tensor(folder, draw):
    """One tensor for another, in a file that is sound as such."""
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_NAME).items()}
    except Exception:
        return  # changed before
    names = sorted(tensors)
    if not names:
        return
    name = pick(draw, names)
    old = tensors[name]
    what = draw.number(0, 7)
    if what == 0:
        tensors.pop(name)
    elif what == 1:
        tensors[name] = tensors[pick(draw, names)].clone()
    elif what == 2:
        tensors[pick(draw, [name + ".bitmask", name.rpartition(".")[0], name[1:], "model.x.weight.codes"])] = (
            old.clone()
        )
    elif what == 3 and old.dtype in (torch.int64, torch.int32, torch.uint16, torch.uint8) and old.numel():
        info = torch.iinfo(old.dtype)
        numbers = [number for number in NUMBERS if info.min <= number <= info.max]
        flat = old.view(-1).tolist()
        flat[draw.number(0, len(flat) - 1)] = pick(draw, numbers)
        tensors[name] = torch.tensor(flat, dtype=old.dtype).view(old.shape)
    else:
        shape = list(old.shape) or [1]
        axis = draw.number(0, len(shape) - 1)
        shape[axis] = max(
            0, min(64, pick(draw, [shape[axis] - 1, shape[axis] + 1, 0, 1, 2 * shape[axis], shape[axis]]))
        )
        shape = pick(draw, [shape, shape, shape[::-1], [*shape, 1], [1, *shape], [torch.Size(shape).numel()]])
        dtype = pick(draw, [old.dtype, old.dtype, *TORCH_DTYPES])
        fill = torch.Generator().manual_seed(draw.number(0, 255))
        size = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        content = torch.randint(0, 256, (size,), generator=fill, dtype=torch.uint8)
        if dtype == torch.bool:
            content &= 1
        tensors[name] = content.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def change_config(folder, draw):
    change_json(folder, draw, "config.json")


def change_json(folder, draw, name=None):
    """A value at any depth of a JSON file."""
    name = name or pick(
        draw, [MANIFEST_NAME, INDEX_NAME, "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
    )
    path = folder / name
    try:
        content = json.loads(path.read_text()) if path.exists() else {"weight_map": weight_map(folder)}
    except (ValueError, RecursionError):
        return  # changed before
    if draw.number(0, 30) == 0:
        depth = pick(draw, [100, 10_000, 1_000_000])
        path.write_text(pick(draw, ["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, ""]))
        return
    place = content
    while isinstance(place, dict | list) and place:
        key = pick(draw, sorted(place)) if isinstance(place, dict) else draw.number(0, len(place) - 1)
        if not isinstance(place[key], dict | list) or not place[key] or draw.number(0, 3) == 0:
            change_entry(place, key, draw)
            break
        place = place[key]
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


def change_entry(place, key, draw):
    what = draw.number(0, 5)
    if what == 0:
        place.pop(key)
    elif what == 1 and isinstance(place, dict):
        place[
            pick(draw, ["", "x", "*", "num_labels", "head_dim", "num_hidden_layers", "auto_map", "torch_dtype", "../x"])
        ] = place.pop(key)
    elif what == 2 and isinstance(place, dict):
        place[pick(draw, ["num_labels", "head_dim", "n_layers", "rope_scaling", "tie_word_embeddings", "a\0"])] = pick(
            draw, VALUES
        )
    else:
        place[key] = pick(draw, VALUES)


def weight_map(folder):
    try:
        return dict.fromkeys((name for name in read_header(folder)[0] if name != "__metadata__"), SINGLE_NAME)
    except (OSError, ValueError, RecursionError):
        return {}


def change_bytes(folder, draw):
    """A few bytes of any file."""
    path = pick(draw, sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    for _ in range(draw.number(1, 4) if content else 0):
        content[draw.number(0, len(content) - 1)] = draw.number(0, 255)
    path.write_bytes(content)


def attempt(folder):
    """What is wrong with how secateur takes such a folder: nothing, as far as tests go.

    It is verified, loaded unpacked and packed, and what has been loaded packed computes.
    """
    complaints = []
    problems = secateur.verify(folder)
    complaints += [f"verify: {p}" for p in problems if "cannot be checked" in str(p) or short_of_memory(str(p))]
    for backend in ("dense", "auto"):
        try:
            model = secateur.load(folder, backend)
            for _, linear in packed_linears(model):
                linear(torch.ones(1, linear.in_features, dtype=linear.dtype))
        except SecateurError as error:
            if "\n" in str(error) or short_of_memory(str(error)):
                complaints.append(f"load, {backend}: {error}")
        except Exception as error:
            complaints.append(f"load, {backend}: {type(error).__name__}: {error}")
    return complaints


def short_of_memory(text):
    return any(word in text.lower() for word in ("allocate", "memoryerror", "out of memory"))


class Worker:
    """A process that takes folders, so that crashes, hangs and hunger for memory are seen and survived."""

    def __init__(self, sample):
        self.sample = str(sample)
        self.process = None

    def start(self):
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(Path(secateur.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.sample], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        # On a busy machine, importing torch alone takes longer than a folder may.
        assert self.answer(10 * SECONDS) == []

    def answer(self, seconds=SECONDS):
        started = time.monotonic()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        self.stop()
        spent = time.monotonic() - started
        return [f"the process hung for {spent:.0f} s" if not ready else f"the process died: {self.process.returncode}"]

    def attempt(self, folder):
        """What `attempt` says, and whether the process lived through it."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        self.process.stdin.write(f"{folder}\n".encode())
        self.process.stdin.flush()
        return self.answer()

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def work(sample):
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    complaints = attempt(Path(sample))  # all that is imported and kept on first use
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print(json.dumps(complaints), file=answers, flush=True)
    for line in sys.stdin:
        folder = line.rstrip("\n")
        found = greed() if folder.endswith(GREEDY) else attempt(Path(folder))
        print(json.dumps(found), file=answers, flush=True)


def greed():
    """What is said when the limit of memory is met: a test of the tests."""
    try:
        return [f"{len(bytearray(2 * MEMORY))} bytes were to be had"]
    except MemoryError as error:
        return [type(error).__name__]


if __name__ == "__main__":
    work(sys.argv[1])
