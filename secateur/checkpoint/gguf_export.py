"""`export --to gguf`: a file that llama.cpp and what is built on it open.

A converter makes a dense file, or there is one of the same model already. Which of its rows are which of ours is told by what
is in them; our codes then take their place. Groups lie along inputs, so that rows may be in any order, and stacked.

R: rows of a tensor, I: weights of a row.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoint.converter import convert, find_converter
from secateur.checkpoint.gguf_types import AUTO, check_type, rounded
from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError, UsageError
from secateur.folder.paths import check_named, scratch_folder
from secateur.foreign.gguf_blocks import write_blocks
from secateur.foreign.gguf_codes import blocks_of
from secateur.foreign.gguf_file import GGUFFile, check_package
from secateur.foreign.gguf_rows import Row, RowIndex
from secateur.formats.layouts.block_types import BLOCK_TYPES, BlockType, type_for
from secateur.model.source import Source, open_source
from secateur.model.structure import Linear, build_skeleton, find_blocks, is_transposed, weight_matrix
from secateur.model.vocabulary import EMBEDDINGS, HEAD, Table, find_tables
from secateur.model.weights import ModelWeights

# Tables of tokens are of another type than the linears, as llama.cpp's quantizer has it.
_TABLES = {EMBEDDINGS: "token_embd.weight", HEAD: "output.weight"}
_BETTER = "Q6_K"
_FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GGUFOptions:
    """How a GGUF file is made.

    Attributes:
        type: of the linears: `auto` (codes stay as they are, in the type that holds them), or the name of a type that all of
            them get; those whose codes are of none that it holds are rounded again.
        embeddings: of the table of tokens and the head; `auto` keeps codes, and leaves in 16 bits what has none.
        converter: see `find_converter`.
        like: a GGUF file of the same model, in place of the converter.
    """

    type: str = AUTO
    embeddings: str = AUTO
    converter: str | Path | None = None
    like: str | Path | None = None


def export_gguf(
    source: Source,
    out: str | Path,
    options: GGUFOptions,
    overwrite: bool,
    write_dense: Callable[[Path], Any],
    progress: Callable[[str], None],
) -> list[str]:
    """Write a model as a GGUF file.

    Args:
        source: the model, of which a GGUF file keeps its codes.
        out: the file.
        options: how.
        overwrite: whether `out` may be replaced, if it is a GGUF file.
        write_dense: writes the model as a dense folder.
        progress: told the name of each tensor that has codes.

    Returns:
        What a user should know of it.

    Raises:
        SecateurError: an option makes no sense, the model has a layout that GGUF has no type for, the converter is missing or
            fails, or the file cannot be written.
    """
    wanted, tables = check_type("type", options.type), check_type("embeddings", options.embeddings)
    check_package("writing a GGUF file")
    out = _free(out, overwrite)
    like = source.files[0] if options.like is None and source.folder is None else options.like
    converter = find_converter(options.converter) if like is None else []
    skeleton = build_skeleton(source, source.dtype)
    weights = ModelWeights(source, skeleton)
    linears, coded = find_blocks(skeleton).linears, _coded_tables(skeleton, weights)
    _check_layouts(linears, weights)
    with scratch_folder(out, ".secateur-gguf-") as scratch, torch.no_grad():
        if like is None:
            write_dense(scratch / "dense")
            convert(converter, scratch / "dense", scratch / "base.gguf", source.dtype, source.name)
            base, same = scratch / "base.gguf", open_source(str(scratch / "dense"))
        else:
            base = Path(like)
            same = open_source(str(like), dtype=source.dtype)
        theirs = ModelWeights(same, skeleton)
        parts = _Parts(skeleton, linears, coded, weights, theirs, wanted, tables, progress)
        if like is not None:
            parts.check_same(base)
        file = GGUFFile(base)
        parts.find(file, source.dtype, None if like is None else base)
        made = scratch / "made.gguf"
        file.copy(made, parts.change)
        _put_in_place(made, out, overwrite)
    return parts.notes()


def _free(out: str | Path, overwrite: bool) -> Path:
    check_named(out, "OUT")
    place = Path(os.path.realpath(out))
    if place.suffix != ".gguf":
        raise UsageError(f"{out} does not end in .gguf: `to='gguf'` makes a file, and that is how such files are known")
    if not place.exists():
        return place
    if not place.is_file():
        raise UsageError(f"{out} is not a file: choose another name")
    with place.open("rb") as stream:
        ours = stream.read(4) == b"GGUF"
    if not ours:
        raise UsageError(f"{out} exists, and is no GGUF file: choose another name")
    if not overwrite:
        raise UsageError(f"{out} exists already: choose another name, or give `overwrite` to replace it")
    return place


def _put_in_place(made: Path, out: Path, overwrite: bool) -> None:
    _free(out, overwrite)  # another run may have made it meanwhile
    made.replace(out)


def _coded_tables(skeleton: nn.Module, weights: ModelWeights) -> dict[str, Table]:
    """The tables that have codes, by what files call them: a tied head may be there under its own name, too."""
    found = {}
    for role, table in find_tables(skeleton).items():
        if table.weight in weights and weights.packed(table.weight) is not None:
            names = _TABLES.values() if table.twins else [_TABLES[role]]
            found.update(dict.fromkeys(names, table))
    return found


def _check_layouts(linears: Mapping[str, Linear], weights: ModelWeights) -> None:
    """Raise UsageError where linears are stored without their zeros, or with a part of low rank."""
    for module in linears:
        name = f"{module}.weight"
        packed = weights.packed(name) if name in weights else None
        if packed is not None and packed.layout.name == "low-rank":
            raise UsageError(
                f"{module} has a part of low rank (layout 'low-rank'), for which GGUF has no type: `to='dense'` writes any "
                "model, and llama.cpp's converter takes that"
            )
        if packed is not None and (not packed.layout.rounded or packed.layout.name == "sparse-int"):
            raise UsageError(
                f"{module} is stored without its zeros (layout {packed.layout.name!r}), for which GGUF has no type: "
                "`to='dense'` writes any model, and llama.cpp's converter takes that, zeros and all"
            )


@dataclass(frozen=True)
class _Stored:
    """A linear as a file has it: its rows, their type, and whether its codes were rounded once more."""

    rows_OB: Tensor
    kind: str
    again: bool = False


@dataclass
class _Parts:
    """What the tensors of a file become.

    Attributes:
        skeleton, linears: of the model.
        coded: its tables with codes, by what files call them.
        ours: its weights.
        theirs: those of the model that the file was made of: the same, but for linears where it is another file's.
        wanted, tables: types of linears, and of embeddings and head.
        progress: told of each tensor that has codes.
    """

    skeleton: nn.Module
    linears: Mapping[str, Linear]
    coded: dict[str, Table]
    ours: ModelWeights
    theirs: ModelWeights
    wanted: str
    tables: str
    progress: Callable[[str], None]
    file: GGUFFile | None = None
    rows: dict[str, list[Row]] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def check_same(self, like: Path) -> None:
        """Raise UsageError where a file is not of this model: what compressing leaves alone is another."""
        coded = {name for table in self.coded.values() for name in (table.weight, *table.twins)}
        for name in self.skeleton.state_dict():
            if name.removesuffix(".weight") in self.linears or name in coded or name not in self.ours:
                continue
            own = self.ours[name]
            if name not in self.theirs or not torch.equal(own, self.theirs[name].to(own.dtype)):
                raise UsageError(f"{like} is not of the same model: {name} is another: give `like` one that is")

    def find(self, file: GGUFFile, dtype: torch.dtype, like: Path | None) -> None:
        """Find our linears in the file, and raise CheckpointError where one with codes is not there; tables, too.

        Args:
            like: the file, where nobody made it of our weights: whose tables are others.
        """
        self.file = file
        index = RowIndex()
        for module, linear in self.linears.items():
            if f"{module}.weight" in self.theirs:
                index.add(module, self._matrix(self.theirs, module, linear).to(dtype))
        placed = set()
        for name in file:
            if len(file.shape(name)) < 2 or not name.startswith("blk."):
                continue
            found = index.find(file.values(name).to(dtype))
            if found is not None:
                self.rows[name] = found
                placed |= {module for module, _ in found}
        for name in [name for name in self.coded if name in file]:
            there, theirs = file.values(name).to(dtype), self.theirs[self.coded[name].weight].to(dtype)
            if there.shape == theirs.shape and torch.equal(there, theirs):
                continue
            if like is not None:
                raise CheckpointError(f"{name} of {like} is not as the model has it: leave `like` out")
            del self.coded[name]  # padded, or in another order: it is rounded again, if at all
        lost = [m for m in self.linears if m not in placed and f"{m}.weight" in self.ours]
        if lost:
            raise CheckpointError(
                f"{len(lost)} linears are not in the converted file as they are in the model, such as {lost[0]}: "
                "`to='dense'` writes any model"
            )

    def change(self, name: str) -> tuple[Tensor, str] | None:
        """What takes the place of a tensor: rows of bytes and their type, or None: it stays."""
        assert self.file is not None
        if name in self.rows:
            return self._linear(name, self.rows[name])
        return self._table(name) if name in _TABLES.values() else None

    def _linear(self, name: str, rows: list[Row]) -> tuple[Tensor, str] | None:
        modules = list(dict.fromkeys(module for module, _ in rows))
        if self.wanted == AUTO and all(self._untouched(module) for module in modules):
            return None
        stored = {module: self._stored(module, self.wanted) for module in modules}
        kinds = {each.kind for each in stored.values()}
        if len(kinds) > 1:  # experts that lie in one tensor have one type: the widest
            widest = max(kinds, key=lambda kind: BLOCK_TYPES[kind].bits_per_weight if kind in BLOCK_TYPES else 32)
            stored = {module: self._stored(module, widest) for module in modules}
        for each in stored.values():
            self.again[each.kind] += each.again
            self.replaced[each.kind] += self.wanted not in (AUTO, each.kind)
        kind = stored[modules[0]].kind
        if kind in BLOCK_TYPES:
            self.progress(name)
        return torch.stack([stored[module].rows_OB[row] for module, row in rows]), kind

    def _untouched(self, module: str) -> bool:
        """Whether a linear is dense, and what the file has of it."""
        name = f"{module}.weight"
        return self.ours.packed(name) is None and torch.equal(
            self.ours[name], self.theirs[name].to(self.ours[name].dtype)
        )

    def _stored(self, module: str, wanted: str) -> _Stored:
        """A linear as a file has it: in a type that is wanted, or one in its place."""
        linear, weight = self.linears[module], self._codes(module)
        if wanted not in (AUTO, *BLOCK_TYPES) or (weight is None and wanted == AUTO):
            return self._floats(module, linear)
        form = None if wanted == AUTO else type_for(wanted, weight_matrix(linear).shape[1])
        if wanted != AUTO and form is None:
            return self._floats(module, linear)
        blocks = None if weight is None else blocks_of(weight, None if form is None else form.name)
        if blocks is not None:
            return _Stored(write_blocks(blocks), blocks.type)
        if form is None:
            raise UsageError(
                f"{module} has codes that no type of GGUF holds: give `type`, such as Q4_K, to have them rounded once more, or "
                "`to='dense'`"
            )
        W_OI = self._matrix(self.ours, module, linear)
        return _Stored(write_blocks(rounded(W_OI.float(), form)), form.name, weight is not None)

    def _codes(self, module: str) -> Quantized | None:
        """The codes of a linear; None where it is dense, or its codes are others' and known only by what they stand for."""
        packed = self.ours.packed(f"{module}.weight")
        try:
            return None if packed is None else packed.layout.read(self.ours.parts(f"{module}.weight"))
        except ValueError:
            return None

    def _floats(self, module: str, linear: Linear) -> _Stored:
        W_OI = self._matrix(self.ours, module, linear)
        return _Stored(W_OI.contiguous().view(torch.uint8), _FLOAT_TYPES[W_OI.dtype])

    def _table(self, name: str) -> tuple[Tensor, str] | None:
        """A table of tokens: of the type that is asked for, or with the codes that it has."""
        assert self.file is not None
        table, form = self.coded.get(name), self._form_of_table(self.file.shape(name)[-1])
        if table is not None:
            self.progress(name)
            return self._coded_table(table, form)
        if form is None or self.file.type(name) == form.name:
            return None
        return write_blocks(rounded(self.file.values(name), form)), form.name

    def _form_of_table(self, features: int) -> BlockType | None:
        """None: 16 bits."""
        kind = self.tables
        if kind == AUTO and self.wanted != AUTO:
            least = BLOCK_TYPES[self.wanted].bits_per_weight
            kind = _BETTER if least < BLOCK_TYPES[_BETTER].bits_per_weight else self.wanted
        return None if kind == AUTO else type_for(kind, features)

    def _coded_table(self, table: Table, form: BlockType | None) -> tuple[Tensor, str]:
        codes = self._codes(table.name)
        asked = form.name if form is not None and self.tables != AUTO else None
        blocks = None if codes is None else blocks_of(codes, asked)
        if blocks is not None:
            return write_blocks(blocks), blocks.type
        W_VI = self.ours[table.weight]
        if form is None:
            self.said.append(
                f"{table.name} has codes that no type of GGUF holds, and is in 16 bits: `embeddings` Q8_0 rounds them once more"
            )
            return W_VI.contiguous().view(torch.uint8), _FLOAT_TYPES[W_VI.dtype]
        self.said.append(f"{table.name} had other codes and is rounded once more, as {form.name}")
        return write_blocks(rounded(W_VI.float(), form)), form.name

    @staticmethod
    def _matrix(weights: ModelWeights, module: str, linear: Linear) -> Tensor:
        W = weights[f"{module}.weight"]
        return W.T.contiguous() if is_transposed(linear) else W

    def notes(self) -> list[str]:
        """What a user should know."""
        return [
            *self.said,
            *(
                f"{count} linears had other codes and are rounded once more, as {kind}"
                for kind, count in (+self.again).items()
            ),
            *(
                f"{count} linears are {kind}, since blocks of {self.wanted} do not divide their rows"
                for kind, count in (+self.replaced).items()
            ),
        ]
