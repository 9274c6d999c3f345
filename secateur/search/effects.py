"""What a change of a linear does to the predictions of the whole model, from one backward pass.

N: windows, S: tokens of a window, T: tokens of all windows, O: output features, I: input features, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.errors import SecateurError

# Labels drawn for each prediction: each is a backward pass.
LABELS = 2
# Tokens whose effects are summed before they are squared. What a linear does at neighbouring tokens acts on the same
# predictions and hangs together; over longer stretches the sum is mostly noise of the drawn labels.
_STRETCH = 16


class Effects:
    """The divergence that a change of one linear's weights would cause, of second order around the model as it is.

    For a change ΔW of the weights, KL(model ‖ changed) ≈ ½ E[(Σ_t g_t·ΔW x_t)²], where x_t are the linear's inputs and g_t the
    gradients, with respect to its outputs, of the log-likelihood of labels that are drawn from the model's own predictions: the
    expectation of their outer product is the Fisher information (Kunstner et al. 2019, arXiv:1905.12558, section 2.2).
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def divergence(self, name: str, changes: Iterable[Tensor]) -> list[float]:
        """For each changed weight ΔW_OI of a linear the divergence that it causes, in nats a token."""
        x_TI, g_LTO = self._read(name)
        tokens = g_LTO.shape[0] * len(x_TI)
        found = []
        for change_OI in changes:
            out_TO = x_TI.to(change_OI.device) @ change_OI.T
            effect_LT = (g_LTO.to(out_TO.device) * out_TO).sum(2)
            stretches = nn.functional.pad(effect_LT, (0, -len(x_TI) % _STRETCH)).unflatten(1, (-1, _STRETCH)).sum(2)
            found.append(stretches.double().square().sum().item() / (2 * tokens))
        return found

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        inputs, gradients = [], []
        for file in self._files:
            with safe_open(file, "pt") as stored:
                alias = (stored.metadata() or {}).get(name, name)
                inputs.append(stored.get_tensor(f"{alias}.x").float())
                gradients.append(stored.get_tensor(f"{name}.g").float())
        return torch.cat(inputs), torch.cat(gradients, 1)


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

        handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
        # The first linear's output has to hang on something that wants a gradient.
        handles.append(model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True)))
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
        _write(files[-1], inputs, gradients)
        progress(n + 1, len(ids_NS))
    return Effects(files)


def _write(file: Path, inputs: dict[str, Tensor], gradients: dict[str, list[Tensor]]) -> None:
    """Inputs that several linears share are written once; the file's metadata tells which."""
    tensors: dict[str, Tensor] = {}
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
    save_file(tensors, file, metadata=same)
