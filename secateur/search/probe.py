"""What could go of a model, and what it would cost: how much each block changes, and how much each unit has a part in.

As the probes of depth and width of He et al. 2025, arXiv:2512.02351; the cosine is that of ShortGPT (Men et al. 2024,
arXiv:2403.03853).

N: windows, S: tokens of a window, H: hidden size, O: output features, I: input features, U: units.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.kept_windows import calibration_ids
from secateur.core.feature_units import Units
from secateur.core.stats import InputStats, Level
from secateur.model.load import load_source, open_device
from secateur.model.source import open_source, with_revision
from secateur.model.structure import find_blocks, weight_matrix
from secateur.recipes.recipe import Calibration
from secateur.search.goals.shapes import loss_without
from secateur.structured.sites import Site, find_sites
from secateur.structured.structure_of import heads_of

#: Shares of the neurons, those of least score, of which is told what part of all scores they have.
LOWEST = (0.125, 0.25, 0.5)


@dataclass(frozen=True)
class BlockProbe:
    """What was found of a block.

    Attributes:
        name: of it.
        cosine: of its inputs and outputs, the mean over tokens: near 1 where it changes little.
        loss_rise: of the loss of the model without it, in nats a token.
        heads, neurons: the part that each of them has in the scores of its kind, Σ|W|·‖x‖ over the weights that read it; none
            where they cannot be told apart.
        weights: of its linears.
        weights_of: of those, how many hang on its heads and on its neurons.
    """

    name: str
    cosine: float
    loss_rise: float
    heads: list[float]
    neurons: list[float]
    weights: int
    weights_of: dict[str, int]

    def lowest(self, share: float) -> float | None:
        """The part of the scores that so many of the neurons have, those with the least."""
        return sum(sorted(self.neurons)[: int(share * len(self.neurons))]) if self.neurons else None


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        model: its name.
        loss: in nats a token.
        tokens: that it was measured on.
        blocks: in order.
    """

    model: str
    loss: float
    tokens: int
    blocks: list[BlockProbe]


def probe(
    model: str,
    calibration: Calibration,
    *,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> ProbeResult:
    """Measure what could go of a model, which is in memory as a whole.

    Args:
        model: see `compress`.
        calibration: the text, of few windows: each block is left out once.
        device: where it is run.
        progress: called with (blocks done, blocks in total).

    Raises:
        SecateurError: with one line for the user.
    """
    opened = open_device(device)
    source = open_source(with_revision(model, revision), trust_remote_code)
    ids_NS, _, _ = calibration_ids(source, calibration, opened, lambda _: None)
    loaded: Any = load_source(source, source.dtype if opened.type == "cuda" else torch.float32, opened, apart=True)
    blocks = find_blocks(loaded)
    probed = find_sites(loaded.cpu(), blocks, *heads_of(source))
    loaded.to(opened)
    sites = [site for site in probed.sites if not site.of_expert] if probed is not None else []
    with torch.no_grad():
        cosines, stats = _looked_at(loaded, blocks.modules, sites, ids_NS)
        loss = loss_without(loaded, [], ids_NS)
        found = []
        for number, (name, block) in enumerate(blocks.modules.items()):
            progress(number, len(blocks.modules))
            own = [site for site in sites if site.prefix == name]
            shares = {site.coupling.kind: _shares(loaded, site, stats[site.name]) for site in own}
            weights = [weight_matrix(m).numel() for n, m in blocks.linears.items() if n.startswith(f"{name}.")]
            found.append(
                BlockProbe(
                    name=name,
                    cosine=cosines[name],
                    loss_rise=loss_without(loaded, [block], ids_NS) - loss,
                    heads=shares.get("heads", []),
                    neurons=shares.get("neurons", []),
                    weights=sum(weights),
                    weights_of={site.coupling.kind: site.weights(site.width) for site in own},
                )
            )
    progress(len(blocks.modules), len(blocks.modules))
    return ProbeResult(model, loss, ids_NS.numel(), found)


def _looked_at(
    model: Any, blocks: dict[str, Any], sites: list[Site], ids_NS: Tensor
) -> tuple[dict[str, float], dict[str, InputStats]]:
    """The cosine of each block, and statistics of what each site reads."""
    cosines: dict[str, list[float]] = {name: [] for name in blocks}
    stats: dict[str, InputStats] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before_NSH = args[0] if args else kwargs["hidden_states"]
            after_NSH = out[0] if isinstance(out, tuple | list) else out
            cosines[name].append(torch.cosine_similarity(before_NSH.float(), after_NSH.float(), dim=-1).mean().item())

        return hook

    def count(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            of = stats.setdefault(name, InputStats.empty(x.shape[-1], Level.MOMENTS, x.device))
            of.add(x.reshape(-1, x.shape[-1]))

        return hook

    with ExitStack() as left:
        for name, block in blocks.items():
            left.callback(block.register_forward_hook(compare(name), with_kwargs=True).remove)
        for site in sites:
            linear = model.get_submodule(site.name)
            left.callback(linear.register_forward_pre_hook(count(site.name)).remove)
        for ids_S in ids_NS:
            model(input_ids=ids_S[None].to(model.device), use_cache=False, logits_to_keep=1)
    return {name: sum(each) / len(each) for name, each in cosines.items()}, stats


def _shares(model: Any, site: Site, stats: InputStats) -> list[float]:
    units: Units = site.units(site.width)
    W_OI = weight_matrix(model.get_submodule(site.name)).float()
    score_U = units.sums(W_OI.abs().sum(0) * stats.norm())
    found: list[float] = (score_U / score_U.sum().clamp(min=torch.finfo(torch.float32).tiny)).tolist()
    return found
