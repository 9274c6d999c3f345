"""Writing experts that have taken something over of those that went, layer by layer, for a view of the source to have them.

O: output features, I: inner size of an expert, H: hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.experts.kept_experts import KeptExperts
from secateur.experts.segments import ExpertWeights
from secateur.folder.reader import StoredTensors
from secateur.folder.writer import write_whole
from secateur.mixture.experts import DOWN, GATE_UP, UP, Experts
from secateur.mixture.unfuse import experts_in
from secateur.model.located import part_of
from secateur.model.source import Source
from secateur.structured.fewer_experts import Fewer


def merged(
    fewer: Fewer,
    kept: Mapping[str, KeptExperts],
    method: Any,
    folder: Path,
    device: torch.device,
    say: Callable[[int, int], None],
    here: bool,
) -> Source:
    """A source whose experts have taken over what a method gives them.

    Args:
        fewer: the source without the experts that go.
        kept: which stay, by the names of the modules of experts.
        method: merges them.
        folder: for the new tensors, a file a layer; what is there already is not made again.
        device: where they are computed.
        say: told of (layers done, layers in total).
        here: whether this process makes them; else they are there.
    """
    old, new = experts_in(fewer.model), experts_in(fewer.built)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(kept))]
    if here:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (file, name) in enumerate(zip(files, old, strict=True)):
            say(number, len(files))
            if not file.exists():
                tensors = _of_layer(fewer, name, old[name], new[name], kept[name], method, device)
                write_whole(file, partial(save_file, tensors))
        say(len(files), len(files))
    return fewer.with_tensors(StoredTensors(files))


def _of_layer(
    fewer: Fewer, name: str, old: Experts, new: Experts, kept: KeptExperts, method: Any, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of the experts of a layer, by their names in the files of the new model."""
    whole = [_weights(fewer, name, old, e, device) for e in range(old.count)]
    found: dict[str, Tensor] = {}
    for e, expert in enumerate(method.merged(whole, kept)):
        projections = dict(zip(new.firsts, expert.firsts, strict=True)) | {new.last: expert.last_HI}
        for projection, W in projections.items():
            weight = f"{e}.{projection}.weight"
            full = f"{name}.{weight}"
            stored = fewer.located.stored[full]
            W_OI = W[:, : new.linear(e, projection).in_features].cpu()
            shape, dtype = fewer.written.weights.form(stored)
            if full in fewer.located.pieces:
                fused = found.setdefault(stored, torch.empty(shape, dtype=dtype))
                fewer.located.pieces[full].of(fused).copy_(W_OI)
            else:
                found[stored] = W_OI.to(dtype).contiguous()
        if new.has_bias:
            _put_biases(fewer, name, new, e, expert, found)
    return found


def _weights(fewer: Fewer, name: str, experts: Experts, e: int, device: torch.device) -> ExpertWeights:
    def read(full: str) -> Tensor:
        W = part_of(fewer.source.weights, fewer.found.stored[full], fewer.found.pieces.get(full))
        return W.to(device, torch.float32)

    firsts = [read(f"{name}.{e}.{projection}.weight") for projection in experts.firsts]
    last_HI = read(f"{name}.{e}.{experts.last}.weight")
    if not experts.has_bias:
        return ExpertWeights(tuple(firsts), last_HI)
    first = GATE_UP if experts.gated else UP
    bias_O = read(f"{name}.{first}_bias")[e]
    with_bias = [
        torch.cat([W_IH, bias_O[experts.pieces[f"{e}.{projection}.weight"].rows, None]], dim=1)
        for projection, W_IH in zip(experts.firsts, firsts, strict=True)
    ]
    return ExpertWeights(tuple(with_bias), last_HI, read(f"{name}.{DOWN}_bias")[e])


def _put_biases(fewer: Fewer, name: str, new: Experts, e: int, expert: ExpertWeights, found: dict[str, Tensor]) -> None:
    assert expert.bias_H is not None
    for leaf in (GATE_UP if new.gated else UP, DOWN):
        stored = fewer.located.stored[f"{name}.{leaf}_bias"]
        shape, dtype = fewer.written.weights.form(stored)
        bias_EO = found.setdefault(stored, torch.empty(shape, dtype=dtype))
        if leaf == DOWN:
            bias_EO[e] = expert.bias_H.cpu().to(dtype)
            continue
        for projection, W in zip(new.firsts, expert.firsts, strict=True):
            bias_EO[e, new.pieces[f"{e}.{projection}.weight"].rows] = W[:, -1].cpu().to(dtype)
