"""`compress`: from a model and a recipe to a smaller checkpoint folder.

O: output features, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn

from secateur._version import __version__
from secateur.calibration.fisher import fisher
from secateur.calibration.stats import InputStats, Level
from secateur.codes import Quantized
from secateur.errors import SecateurError, UsageError
from secateur.formats.choose import layout_for
from secateur.formats.hf import quantization_config
from secateur.formats.layout import Layout, all_finite
from secateur.formats.writer import ShardWriter, staged_folder, write_manifest
from secateur.pipeline.calibrate import calibration_ids
from secateur.pipeline.capture import BlockCall, BlockCalls, group_by_input
from secateur.pipeline.load import load_source, open_device
from secateur.pipeline.plan import Plan, plan
from secateur.pipeline.report import LinearReport, Progress, Report, peak_memory, relative_error
from secateur.pipeline.source import Source, open_source, save_config
from secateur.pipeline.structure import (
    Linear,
    block_linears,
    build_skeleton,
    check_no_experts,
    find_blocks,
    generalise,
    is_transposed,
    parameters_outside,
    select_linears,
    weight_matrix,
)
from secateur.pipeline.walk import in_batches, solve_in_pass
from secateur.pipeline.weights import ModelWeights, converted, materialise, place, release
from secateur.prune import Pruned
from secateur.prune.patterns import NM
from secateur.recipe import Quantization, Recipe

# More tokens at a time are not faster on a CPU: the activations of a batch then leave its caches.
_MOST_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
_PROBE_TOKENS = 8


def compress(
    model: str,
    out: str | Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    batch_tokens: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Compress a model and write the result to the folder `out`.

    Args:
        model: a Hugging Face folder, a hub id, a `.gguf` file or `demo`.
        out: the folder to make. Nothing stands under this name until the run has ended well.
        recipe: what to do.
        device: where blocks are run and solved.
        batch_tokens: how many tokens are run at a time; None chooses by the free memory.
        overwrite: whether `out` may be replaced.
        trust_remote_code: whether code that comes with the model may run.
        progress: told of every step.

    Raises:
        SecateurError: with one line for the user; `UsageError` where the request itself cannot be met.
    """
    started = time.monotonic()
    resolved = plan(recipe)
    target = open_device(device)
    with staged_folder(Path(out), overwrite) as folder, torch.no_grad():
        progress(Progress("opening the model"))
        source = open_source(model, trust_remote_code)
        run = _Run(source, recipe, resolved, target, batch_tokens, folder, progress)
        report = run.run()
    report.out = Path(out)
    report.seconds = time.monotonic() - started
    report.peak_bytes = peak_memory()
    return report


@dataclass
class _Run:
    """One run of `compress`: what its steps share."""

    source: Source
    recipe: Recipe
    plan: Plan
    device: torch.device
    batch_tokens: int | None
    folder: Path
    progress: Callable[[Progress], None]
    linears: list[LinearReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    block: int = 0
    blocks_started: float = 0.0

    def run(self) -> Report:
        # Blocks are run in float32 on a CPU, which few of them slow down for; a GPU is made for the model's own dtype.
        self.compute_dtype = self.source.dtype if self.device.type == "cuda" else torch.float32
        self.model: Any = build_skeleton(self.source, self.compute_dtype)
        self.parameters = sum(p.numel() for p in self.model.parameters())  # now, while tied ones are one
        self.prefix, self.blocks = find_blocks(self.model)
        names: list[str] = []
        for i, block in enumerate(self.blocks):
            check_no_experts(block, f"{self.prefix}.{i}")
            names += block_linears(block, f"{self.prefix}.{i}")
        self.chosen = set(select_linears(names, self.recipe.targets, self.recipe.ignore))
        self._check_shapes()
        self.weights = ModelWeights(self.source, self.model)
        self.writer = ShardWriter(self.folder)
        self.written: set[str] = set()

        if self.plan.quantizer is not None:
            # With the method's own defaults filled in, so that the manifest repeats the run in later versions, too.
            options = asdict(self.plan.quantizer)  # type: ignore[call-overload]
            self.recipe = replace(self.recipe, quantization=Quantization(**options))
        level = self.plan.level
        calibration: dict[str, Any] = {"level": level.name.lower()}
        ids_NS = None
        if level > Level.NONE or self.plan.needs_fisher:
            settings = self.recipe.calibration
            ids_NS, settings = calibration_ids(self.source, settings, self.device, lambda s: self.progress(Progress(s)))
            self.recipe = replace(self.recipe, calibration=settings)
            calibration.update(samples=ids_NS.shape[0], seq_len=ids_NS.shape[1], tokens=ids_NS.numel())

        self.fisher: dict[str, Tensor] = {}
        if self.plan.needs_fisher and ids_NS is not None:
            calibration["fisher"] = True
            self.fisher = self._gather_fisher(ids_NS)
        self.progress(Progress("copying what is not compressed"))
        self._write_outside()
        if ids_NS is None or level == Level.NONE:
            self._solve_without_inputs()
        else:
            self._solve_with_inputs(ids_NS)
        return self._finish(names, calibration)

    def _gather_fisher(self, ids_NS: Tensor) -> dict[str, Tensor]:
        stage = "computing gradients"
        self.progress(Progress(stage))
        # In float32 on a CPU: half precision is emulated by most.
        dtype = self.source.dtype if self.device.type == "cuda" else torch.float32
        model = load_source(self.source, dtype, self.device, check_finite=True)
        return fisher(
            model,
            ids_NS,
            sorted(self.chosen),
            lambda done, total: self.progress(Progress(f"{stage}: {done} of {total} windows")),
        )

    def _check_shapes(self) -> None:
        pattern = self.plan.pruning.pattern if self.plan.pruning else None
        if not isinstance(pattern, NM):
            return
        for name in sorted(self.chosen):
            features = weight_matrix(self.model.get_submodule(name)).shape[1]
            if features % pattern.m:
                raise UsageError(
                    f"{name} has {features} input features, which do not divide into groups of {pattern.m}: "
                    f"choose another pattern, or leave it alone with --ignore '{name}'"
                )

    # --- writing

    def _write_plain(self, name: str) -> None:
        if name in self.weights and name not in self.written:
            self.writer.add(self.weights.name_to_write(name), self._converted(name, self.weights[name]))
            self.written.add(name)

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        return converted(name, tensor, self.plan.dtype, "give another --dtype")

    def _write_outside(self) -> None:
        for name, _ in parameters_outside(self.model, self.blocks):
            self._write_plain(name)
        for name in self.weights.unused:
            self.writer.add(name, self._converted(name, self.weights.stored(name)))

    # --- blocks

    def _each_block(self) -> Any:
        self.blocks_started = time.monotonic()
        for number, block in enumerate(self.blocks):
            self.block = number
            prefix = f"{self.prefix}.{number}"
            yield prefix, block
            for name in block.state_dict():
                if (
                    name.removesuffix(".weight") == name
                    or f"{prefix}.{name.removesuffix('.weight')}" not in self.chosen
                ):
                    self._write_plain(f"{prefix}.{name}")
            release(block)

    def _solve_without_inputs(self) -> None:
        for prefix, block in self._each_block():
            linears = block_linears(block, prefix)
            for name in filter(self.chosen.__contains__, linears):
                part = name.removeprefix(f"{prefix}.")
                materialise(block, prefix, [f"{part}.weight"], self.weights, torch.float32, self.device)
                features = weight_matrix(linears[name]).shape[1]
                self._solve([name], InputStats.empty(features, Level.NONE, self.device), linears)

    def _solve_with_inputs(self, ids_NS: Tensor) -> None:
        first = f"{self.prefix}.0"
        for name, _ in parameters_outside(self.model, self.blocks):
            # The head computes logits, which nobody reads here.
            if not self._only_in_head(name):
                materialise(self.model, "", [name], self.weights, self.compute_dtype, self.device)
        self.model.tie_weights()
        self._move_buffers(self.model)
        materialise(
            self.blocks[0], first, list(self.blocks[0].state_dict()), self.weights, self.compute_dtype, self.device
        )

        catcher = BlockCalls(self.model, self.blocks, ids_NS[:1, :_PROBE_TOKENS].to(self.device))
        batch_tokens = self.batch_tokens or self._batch_tokens(ids_NS.shape[1])
        calls = [catcher.catch(batch_NS.to(self.device)) for batch_NS in in_batches(ids_NS, batch_tokens)]
        hiddens = [batch[0].hidden for batch in calls]
        for batch in calls:
            for call in batch:
                call.hidden = call.hidden[:0, :0].clone()
        self._release_outside()

        for prefix, block in self._each_block():
            materialise(block, prefix, list(block.state_dict()), self.weights, self.compute_dtype, self.device)
            everything = block_linears(block, prefix)
            linears = {name: everything[name] for name in everything if name in self.chosen}
            if not linears and self.block + 1 == len(self.blocks):
                continue
            probe = catcher.probe[self.block]
            groups = group_by_input(block, BlockCall(catcher.probe[0].hidden, probe.args, probe.kwargs), linears)
            hiddens = solve_in_pass(
                block,
                [batch[self.block] for batch in calls],
                hiddens,
                groups,
                linears,
                self.plan.level,
                lambda names, stats, linears=linears: self._solve(names, stats, linears),  # type: ignore[misc]
                last=self.block + 1 == len(self.blocks),
            )
            if not all(map(all_finite, hiddens)):
                raise SecateurError(
                    f"the output of {prefix} is not finite: the model overflows in {self.compute_dtype}"
                )

    def _only_in_head(self, name: str) -> bool:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return owner is self.model.get_output_embeddings() and owner is not self.model.get_input_embeddings()

    def _move_buffers(self, model: nn.Module) -> None:
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    place(module, leaf, buffer.to(self.device))

    def _release_outside(self) -> None:
        for module in self.model.modules():
            if not any(module is part for block in self.blocks for part in block.modules()):
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        place(module, leaf, parameter.detach().to("meta"))

    def _batch_tokens(self, seq_len: int) -> int:
        """As many tokens at a time as a quarter of the free memory holds, up to what is still faster; whole powers of two."""
        cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else psutil.virtual_memory().available
        features = sum(sum(weight_matrix(linear).shape) for linear in block_linears(self.blocks[0], "").values())
        affordable = free // 4 // (2 * 4 * features)
        tokens = _MOST_BATCH_TOKENS.get(self.device.type, 2048)
        while tokens > max(affordable, seq_len):
            tokens //= 2
        return tokens

    # --- solving

    def _solve(self, names: list[str], stats: InputStats, linears: dict[str, Linear]) -> None:
        """Solve linears that read the same input as one matrix, put the result in place and hand it to the writer."""
        W_OI = torch.cat([weight_matrix(linears[name]).float() for name in names])
        sizes = [weight_matrix(linears[name]).shape[0] for name in names]
        pruned = self._prune(W_OI, stats, sizes, names)
        solved: list[Tensor] | list[Quantized]
        if self.plan.quantizer is None:
            assert pruned is not None
            solved = list(pruned.W_OI.split(sizes))
        else:
            fisher_OI = torch.cat([self.fisher.pop(name) for name in names]).to(W_OI.device) if self.fisher else None
            dtype = self.plan.dtype or self.weights.dtype(f"{names[0]}.weight")
            solved = self.plan.quantizer.solve(W_OI, stats, sizes, dtype, pruned, fisher_OI)
            self._note(names, solved[0].notes)
        for i, (name, dense_OI) in enumerate(zip(names, W_OI.split(sizes), strict=True)):
            self._put(name, linears[name], dense_OI, solved[i], stats)

    def _prune(self, W_OI: Tensor, stats: InputStats, sizes: list[int], names: list[str]) -> Pruned | None:
        if self.plan.pruning is None:
            return None
        pruner, refiner, pattern = self.plan.pruning.pruner, self.plan.pruning.refiner, self.plan.pruning.pattern
        pruned = pruner.solve(W_OI, stats, pattern, sizes)
        if refiner is not None:
            keep_OI = refiner.solve(W_OI, pruned.keep_OI, stats, pattern)
            pruned = Pruned(W_OI * keep_OI, keep_OI, pruned.notes)
        self._note(names, pruned.notes)
        return pruned

    def _note(self, names: list[str], notes: tuple[str, ...]) -> None:
        for note in notes:
            said = f"{', '.join(names)}: {note}"
            if said not in self.notes:  # a pruner and a quantizer may find the same
                self.notes.append(said)

    def _put(self, name: str, linear: Linear, dense_OI: Tensor, new: Tensor | Quantized, stats: InputStats) -> None:
        weight = f"{name}.weight"
        transposed = is_transposed(linear)
        layout: Layout | None
        packable: Tensor | Quantized
        if isinstance(new, Quantized):
            W_OI, packable = new.dequantize(), new.cpu()
            stored, outliers = new.stored, new.outlier_count
            layout = None if self.plan.dense else layout_for(new)
        else:
            # Adding zero leaves no negative zero where a negative weight was.
            W_OI = new.to(self.plan.dtype or self.weights.dtype(weight)).add(0).contiguous()
            packable = W_OI.cpu()
            stored, outliers = int(torch.count_nonzero(W_OI)), 0
            layout = self.plan.layout
        if not all_finite(W_OI):
            raise SecateurError(
                f"{name}: weights that make up for the error of others overflow {W_OI.dtype}: give --dtype float32"
            )
        if layout is None:
            parts = {weight: W_OI.T if transposed else W_OI}
        else:
            packed = layout.pack(packable)
            parts = {f"{weight}.{part}": tensor for part, tensor in packed.items()}
            self.entries[name] = {**layout.to_config(), **({"transposed": True} if transposed else {})}
        for part, tensor in parts.items():
            self.writer.add(part, tensor)
        self.written.add(weight)
        used = W_OI.to(linear.get_parameter("weight").dtype)
        place(linear, "weight", used.T if transposed else used)

        size = sum(tensor.nbytes for tensor in parts.values())
        error, kind = relative_error(dense_OI, W_OI.float(), stats)
        report = LinearReport(
            name=name,
            shape=(W_OI.shape[0], W_OI.shape[1]),
            layout=layout.name if layout else "dense",
            sparsity=1 - stored / W_OI.numel(),
            outliers=outliers / W_OI.numel(),
            bits=8 * size / W_OI.numel(),
            bytes=size,
            error=error,
            error_kind=kind,
        )
        self.linears.append(report)
        spent = time.monotonic() - self.blocks_started
        share = len(self.linears) / len(self.chosen)
        left = spent / share - spent
        self.progress(Progress("compressing", self.block, len(self.blocks), report, left, peak_memory()))

    # --- the end

    def _finish(self, names: list[str], calibration: dict[str, Any]) -> Report:
        self.progress(Progress("writing"))
        self.writer.finish()
        quantization = None
        if self.entries:
            absent = set(names) - self.chosen
            quantization = quantization_config(generalise(self.entries, self.prefix, absent))
        dtype = self.plan.dtype or self.source.dtype
        save_config(self.source.config, self.folder, dtype, quantization)
        self.source.write_companions(self.folder)
        report = Report(self.folder, self.linears, self.notes, calibration, parameters=self.parameters)
        report.bytes = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        report.source_bytes = sum(f.stat().st_size for f in self.source.files)
        write_manifest(self.folder, self._manifest(report))
        return report

    def _manifest(self, report: Report) -> dict[str, Any]:
        return {
            "secateur": __version__,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "source": {"model": self.source.name, "sha256": self.source.hashes()},
            "recipe": self.recipe.to_dict(),
            "calibration": report.calibration,
            "parameters": report.parameters,
            "weight_bytes": report.bytes,
            "sparsity": report.sparsity,
            "bits": report.bits,
            "notes": report.notes,
            "linears": {
                linear.name: {
                    "shape": list(linear.shape),
                    "layout": linear.layout,
                    "sparsity": linear.sparsity,
                    "outliers": linear.outliers,
                    "bits": linear.bits,
                    "bytes": linear.bytes,
                    "error": linear.error,
                    "error_kind": linear.error_kind,
                }
                for linear in report.linears
            },
        }
