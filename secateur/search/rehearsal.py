"""A model whose linears have lost units, made in memory as a run would make it but on fewer windows, and what it lacks most.

N: windows, S: tokens of a window, B: predictions of a window, T: outcomes kept of each, O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.calibration.effects import want_gradients
from secateur.core.stack import Stack
from secateur.evaluation.distributions import log_predictions
from secateur.evaluation.kl import kl, log_rest
from secateur.model.structure import is_transposed
from secateur.model.weights import place
from secateur.pipeline.calibrate import Windows
from secateur.pipeline.solve import stacked
from secateur.prune.refit import choose_damping, refit_with
from secateur.search.searcher import Searcher, pieces
from secateur.structured.sites import Site, Width
from secateur.walking.walk import Gathered

#: A width for each linear, by name.
Widths = dict[str, Width]
# Tokens that divergences and slopes are measured on.
_MEASURED = 8192
# Outcomes of which the dense model's probabilities are kept; all others count as one.
_LIKELIEST = 512


@dataclass
class Rehearsal:
    """A model that is made again and again, with other widths each time.

    Attributes:
        searcher: whose blocks the windows walk through, and whose folder takes what is kept.
        model: all of it; what goes is zero.
        ids_NS, held_NS: text that weights are solved on, and text that is measured on: neither sees the other's.
        dense: what the dense model predicts of each of `held_NS`: log-probabilities of the likeliest outcomes, which these are,
            and the log-probability of all others.
    """

    searcher: Searcher
    model: Any
    ids_NS: Tensor
    held_NS: Tensor
    dense: list[tuple[Tensor, Tensor, Tensor]]
    _dampings: dict[str, float] = field(default_factory=dict)
    _wider: tuple[str, ...] = ()

    @classmethod
    def of(cls, searcher: Searcher, windows: Windows) -> Rehearsal:
        """Of the dense model; half of the windows are for solving."""
        model = searcher.prepared.load_whole().requires_grad_(False)
        half = max(2, len(windows.ids_NS) // 2)
        held = pieces(windows.ids_NS[-max(1, len(windows.ids_NS) // 2) :], windows.bos_ids, _MEASURED)
        found = cls(searcher, model, windows.ids_NS[:half], held, [])
        with torch.no_grad():
            for ids_S in held:
                log_p_BV = log_predictions(model, ids_S)
                top = log_p_BV.topk(min(_LIKELIEST, log_p_BV.shape[1] - 1), dim=1)
                found.dense.append((top.values, top.indices, log_rest(log_p_BV, top.indices)))
        return found

    def make(self, now: Mapping[str, Width], wider: Mapping[str, Width]) -> None:
        """Solve linears for their widths, each on what those before it have become.

        Args:
            now: of all linears that may lose units.
            wider: other widths of some; how their weights then differ is kept for `measure`.
        """
        searcher, job = self.searcher, self.searcher.job
        assert searcher.prepared.structure is not None
        self._wider = tuple(wider)
        sites = {site.name: site for site in searcher.prepared.structure.probed.sites}

        def look(gathered: list[Gathered]) -> None:
            for (name, *_), stats in gathered:
                if name not in now:
                    continue
                stack = stacked(job.plan, [searcher.prepared.problem(name, None)], stats.or_isotropic())
                W_OI, shift_O = self._solved(stack, sites[name], now[name])
                if name in wider:
                    more_OI, more_O = self._solved(stack, sites[name], wider[name])
                    change = {"W_OI": (more_OI - W_OI).bfloat16(), "b_O": more_O - shift_O}
                    save_file({key: x.cpu().contiguous() for key, x in change.items()}, self._file(name))
                self._put(name, W_OI, shift_O)

        searcher.walk(self.ids_NS, look, searcher.level)

    def measure(self) -> tuple[float, dict[str, float]]:
        """How far it is from the dense model, and by how much each of the wider linears would change that.

        Returns:
            KL(dense ‖ this) in nats a token, and for each linear that was solved for another width, too, the slope of that
            towards it: what it would change by, if it went on as it begins.
        """
        slopes = dict.fromkeys(self._wider, 0.0)
        total = 0.0
        with ExitStack() as left:
            for name in slopes:
                hook = self.model.get_submodule(name).register_forward_hook(_slope(slopes, name, self._file(name)))
                left.callback(hook.remove)
            left.callback(want_gradients(self.model).remove)
            for ids_S, (log_p_BT, kept_BT, rest_B) in zip(self.held_NS, self.dense, strict=True):
                with torch.set_grad_enabled(bool(slopes)):
                    divergence = kl(log_p_BT, log_predictions(self.model, ids_S), kept_BT, rest_B).mean()
                    if slopes:
                        divergence.backward()
                total += divergence.item()
        count = len(self.held_NS)
        return total / count, {name: slope / count for name, slope in slopes.items()}

    def _file(self, name: str) -> Path:
        return self.searcher.folder / f"{name}-wider.safetensors"

    def _solved(self, stack: Stack, site: Site, width: Width) -> tuple[Tensor, Tensor]:
        """The weight for a width, and what a bias makes up for.

        By how much a refit is damped is chosen once for each linear: each time it would take several times as long.
        """
        pruning = self.searcher.job.plan.pruning
        assert pruning is not None
        pruner: Any = pruning.pruner
        none_O = stack.W_OI.new_zeros(len(stack.W_OI))
        if width == site.width:
            return stack.W_OI, none_O
        if width.units:
            units = site.units(width)
            keep_I = units.spread(pruner.keep_units(stack, units))
            if site.name not in self._dampings:
                damping = choose_damping(stack, keep_I, pruner.shifts) if pruning.refits else None
                self._dampings[site.name] = math.inf if damping is None else damping
            W_OI = refit_with(stack, keep_I, self._dampings[site.name], pruner.shifts)
        else:
            W_OI = torch.zeros_like(stack.W_OI)
        return W_OI, (stack.W_OI - W_OI) @ stack.stats.mean() if pruner.shifts else none_O

    def _put(self, name: str, W_OI: Tensor, shift_O: Tensor) -> None:
        """In the block that windows walk through, which is read anew each time, and in the whole model."""
        walked: Any = self.searcher.prepared.linear(name)
        tensors = {"weight": W_OI.T if is_transposed(walked) else W_OI}
        if walked.bias is not None:
            tensors["bias"] = walked.bias + shift_O
        for linear in (walked, self.model.get_submodule(name)):
            for leaf, tensor in tensors.items():
                before = linear.get_parameter(leaf)
                place(linear, leaf, tensor.to(before.device, before.dtype, copy=True).contiguous())


def _slope(slopes: dict[str, float], name: str, file: Path) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that adds up Σ_t g_t·(ΔW x_t + Δb), where g_t are gradients with respect to a linear's outputs."""

    def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        x_TI = args[0].detach().flatten(0, -2)

        def add(g: Tensor) -> None:
            change = load_file(file)
            change_OI, change_O = (change[key].to(x_TI.device, torch.float32) for key in ("W_OI", "b_O"))
            changed_TO = x_TI.float() @ change_OI.T + change_O
            slopes[name] += float((g.flatten(0, -2).float() * changed_TO).sum())

        if out.requires_grad:
            out.register_hook(add)

    return hook
