"""Tables of embeddings that stay packed, and the heads that read the same weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import CheckpointError, UsageError
from secateur.formats.layouts.packed_weight import StoredForm
from secateur.kernels.backends import AUTO, check_backend, choose, why_not
from secateur.kernels.embedding import PackedEmbedding, pack_embedding
from secateur.kernels.packed import Packed
from secateur.plugin.packed_modules import PackedPlainLinear

# Where a model that was loaded keeps which of its tensors were tied, for when they are dense again.
_TIED = "_secateur_tied"


def replace_tables(
    model: Any,
    weights: Mapping[str, Callable[[], tuple[Packed, StoredForm]]],
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> list[str]:
    """Let the tables of embeddings of a model, which may be on the meta device, give rows of packed weights.

    Heads that are tied to one compute on the same weight. What there is no kernel for becomes dense; a backend that was named
    for the linears need not be one for tables.

    Args:
        weights, backend, device, dtype: see `replace_linears`.

    Returns:
        The names of the modules that were replaced.

    Raises:
        CheckpointError: a weight is damaged, or of another shape than the module's.
        UsageError: there is no such backend.
    """
    check_backend(backend)
    replaced = []
    for name, read in weights.items():
        module = model.get_submodule(name)
        if not isinstance(module, nn.Embedding):
            continue
        weight, form = read()
        if weight.shape != tuple(module.weight.shape):
            raise CheckpointError(
                f"{name}.weight is {list(weight.shape)} in the file, but {list(module.weight.shape)} in the model"
            )
        asked = backend if backend == AUTO or why_not(backend, weight, device, dtype) is None else AUTO
        if choose(weight, asked, device, dtype).name == "dense":
            continue
        linear = PackedPlainLinear(weight, None, asked, dtype, form)
        tied = [other for other, source in model.all_tied_weights_keys.items() if source == f"{name}.weight"]
        for other in tied:
            _share(model, other.rpartition(".")[0], linear)
        pack_embedding(module, linear, dtype)
        replaced.append(name)
    _untie(model)
    return replaced


def _share(model: nn.Module, name: str, linear: PackedPlainLinear) -> None:
    """Let another module that reads the weight of a table compute on it as well. Raises CheckpointError where it cannot."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        pack_embedding(module, linear, linear.dtype)
    elif type(module) is nn.Linear:
        linear.bias = module._parameters.get("bias")
        model.set_submodule(name, linear.train(module.training))
    else:
        raise CheckpointError(f"{name} shares a packed weight, and is a {type(module).__name__}, which cannot read one")


def _untie(model: Any) -> None:
    """Have transformers not tie what is packed: there is no parameter that it could."""
    packed = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "prepared")}
    packed |= {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedEmbedding)}
    before = {"all_tied_weights_keys": model.all_tied_weights_keys, "_tied_weights_keys": model._tied_weights_keys}
    if not any(packed.intersection(pair) for tied in before.values() for pair in (tied or {}).items()):
        return
    setattr(model, _TIED, before)
    for key, tied in before.items():
        left = {target: source for target, source in (tied or {}).items() if not packed.intersection((target, source))}
        setattr(model, key, left)


def unpack_tables(model: Any) -> None:
    """Put dense weights back into tables of embeddings."""
    for module in [m for m in model.modules() if isinstance(m, PackedEmbedding)]:
        module.unpack(module.linear.dense().to(module.rows_dtype))
    for module in model.modules():
        vars(module).pop("resize_token_embeddings", None)


def tie_again(model: Any) -> None:
    """Tie what was tied before `replace_tables`, all of which is dense by now."""
    before = vars(model).pop(_TIED, None)
    if before is not None:
        for key, tied in before.items():
            setattr(model, key, tied)
        model.tie_weights(recompute_mapping=False)


def refuse_to_resize(model: nn.Module) -> None:
    """Have a model whose table of embeddings is packed say that it cannot be made larger or smaller."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(isinstance(m, PackedEmbedding) for m in module.modules()):
            module.resize_token_embeddings = partial(_refuse, type(module).__name__)


def _refuse(model: str, *_: Any, **__: Any) -> NoReturn:
    raise UsageError(
        f"the embeddings of this {model} are packed, and have no room for other tokens: call dequantize() of the model first, "
        "or compress it with its embeddings as they are"
    )
