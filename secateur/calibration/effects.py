"""What a change of a linear does to the predictions of the whole model, from one backward pass.

N: windows, S: tokens of a window, T: tokens of all windows, R: tokens that reach a linear, all of them but where it is an
expert's, O: output features, I: input features, V: vocabulary, L: labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import SecateurError
from secateur.folder.reader import StoredTensors
from secateur.mixture.expert_rows import chosen_by
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import experts_in

# Labels drawn for each prediction: each is a backward pass.
LABELS = 2
# Tokens whose effects are summed before they are squared. What a linear does at neighbouring tokens acts on the same
# predictions and hangs together; over longer stretches the sum is mostly noise of the drawn labels.
_STRETCH = 16
# In a file's metadata, beside names of linears, which have dots: how many tokens its window has.
_TOKENS = "tokens"
# What the numbers of the tokens that an expert was sent are called, below the expert's name.
_PLACES = "places"


class Effects:
    """The divergence that a change of one linear's weights would cause, of second order around the model as it is.

    For a change ΔW of the weights, KL(model ‖ changed) ≈ ½ E[(Σ_t g_t·ΔW x_t)²], where x_t are the linear's inputs and g_t the
    gradients, with respect to its outputs, of the log-likelihood of labels that are drawn from the model's own predictions: the
    expectation of their outer product is the Fisher information (Kunstner et al. 2019, arXiv:1905.12558, section 2.2).
    """

    def __init__(self, files: list[Path]) -> None:
        self._windows = [_Kept.of(file) for file in files]
        #: Of all windows.
        self.tokens = sum(window.tokens for window in self._windows)

    def reached(self, name: str) -> int:
        """How many tokens were sent to the expert that a linear is of."""
        places = _places_of(name)
        return sum(len(window.stored[places]) for window in self._windows if places in window.stored)

    def divergence(self, name: str, changes: Iterable[Tensor]) -> list[float]:
        """For each changed weight ΔW_OI of a linear the divergence that it causes, in nats a token.

        Of all tokens, whether they reach the linear or not: one that few are sent to does little to the predictions as a whole.

        Raises:
            ValueError: none reaches it.
        """
        read = self._read(name)
        found = []
        for change_OI in changes:
            out_RO = read.x_RI.to(change_OI.device) @ change_OI.T
            effect_LR = (read.g_LRO.to(out_RO.device) * out_RO).sum(2)
            if read.place_R is None:
                effect_LT = effect_LR
            else:
                effect_LT = effect_LR.new_zeros(len(effect_LR), self.tokens)
                effect_LT[:, read.place_R.to(out_RO.device)] = effect_LR
            found.append(_divergence(effect_LT))
        return found

    def by_input(self, names: Iterable[str]) -> list[list[str]]:
        """Linears by the input that they read, in their order."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._windows[0].same.get(name, name), []).append(name)
        return list(found.values())

    def without(
        self, weights: Mapping[str, Tensor], left_out: Callable[[Tensor], Iterable[Tensor]], first: int
    ) -> list[float]:
        """The divergence that it causes to leave inputs of linears that read the same out, in nats a token.

        Args:
            weights: of each linear `[O, I]`, less what stands for inputs that are left out.
            left_out: gives masks of the inputs `[T, I]`, for each of which the divergence is told.
            first: positions of a window at which all inputs are read.
        """
        read = {name: self._read(name) for name in weights}
        x_TI = next(iter(read.values())).x_RI
        behind_T = torch.cat([torch.arange(window.tokens) >= first for window in self._windows])
        found = []
        for mask_TI in left_out(x_TI):
            out_TI = x_TI * (mask_TI & behind_T[:, None])
            effects = [
                (read[name].g_LRO.to(W_OI.device) * (out_TI.to(W_OI.device) @ W_OI.T)).sum(2)
                for name, W_OI in weights.items()
            ]
            found.append(_divergence(torch.stack(effects).sum(0)))
        return found

    def _read(self, name: str) -> _Rows:
        inputs, gradients, places = [], [], []
        before = 0
        places_of = _places_of(name)
        for window in self._windows:
            if f"{name}.g" in window.stored:
                inputs.append(window.stored[f"{window.same.get(name, name)}.x"].float())
                gradients.append(window.stored[f"{name}.g"].float())
                if places_of in window.stored:
                    places.append(window.stored[places_of].long() + before)
            before += window.tokens
        if not inputs:
            raise ValueError(f"no token reaches {name}")
        return _Rows(torch.cat(inputs), torch.cat(gradients, 1), torch.cat(places) if places else None)


@dataclass(frozen=True)
class _Kept:
    """The file of one window.

    Attributes:
        stored: what is in it.
        same: linears that share their inputs with another, by name.
        tokens: of the window.
    """

    stored: StoredTensors
    same: dict[str, str]
    tokens: int

    @classmethod
    def of(cls, file: Path) -> _Kept:
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        return cls(StoredTensors([file]), said, int(said[_TOKENS]))


@dataclass(frozen=True)
class _Rows:
    """What is kept of one linear.

    Attributes:
        x_RI, g_LRO: its inputs, and the gradients of its outputs.
        place_R: which of all windows' tokens they are of; None: all, in their order.
    """

    x_RI: Tensor
    g_LRO: Tensor
    place_R: Tensor | None


def _divergence(effect_LT: Tensor) -> float:
    """In nats a token, of what changes do to the log-likelihood of labels at each token."""
    L, T = effect_LT.shape
    stretches = nn.functional.pad(effect_LT, (0, -T % _STRETCH)).unflatten(1, (-1, _STRETCH)).sum(2)
    return stretches.double().square().sum().item() / (2 * L * T)


def _places_of(name: str) -> str:
    """What it is called in a file which tokens were sent to the expert of a linear."""
    return f"{name.rpartition('.')[0]}.{_PLACES}"


def gather_effects(
    model: Any, ids_NS: Tensor, names: Iterable[str], folder: Path, seed: int, progress: Callable[[int, int], None]
) -> Effects:
    """Run windows forward and backward, and keep inputs and gradients of some linears in files, in 16 bits.

    Args:
        model: a causal language model of transformers; its parameters no longer require gradients then.
        ids_NS: the windows.
        names: of linears.
        folder: where a file for each window goes.
        seed: of the labels.
        progress: called with (windows done, windows in total).

    Raises:
        SecateurError: a gradient is not finite.
    """
    linears = {name: model.get_submodule(name) for name in names}
    model.eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    files = []
    for n, ids_S in enumerate(ids_NS):
        inputs: dict[str, Tensor] = {}
        gradients: dict[str, list[Tensor]] = {name: [] for name in linears}

        def watch(name: str, inputs: dict[str, Tensor] = inputs, gradients: dict[str, list[Tensor]] = gradients) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                inputs[name] = args[0].detach()
                if out.requires_grad:
                    out.register_hook(lambda g: gradients[name].append(g.reshape(-1, g.shape[-1]).bfloat16()))

            return hook

        rows: dict[str, Tensor] = {}
        handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
        handles += [_note_rows(name, module, rows) for name, module in experts_in(model).items()]
        handles.append(want_gradients(model))
        try:
            with torch.enable_grad():
                logits_SV = model(input_ids=ids_S[None].to(model.device), use_cache=False).logits[0].float()
                likely_SV = logits_SV.log_softmax(1)
                for label in range(LABELS):
                    drawn_S1 = torch.multinomial(likely_SV.detach().exp().cpu(), 1, generator=draw)
                    chosen_S1 = likely_SV.gather(1, drawn_S1.to(likely_SV.device))
                    chosen_S1.sum().backward(retain_graph=label + 1 < LABELS)
        finally:
            for handle in handles:
                handle.remove()
        files.append(folder / f"effects-{n:04d}.safetensors")
        _write(files[-1], inputs, gradients, rows, len(ids_S))
        progress(n + 1, len(ids_NS))
    return Effects(files)


def want_gradients(model: Any) -> RemovableHandle:
    """Until it is removed, gradients reach the outputs of linears, though no parameter wants any: those of embeddings do."""
    handle: RemovableHandle = model.get_input_embeddings().register_forward_hook(
        lambda _, __, out: out.requires_grad_(True)
    )
    return handle


def _note_rows(name: str, module: Experts, rows: dict[str, Tensor]) -> RemovableHandle:
    """Have it noted which tokens each expert of a module is sent."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen_TK = chosen_by(module.count, (*args, *kwargs.values()))
        for e in chosen_TK.unique().tolist():
            if e >= 0:
                rows[f"{name}.{e}.{_PLACES}"] = torch.where(chosen_TK == e)[0]

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _write(
    file: Path, inputs: dict[str, Tensor], gradients: dict[str, list[Tensor]], rows: dict[str, Tensor], tokens: int
) -> None:
    """Inputs that several linears share are written once; the file's metadata tells which.

    Args:
        rows: which tokens each expert was sent. One that was sent none has neither inputs nor gradients.
    """
    tensors = {name: row_R.int().cpu().contiguous() for name, row_R in rows.items()}
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for name, x in inputs.items():
        owner = first.setdefault((x.data_ptr(), x.shape, x._version), name)
        if owner == name:
            tensors[f"{name}.x"] = x.reshape(-1, x.shape[-1]).bfloat16().cpu().contiguous()
        else:
            same[name] = owner
        gradient_LTO = torch.stack(gradients[name]).cpu()
        if not torch.isfinite(gradient_LTO).all():
            raise SecateurError(
                f"the gradient of {name} is not finite: the model overflows on the calibration text, or its weights are damaged"
            )
        tensors[f"{name}.g"] = gradient_LTO
    save_file(tensors, file, metadata={**same, _TOKENS: str(tokens)})
