"""`export`: the same weights in another form, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur._version import __version__
from secateur.errors import UsageError
from secateur.formats.bitmap import Bitmap
from secateur.formats.hf import quantization_config
from secateur.formats.layout import Layout
from secateur.formats.nm import NMBits
from secateur.formats.packed import DecodedWeights
from secateur.formats.reader import read_json
from secateur.formats.writer import MANIFEST_NAME, ShardWriter, staged_folder, write_manifest
from secateur.pipeline.source import Source, open_source, save_config
from secateur.pipeline.structure import Linear, block_linears, build_skeleton, find_blocks, generalise, is_transposed
from secateur.pipeline.weights import ModelWeights

FORMS = ("dense", "secateur")


def export(
    model: str,
    out: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a model as another folder with the same weights.

    Args:
        model: what `compress` takes too.
        out: the folder to make.
        to: `dense`, which every tool reads; or `secateur`: packed linears keep their layout (an old one of
            compressed-tensors becomes the same one of ours), dense ones become `bitmap` where that is smaller.
        overwrite: whether `out` may be replaced.
        trust_remote_code: whether code that comes with the model may run.
        progress: told the name of each block.

    Raises:
        SecateurError: the model cannot be read, the form is unknown or the folder cannot be written.
    """
    if to not in FORMS:
        raise UsageError(f"--to {to!r} is not known: it can be {' or '.join(FORMS)}")
    with staged_folder(Path(out), overwrite) as folder, torch.no_grad():
        source = open_source(model, trust_remote_code)
        skeleton = build_skeleton(source, source.dtype)
        weights = ModelWeights(source, skeleton)
        prefix, blocks = find_blocks(skeleton)
        linears: dict[str, Linear] = {}
        for i, block in enumerate(blocks):
            linears.update(block_linears(block, f"{prefix}.{i}"))
        writer = ShardWriter(folder)
        entries: dict[str, dict[str, Any]] = {}
        for name in skeleton.state_dict():
            if name not in weights:
                continue
            module = name.removesuffix(".weight")
            layout = _layout(source, weights, name) if to == "secateur" and module in linears else None
            if layout is None:
                writer.add(weights.name_to_write(name), weights[name].clone())
                continue
            progress(module)
            transposed = is_transposed(linears[module])
            W_OI = weights[name].T if transposed else weights[name]
            entries[module] = {**layout.to_config(), **({"transposed": True} if transposed else {})}
            for part, tensor in layout.pack(W_OI.contiguous()).items():
                writer.add(f"{name}.{part}", tensor)
        for name in weights.unused:
            writer.add(name, weights.stored(name).clone())
        writer.finish()
        absent = set(linears) - set(entries)
        quantization = quantization_config(generalise(entries, prefix, absent)) if entries else None
        save_config(source.config, folder, source.dtype, quantization)
        source.write_companions(folder)
        write_manifest(folder, _manifest(source, to))


def _layout(source: Source, weights: ModelWeights, name: str) -> Layout | None:
    """The layout for a linear's weight, or None where it is smaller as it is."""
    packed = (
        source.weights.packed.get(weights.name_in_files(name)) if isinstance(source.weights, DecodedWeights) else None
    )
    if packed is not None:
        return packed.layout if isinstance(packed.layout, NMBits) else Bitmap()
    weight = weights[name]
    packed_bits = torch.count_nonzero(weight).item() * 8 * weight.element_size() + weight.numel()
    return Bitmap() if packed_bits < 8 * weight.nbytes else None


def _manifest(source: Source, to: str) -> dict[str, Any]:
    """How the weights came about, if the source knows, and that they were exported."""
    known = {}
    if source.folder is not None and (source.folder / MANIFEST_NAME).exists():
        known = read_json(source.folder / MANIFEST_NAME)
        known.pop("files", None)
    exported = {"to": to, "from": source.name, "sha256": source.hashes(), "secateur": __version__}
    return {**known, "exported": exported}
