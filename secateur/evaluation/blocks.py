"""Where a compressed model departs from the dense one: the error of each block's output.

K: windows, S: tokens of one window, H: features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.evaluation.streamed import StreamedModel
from secateur.model.structure import body_of, find_blocks


@dataclass(frozen=True)
class BlockError:
    """Relative squared errors ‖h − h′‖² / ‖h‖² of a block's output, over all tokens.

    Attributes:
        name: of the block.
        own: of the block alone: on the inputs that it has in the dense model.
        carried: in the compressed model, with what the blocks before it have done.
    """

    name: str
    own: float
    carried: float


@torch.no_grad()
def block_errors(
    model: Any, reference: Any, ids_KS: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> list[BlockError]:
    """Compare the outputs of two models block by block, in two forward passes of the model and one of the reference.

    Args:
        model, reference: of the same architecture, on the same device.
        ids_KS: the windows, run one by one: the outputs of all blocks for one of them are held.
        progress: called with (windows done, windows in total).

    Raises:
        UsageError: the models have different blocks.
    """
    names = find_blocks(model).modules
    blocks, dense_blocks = list(names.values()), list(find_blocks(reference).modules.values())
    _check_alike(model, blocks, reference, dense_blocks)
    model.eval()
    reference.eval()
    squares = torch.zeros(len(blocks), 3, dtype=torch.float64)  # of own errors, carried errors, and outputs
    outputs: list[Tensor] = []  # in the order in which blocks are run, some more than once

    def beside(number: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            h = _hidden(output)
            outputs.append(h)
            squares[number, 0] += _square(_hidden(blocks[number](*args, **kwargs)) - h)
            squares[number, 2] += _square(h)

        return hook

    def after(number: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            squares[number, 1] += _square(_hidden(output) - outputs.pop(0))

        return hook

    for k, ids_S in enumerate(ids_KS):
        outputs.clear()
        ids = ids_S[None].to(model.device)
        with ExitStack() as hooks:
            for number, block in enumerate(dense_blocks):
                hooks.callback(block.register_forward_hook(beside(number), with_kwargs=True).remove)
            body_of(reference)(input_ids=ids, use_cache=False)
        with ExitStack() as hooks:
            for number, block in enumerate(blocks):
                hooks.callback(block.register_forward_hook(after(number)).remove)
            body_of(model)(input_ids=ids, use_cache=False)
        if progress is not None:
            progress(k + 1, len(ids_KS))
    return _errors(list(names), squares)


@torch.no_grad()
def streamed_block_errors(
    model: StreamedModel,
    reference: StreamedModel,
    ids_KS: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[BlockError]:
    """The same for models whose blocks are read one after another; `progress` is called with (blocks done, blocks in total)."""
    own, dense = model.stream, reference.stream
    _check_alike(model, own.blocks, reference, dense.blocks)
    squares = torch.zeros(len(own.blocks), 3, dtype=torch.float64)
    carried, clean = (stream.enter(ids_KS, texts=2, blocks=2) for stream in (own, dense))
    for number in range(len(own.blocks)):
        with own.block(number) as block, dense.block(number):
            inputs = map(clean.hiddens.read, range(len(clean.batches)))
            both = zip(inputs, dense.outputs(clean, number), own.outputs(carried, number), strict=True)
            for x_NSH, (i, h_NSH), (_, moved_NSH) in both:
                squares[number, 0] += _square(clean.calls[i][number].run(block, x_NSH) - h_NSH)
                squares[number, 1] += _square(moved_NSH - h_NSH)
                squares[number, 2] += _square(h_NSH)
        if progress is not None:
            progress(number + 1, len(own.blocks))
    return _errors(own.block_names, squares)


def _check_alike(model: Any, blocks: list[nn.Module], reference: Any, others: list[nn.Module]) -> None:
    """Raise UsageError where two models have different blocks."""
    widths = {each.get_input_embeddings().embedding_dim for each in (model, reference)}
    if [type(block) for block in blocks] != [type(block) for block in others] or len(widths) > 1:
        raise UsageError("`by_block` compares block with block: the reference must be the model that was compressed")


def _errors(names: list[str], squares: Tensor) -> list[BlockError]:
    """Of the squares of own errors, of carried ones and of outputs of each block."""
    total = squares[:, 2].clamp(min=torch.finfo(torch.float64).tiny)
    own, carried = (squares[:, 0] / total).tolist(), (squares[:, 1] / total).tolist()
    return [BlockError(name, own[i], carried[i]) for i, name in enumerate(names)]


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _square(x: Tensor) -> float:
    return x.float().square().sum().item()
