"""`verify`: whether a checkpoint folder is what was written, and whether what was written can be true.

O: output features, I: input features.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, SecateurError, UsageError, one_line
from secateur.folder.entries import unsafe_entries
from secateur.folder.manifest import MANIFEST_NAME, Problem, check_files
from secateur.folder.paths import check_named
from secateur.folder.reader import (
    INDEX_NAME,
    StoredTensors,
    read_json,
    weight_files,
)
from secateur.formats.layouts.layout import Stored, describe_dense
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.formats.stored_weights import find_entry, is_pattern, parse_quantization_config
from secateur.gates.section import SECTION, parse_section
from secateur.mixture.experts import Piece
from secateur.model.limits import check_config
from secateur.model.located import conflicts, locate, part_of
from secateur.model.source import Source, open_folder, open_tokenizer
from secateur.model.structure import LINEARS, build_skeleton, is_transposed, weight_matrix
from secateur.model.vocabulary import find_tables
from secateur.plugin.gated import put_in_place

CONFIG_NAME = "config.json"


@dataclass
class Verification:
    """What `examine` found.

    Attributes:
        problems: the most important first: files that are not what they were, then what does not fit together, then values.
        files: how many the folder's manifest names, itself included.
        linears: how many were read, the table of embeddings and the head not counted.
    """

    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    linears: int = 0


def verify(folder: str | Path, *, trust_remote_code: bool = False) -> list[Problem]:
    """Check a checkpoint folder: every file against the manifest, and every tensor against the config and its layout.

    One linear is read at a time, and nothing is asked of any network.

    Args:
        folder: made by secateur.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        All that is wrong with it, the most important first: nothing, if it is sound.

    Raises:
        UsageError: there is no such folder.
    """
    return examine(folder, trust_remote_code=trust_remote_code).problems


def examine(folder: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """The same, and how much was looked at. Raises UsageError when there is no such folder."""
    check_named(folder, "OUT")
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UsageError(f"no such folder: {folder}")
    run = _Run(folder, trust_remote_code)
    with torch.no_grad():
        run.run()
    return run.found


@dataclass
class _Run:
    """One run: each step adds what it finds wrong, and those that need what is broken are left out."""

    folder: Path
    trust_remote_code: bool
    found: Verification = field(default_factory=Verification)
    manifest: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        self._try(MANIFEST_NAME, self._files)
        if any(unsafe_entries(self.folder)):
            return  # said already; nothing that leads out of the folder is opened
        source = self._open() if self._index() else None
        if source is not None:
            model = self._try(CONFIG_NAME, lambda: build_skeleton(source, source.dtype))
            if model is not None:
                self._try(CONFIG_NAME, lambda: self._weights(source, model))
        self._try("tokenizer", self._tokenizer)

    def _say(self, where: str, what: str) -> None:
        self.found.problems.append(Problem(where, what))

    def _try(self, where: str, step: Callable[[], Any]) -> Any:
        """What a step returns; or None, when it could not be done, and a problem."""
        try:
            return step()
        except SecateurError as error:
            self.found.problems.append(Problem.of(where, error, self.folder))
        except Exception as error:  # other people's code met something that it was not made for
            self._say(where, f"cannot be checked: {type(error).__name__}: {one_line(error)}")
        return None

    def _files(self) -> None:
        problems = list(check_files(self.folder))
        self.found.problems += problems
        if not any(problem.where == MANIFEST_NAME for problem in problems):
            self.manifest = read_json(self.folder / MANIFEST_NAME)
            self.found.files = len(self.manifest["files"]) + 1

    def _index(self) -> bool:
        """Whether all shards of an index can be opened. What the index says is in them is compared with what is."""
        if not (self.folder / INDEX_NAME).exists():
            return True
        files = self._try(INDEX_NAME, lambda: weight_files(self.folder))
        if files is None:
            return False
        there, sound = {}, True
        for file in files:
            stored = self._try(file.name, partial(StoredTensors, [file]))
            sound = sound and stored is not None
            there.update(dict.fromkeys(stored or (), file.name))
        said = read_json(self.folder / INDEX_NAME)["weight_map"]
        for name in sorted({*said, *there}) if sound else ():
            if said.get(name) != there.get(name):
                self._say(INDEX_NAME, f"says that {name!r} is in {said.get(name)}, but it is in {there.get(name)}")
        return sound

    def _open(self) -> Source | None:
        return self._try(self.folder.name, lambda: open_folder(str(self.folder), self.folder, self.trust_remote_code))

    def _tokenizer(self) -> None:
        config = self.folder / CONFIG_NAME
        if config.is_file():  # transformers reads it here, too
            check_config(self.folder, read_json(config))
        open_tokenizer(self.folder.name, self.folder, self.trust_remote_code)

    def _weights(self, source: Source, model: Any) -> None:
        located = locate(source.weights, model)
        names = located.stored
        for name in located.missing:
            self._say(name, "is missing: the model that config.json describes has it")
        known = self.manifest.get("unused")
        known = {name for name in known if isinstance(name, str)} if isinstance(known, list) else set()
        for name, other in conflicts(source.weights, names, model).items():
            self._say(
                name,
                f"is tied to {other} by {CONFIG_NAME}, but the files hold two different tensors: transformers 5 uses both, "
                f"earlier ones only {other}; set tie_word_embeddings to false in {CONFIG_NAME}",
            )
        used = set(names.values())
        for name in source.weights:
            if name not in used and name not in known and not _ignored(model, name):
                self._say(name, "is in the files, but in no module of the model that config.json describes")
        self._layouts(source, model, names)
        linears = self.manifest.get("linears")
        reports = {**(linears if isinstance(linears, dict) else {}), **self._tables()}
        outside = [table.name for table in find_tables(model).values()]
        for name, expected in model.state_dict().items():
            if name not in names:
                continue
            module = name.removesuffix(".weight")
            owner = model.get_submodule(name.rpartition(".")[0])
            is_linear = name.endswith(".weight") and (isinstance(owner, LINEARS) or module in outside)
            weight = self._try(name, partial(_read, source.weights, names[name], expected, located.pieces.get(name)))
            said = reports.pop(module, None) if is_linear else None
            if is_linear and weight is not None:
                self.found.linears += module not in outside
                packed = names[name] in source.weights.packed
                self._compare(module, weight, packed, tuple(weight_matrix(owner).shape), said)
        for name in reports:
            self._say(name, f"is a linear in {MANIFEST_NAME}, but not in the model that config.json describes")
        for name in source.weights:
            if name not in used:
                self._try(name, partial(_read, source.weights, name, None, None))

    def _tables(self) -> dict[str, Any]:
        """What the manifest says of the table of embeddings and of the head."""
        tables = self.manifest.get("tables")
        return tables if isinstance(tables, dict) else {}

    def _layouts(self, source: Source, model: nn.Module, names: Mapping[str, str]) -> None:
        """The config names just those linears that are packed, and says right how their modules keep them."""
        if source.quantization is None:
            return
        entries = parse_quantization_config(source.quantization)
        self._try(CONFIG_NAME, lambda: _check_gates(source, model, names))
        packed = source.weights.packed
        exact = set()
        unnamed = set(filter(is_pattern, entries))
        names_one = set(entries) - unnamed
        tables = [table.name for table in find_tables(model).values()]
        for name, module in model.named_modules():
            stored = names.get(f"{name}.weight")
            if stored is None or not (isinstance(module, LINEARS) or name in tables):
                if stored in packed:
                    self._say(name, "is packed, but it is neither a linear nor the table of embeddings")
                continue
            owner = stored.removesuffix(".weight")
            entry = find_entry(entries, owner)
            if stored not in packed:
                if entry is not None:
                    what = f"is dense in the files, but {CONFIG_NAME} says that it has layout {entry[0].name!r}"
                    self._say(name, what)
                continue
            exact.add(owner)
            unnamed -= {pattern for pattern in unnamed if fnmatchcase(owner, pattern)}
            if packed[stored].transposed != is_transposed(module):
                said = "transposed" if packed[stored].transposed else "not transposed"
                self._say(name, f"is said to be {said} by {CONFIG_NAME}, and its module keeps it otherwise")
        for pattern in sorted(unnamed | (names_one - exact)):
            self._say(CONFIG_NAME, f"names a layout for {pattern!r}, which no packed weight is called")

    def _compare(self, name: str, weight: Stored, packed: bool, shape: tuple[int, ...], said: Any) -> None:
        """Whether the manifest says the same about a linear as its tensors."""
        exported = "exported" in self.manifest  # what is exported has another form than what the manifest tells of
        if said is None:
            if packed and "linears" in self.manifest and not exported:
                self._say(name, f"is packed, but {MANIFEST_NAME} does not have it among its linears")
            return
        if not isinstance(said, dict):
            self._say(name, f"is {said!r} in {MANIFEST_NAME}")
            return
        count = max(math.prod(shape), 1)
        found: dict[str, Any] = {"shape": list(shape), "sparsity": 1 - weight.count / count}
        if not exported:
            found |= {"layout": weight.layout, "bytes": weight.bytes, "bits": 8 * weight.bytes / count}
            found["outliers"] = weight.outliers / count
        if not packed and (_quantized(self.manifest) or name in self._tables()):
            # Outliers no longer stand apart, and some values of a grid are zero, which are weights like others.
            found.pop("outliers", None)
            found["sparsity"] = min(found["sparsity"], _number(said.get("sparsity")))
        if not packed and said.get("layout") == "low-rank":
            found.pop("sparsity")  # the sum has no zeros
        for key, value in found.items():
            if key not in said and key != "sparsity":
                continue
            same = said.get(key) == value or abs(_number(said.get(key)) - _number(value)) < 1e-9
            if not same:
                self._say(name, f"has {key} {value} by its tensors, but {said.get(key)!r} in {MANIFEST_NAME}")


def _check_gates(source: Source, model: nn.Module, names: Mapping[str, str]) -> None:
    """Raise CheckpointError where what the config says of activation sparsity does not fit the model or its tensors."""
    section = parse_section((source.quantization or {}).get(SECTION))
    if section is not None:
        put_in_place(model, section, source.weights.stored, lambda weight: [names[weight]] if weight in names else [])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 2**53 else math.inf


def _quantized(manifest: Mapping[str, Any]) -> bool:
    recipe = manifest.get("recipe")
    return not isinstance(recipe, dict) or bool(recipe.get("quantize") or recipe.get("factorize"))


def _ignored(model: nn.Module, name: str) -> bool:
    """Whether transformers knows that such models come with a tensor that it has no use for."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _read(weights: DecodedWeights, name: str, expected: Tensor | None, piece: Piece | None) -> Stored:
    """Read one weight, all of which is checked, and tell what it is.

    Args:
        weights: of the checkpoint.
        name: that it is stored under.
        expected: of the shape and kind that its module has. None: no module has it, and whatever it holds does no harm.
        piece: which part of what is stored it is; None: all.

    Raises:
        CheckpointError: it is damaged, has other than finite values, or is not as expected.
    """
    packed = weights.packed.get(name)
    if packed is None or piece is not None:
        tensor = part_of(weights, name, piece)
        if expected is None:
            return Stored("dense", tuple(tensor.shape), 0, 0, tensor.nbytes, True)
        _check_shape(tensor.shape, expected)
        if tensor.is_floating_point() != expected.is_floating_point():
            raise CheckpointError(f"is {tensor.dtype} in the files, but {expected.dtype} in the model")
        found = describe_dense(tensor)
    else:
        found = packed.describe(name, weights.stored)
        _check_shape(found.shape[::-1] if packed.transposed else found.shape, expected)
    if not found.finite:
        raise CheckpointError("holds NaN or infinity")
    return found


def _check_shape(shape: tuple[int, ...], expected: Tensor | None) -> None:
    if expected is not None and tuple(shape) != tuple(expected.shape):
        raise CheckpointError(f"is {list(shape)} in the files, but {list(expected.shape)} in the model")
