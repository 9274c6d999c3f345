"""The forms that `export` writes a model's linears in."""

from __future__ import annotations

import re
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.core.quantized import Quantized
from secateur.errors import UsageError
from secateur.foreign import gptq_format, mlx_codes, pack_quantized, spqr_quant
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import Decoder
from secateur.formats.stored_weights import quantization_config
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import experts_in, merges_experts, routers_in
from secateur.model.block_names import without_expert
from secateur.model.structure import Linear, empty_linears, is_transposed
from secateur.model.vocabulary import HEAD, Table
from secateur.model.weights import ModelWeights

_ONE_TENSOR = (
    "checkpoints of its family hold a layer's experts in one tensor, and transformers reads no packed ones there"
)


class Form(Protocol):
    """How linears are written; what a form does not take is written dense.

    Attributes:
        dtype: that every tensor written dense must have; None: the one that it has.
        unconverted: whether tensors that transformers converted as it loaded them are written as the files had them.
        section: where `config.json` says how linears are packed.
    """

    dtype: torch.dtype | None
    unconverted: bool
    section: str = "quantization_config"

    def notes(self) -> list[str]:
        """What a user should know of what was packed."""
        return []

    def takes_table(self, table: Table, layout: Decoder) -> bool:
        """Whether a table of embeddings, or a head, that is packed so is among the linears; else it is written dense."""
        return False

    def pack(self, module: str, linear: Linear, weights: ModelWeights) -> dict[str, Tensor] | None:
        """The tensors of a linear by their names behind its own, or None: it stays dense. Raises UsageError if it cannot be."""
        ...

    def config(
        self, model: nn.Module, lists: list[str], linears: dict[str, Linear], weights: ModelWeights
    ) -> dict[str, Any] | None:
        """The `quantization_config` for the linears that were packed.

        Args:
            model: the whole model.
            lists: names of its lists of blocks.
            linears: those of the blocks.
            weights: which know what modules are called in the files.
        """
        ...


class Dense(Form):
    """Every tensor as any tool reads it."""

    dtype: torch.dtype | None = None
    unconverted = True

    def takes_table(self, table: Table, layout: Decoder) -> bool:
        return False

    def pack(self, module: str, linear: Linear, weights: ModelWeights) -> dict[str, Tensor] | None:
        return None

    def config(
        self, model: nn.Module, lists: list[str], linears: dict[str, Linear], weights: ModelWeights
    ) -> dict[str, Any] | None:
        return None


class Secateur(Form):
    """Packed linears keep their layout, or take the one of ours that holds the same; dense ones become `bitmap` where that is
    smaller. What others round on the way, scales that no 16 bits hold, and codes that are not integers become dense.
    """

    dtype: torch.dtype | None = None
    unconverted = False

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.unpacked: list[str] = []

    def notes(self) -> list[str]:
        return [f"{name}: made dense, for no layout of secateur's is the same to the bit" for name in self.unpacked]

    def takes_table(self, table: Table, layout: Decoder) -> bool:
        return True

    def pack(self, module: str, linear: Linear, weights: ModelWeights) -> dict[str, Tensor] | None:
        name = f"{module}.weight"
        packed = weights.packed(name)
        if packed is not None:
            found = packed.layout.ours(weights.parts(name))
            if found is None:
                self.unpacked.append(module)
                return None
            layout, parts = found
        else:
            dense = weights[name]
            if torch.count_nonzero(dense).item() * 8 * dense.element_size() + dense.numel() >= 8 * dense.nbytes:
                return None
            layout = Bitmap()
            parts = layout.pack(dense.T.contiguous() if is_transposed(linear) else dense)
        self.entries[module] = {**layout.to_config(), **({"transposed": True} if is_transposed(linear) else {})}
        return {f"weight.{part}": tensor for part, tensor in parts.items()}

    def config(
        self, model: nn.Module, lists: list[str], linears: dict[str, Linear], weights: ModelWeights
    ) -> dict[str, Any] | None:
        absent = (set(linears) - set(self.entries)) | empty_linears(model)
        return quantization_config(weights.generalised(self.entries, lists, absent)) if self.entries else None


class CompressedTensors(Form):
    """The format `pack-quantized` of compressed-tensors: integer codes of 2 to 8 bits.

    A head of its own is among them where it has no zero points, which transformers takes of one scheme only. A table of
    embeddings is not: transformers 5.23 fails on one that is packed.
    """

    dtype: torch.dtype | None = None
    unconverted = False

    def __init__(self) -> None:
        self.schemes: dict[str, pack_quantized.Scheme] = {}

    def takes_table(self, table: Table, layout: Decoder) -> bool:
        return table.role == HEAD and getattr(layout, "symmetric", False)

    def pack(self, module: str, linear: Linear, weights: ModelWeights) -> dict[str, Tensor] | None:
        weight = _quantized(module, linear, weights, "compressed-tensors")
        if weight is None:
            return None
        try:
            parts = pack_quantized.pack(weight)
        except ValueError as error:
            raise _not_possible(module, "compressed-tensors", error) from error
        self.schemes[module] = pack_quantized.Scheme.of(weight)
        return parts

    def config(
        self, model: nn.Module, lists: list[str], linears: dict[str, Linear], weights: ModelWeights
    ) -> dict[str, Any] | None:
        _check_some(self.schemes, "compressed-tensors", "`quantize` gptq or rtn")
        merged = merges_experts(model)
        for name, experts in experts_in(model).items():
            self._check_experts(name, experts, merged)
        schemes = {_target(n): scheme for module, scheme in self.schemes.items() for n in _names(module, weights)}
        return pack_quantized.quantization_config(schemes, _other_linears(model, self.schemes, weights))

    def _check_experts(self, name: str, experts: Experts, merged: bool) -> None:
        """Raise UsageError where those that read the format would not take the experts of a layer."""
        found = {self.schemes.get(f"{name}.{linear}") for linear in experts.linears}
        why = None
        if found == {None}:
            return
        if any(scheme is not None and not scheme.symmetric for scheme in found):
            why = "its experts have zero points, which transformers does not read of experts: quantize with `symmetric`"
        elif experts.has_bias or not (merged or experts.copied_inputs):
            why = _ONE_TENSOR
        elif len({scheme and (scheme.bits, scheme.symmetric) for scheme in found}) > 1:
            why = "its experts are not all quantized alike, and those that read them take one way for all experts of a layer"
        if why is not None:
            raise UsageError(f"{name} cannot be written as compressed-tensors: {why}; `to='dense'` writes any model")


class SpQR(Form):
    """What the package spqr_quant reads: SpQR of 3 bits in tiles of 16 × 16, and everything else in float16."""

    dtype: torch.dtype | None = torch.float16
    unconverted = False

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.packed: dict[str, None] = {}

    def takes_table(self, table: Table, layout: Decoder) -> bool:
        return False

    def pack(self, module: str, linear: Linear, weights: ModelWeights) -> dict[str, Tensor] | None:
        weight = _quantized(module, linear, weights, "spqr")
        if weight is None:
            return None
        try:
            if linear.bias is not None:
                raise ValueError("it has a bias, for which spqr_quant's linears have no place")
            parts = spqr_quant.pack(weight)
        except ValueError as error:
            raise _not_possible(module, "spqr", error) from error
        self.packed[module] = None
        for name in _names(module, weights):
            self.sizes.update({f"{name}.{part}": tensor.numel() for part, tensor in parts.items()})
        return parts

    def config(
        self, model: nn.Module, lists: list[str], linears: dict[str, Linear], weights: ModelWeights
    ) -> dict[str, Any] | None:
        _check_some(self.packed, "spqr", "`quantize='spqr'`, `bits=3` and `group_size=16`")
        return spqr_quant.config(self.sizes, _other_linears(model, self.packed, weights))


class GPTQ(Form):
    """GPTQ's format, with zero points as they are."""

    dtype: torch.dtype | None = None
    unconverted = False
    name = "gptq"
    version = 2

    def __init__(self) -> None:
        self.schemes: dict[str, gptq_format.Scheme] = {}

    def pack(self, module: str, linear: Linear, weights: ModelWeights) -> dict[str, Tensor] | None:
        weight = _quantized(module, linear, weights, self.name)
        if weight is None:
            return None
        try:
            parts = gptq_format.pack(weight, self.version)
        except ValueError as error:
            raise _not_possible(module, self.name, error) from error
        self.schemes[module] = gptq_format.Scheme.of(weight)
        return parts

    def config(
        self, model: nn.Module, lists: list[str], linears: dict[str, Linear], weights: ModelWeights
    ) -> dict[str, Any] | None:
        _check_some(self.schemes, self.name, "`quantize` gptq or rtn")
        merged = merges_experts(model)
        for name, experts in experts_in(model).items():
            packed = any(f"{name}.{linear}" in self.schemes for linear in experts.linears)
            if packed and (experts.has_bias or not (merged or experts.copied_inputs)):
                raise UsageError(
                    f"{name} cannot be written as {self.name}: {_ONE_TENSOR}; `to='dense'` writes any model"
                )
        schemes = {n: scheme for module, scheme in self.schemes.items() for n in _names(module, weights)}
        dense = [n for name in linears if name not in self.schemes for n in _names(name, weights)]
        return gptq_format.quantization_config(schemes, dense, self.version)


class GPTQv1(GPTQ):
    """The same with zero points less by one, as AutoGPTQ wrote them."""

    name = "gptq-v1"
    version = 1


class MLX(Form):
    """Affine codes of MLX, the table of embeddings and the head among them."""

    dtype: torch.dtype | None = None
    unconverted = False
    section = mlx_codes.KEY

    def __init__(self) -> None:
        self.forms: dict[str, mlx_codes.MLXCodes] = {}
        self.moved: list[float] = []
        self.unpacked: list[str] = []

    def notes(self) -> list[str]:
        told = [f"{name}: made dense, for its codes are not on a uniform grid" for name in self.unpacked]
        moved = [each for each in self.moved if each > 0]
        if not moved:
            return told
        return [
            *told,
            f"zero points times scales are rounded to the model's dtype, as MLX keeps them, in {len(moved)} of "
            f"{len(self.moved)} linears and tables: by {max(moved):.2g} of a step at most",
        ]

    def takes_table(self, table: Table, layout: Decoder) -> bool:
        if layout.name != "packed-int":
            self.unpacked.append(table.name)
        return layout.name == "packed-int"

    def pack(self, module: str, linear: Linear, weights: ModelWeights) -> dict[str, Tensor] | None:
        weight = _quantized(module, linear, weights, "mlx")
        if weight is None:
            return None
        try:
            form, parts, moved = mlx_codes.pack(weight)
        except ValueError as error:
            raise _not_possible(module, "mlx", error) from error
        self.forms[module] = form
        self.moved.append(moved)
        return parts

    def config(
        self, model: nn.Module, lists: list[str], linears: dict[str, Linear], weights: ModelWeights
    ) -> dict[str, Any] | None:
        _check_some(self.forms, "mlx", "`quantize` gptq or rtn")
        for name, experts in experts_in(model).items():
            if any(f"{name}.{linear}" in self.forms for linear in experts.linears):
                raise UsageError(
                    f"{name} cannot be written as mlx: MLX keeps the experts of a layer in one tensor, under names of each "
                    "family's own; `to='dense'` writes any model, which mlx_lm.convert takes"
                )
        return mlx_codes.section_of({weights.module_to_write(module): form for module, form in self.forms.items()})


FORMS: dict[str, type[Form]] = {
    "dense": Dense,
    "secateur": Secateur,
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "gptq-v1": GPTQv1,
    "mlx": MLX,
    "spqr": SpQR,
}


def _quantized(module: str, linear: Linear, weights: ModelWeights, form: str) -> Quantized | None:
    """The codes of a linear, or None where it is dense."""
    packed = weights.packed(f"{module}.weight")
    if packed is None:
        return None
    try:
        if is_transposed(linear):
            raise ValueError("its module keeps weights as [in, out], which only torch.nn.Linear's are read as")
        return packed.layout.read(weights.parts(f"{module}.weight"))
    except ValueError as error:
        raise _not_possible(module, form, error) from error


def _not_possible(module: str, form: str, error: ValueError) -> UsageError:
    return UsageError(f"{module} cannot be written as {form}: {error}; `to='dense'` writes any model")


def _check_some(packed: dict[str, Any], form: str, how: str) -> None:
    if not packed:
        raise UsageError(
            f"the model has no quantized linears to write as {form}: compress it with {how} first, or give `to='dense'`"
        )


def _other_linears(model: nn.Module, packed: dict[str, Any], weights: ModelWeights) -> list[str]:
    """The linears of the whole model that are not packed, the head among them, and what chooses among experts."""
    routers = routers_in(model)
    others = [
        name
        for name, module in model.named_modules()
        if name not in packed and (isinstance(module, nn.Linear) or name in routers)
    ]
    return [name for other in others for name in _names(other, weights)]


def _target(name: str) -> str:
    """A module as the config names it: all experts of a layer by one pattern."""
    short = without_expert(name)
    return name if short == name else "re:" + re.escape(short).replace(re.escape("*"), r"\d+") + "$"


def _names(module: str, weights: ModelWeights) -> list[str]:
    """What a module is called here and, by the files, in the releases that knew it by another name: tools read both."""
    return list(dict.fromkeys([module, weights.module_to_write(module)]))
