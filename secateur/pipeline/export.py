"""`export`: the same weights in another form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._version import __version__
from secateur.errors import UsageError
from secateur.formats.manifest import MANIFEST_NAME
from secateur.formats.reader import read_json
from secateur.formats.writer import ShardWriter, assemble, staged_folder, write_manifest
from secateur.pipeline.forms import FORMS, Form
from secateur.pipeline.source import Source, open_source, save_config
from secateur.pipeline.structure import build_skeleton, find_blocks
from secateur.pipeline.weights import ModelWeights, converted


def export(
    model: str,
    out: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a model as another folder.

    Args:
        model: what `compress` takes too.
        out: the folder to make.
        to: `dense`, which every tool reads; `secateur`: packed linears keep their layout (a sparse one of compressed-tensors
            becomes the same one of ours), dense ones become `bitmap` where that is smaller; `compressed-tensors`: integer
            codes of 4 or 8 bits as `pack-quantized`, with the same weights to the bit; `spqr`: for the package spqr_quant.
        overwrite: whether `out` may be replaced.
        trust_remote_code: whether code that comes with the model may run.
        progress: told the name of each packed linear.

    Raises:
        SecateurError: the model cannot be read or written in this form, the form is unknown or the folder cannot be written.
    """
    if to not in FORMS:
        raise UsageError(f"--to {to!r} is not known: it can be {', '.join(FORMS)}")
    form: Form = FORMS[to]()
    with staged_folder(Path(out), overwrite) as folder, torch.no_grad():
        source = open_source(model, trust_remote_code)
        skeleton = build_skeleton(source, source.dtype)
        weights = ModelWeights(source, skeleton)
        blocks = find_blocks(skeleton)
        linears = blocks.linears
        writer = ShardWriter(folder)

        def write_dense(stored_name: str, name: str, tensor: Tensor) -> None:
            writer.add(stored_name, converted(name, tensor, form.dtype, "--to dense keeps them"))

        for name in skeleton.state_dict():
            if name not in weights:
                continue
            module = name.removesuffix(".weight")
            linear = linears.get(module) if module != name else None
            parts = form.pack(module, linear, weights) if linear is not None else None
            if parts is None:
                write_dense(weights.name_to_write(name), name, weights[name])
                continue
            progress(module)
            for part, tensor in parts.items():
                writer.add(part, tensor)
        for name in weights.unused:
            write_dense(name, name, weights.stored(name))
        writer.flush()
        assemble(writer.files, folder, folder)
        save_config(source.config, folder, form.dtype or source.dtype, form.config(skeleton, blocks.lists, linears))
        source.write_companions(folder)
        write_manifest(folder, _manifest(source, to, weights.unused))


def _manifest(source: Source, to: str, unused: list[str]) -> dict[str, Any]:
    """How the weights came about, if the source knows, and that they were exported."""
    known = {}
    if source.folder is not None and (source.folder / MANIFEST_NAME).exists():
        known = read_json(source.folder / MANIFEST_NAME)
        known.pop("files", None)
    exported = {"to": to, "from": source.name, "sha256": source.hashes, "secateur": __version__}
    return {**known, "unused": unused, "exported": exported}
