"""`compress`: from a model and a recipe to a smaller checkpoint folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur._version import __version__
from secateur.calibration.text import inputs_of
from secateur.checkpoint.card import write_card
from secateur.checkpoint.verify import verify as verify_folder
from secateur.core.ranks import open_ranks
from secateur.errors import RepeatedError
from secateur.folder.reader import read_json
from secateur.folder.writer import write_manifest
from secateur.formats.stored_weights import quantization_config
from secateur.gates.section import SECTION
from secateur.memory.peak import peak_memory
from secateur.memory.room import limit_memory
from secateur.model.in_memory import open_files
from secateur.model.load import open_device
from secateur.model.source import Source, save_config, save_untied
from secateur.model.structure import empty_linears
from secateur.pipeline.gating import note_zeros, split_entries
from secateur.pipeline.job import Job
from secateur.pipeline.outcome import LinearReport, Progress, Report
from secateur.pipeline.run import Run, run, versions
from secateur.pipeline.shared import Shared
from secateur.recipes.built_in import as_recipe
from secateur.recipes.plan import plan
from secateur.recipes.recipe import Recipe
from secateur.runs.drop_experts import with_fewer_experts
from secateur.runs.skip_calibration import add_skip
from secateur.search.goal import Goal, goal_of
from secateur.search.search import search
from secateur.unfinished.partial import partial_folder
from secateur.walking.clock import Clock


def compress(  # noqa: PLR0913 - users name them
    model: str | PreTrainedModel,
    out: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    tokenizer: Any = None,
    device: str = "cpu",
    batch_tokens: int | None = None,
    max_memory: str | int | None = None,
    resume: bool = False,
    verify: bool = True,
    card: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    shared: Shared | None = None,
) -> Report:
    """Compress a model and write the result to the folder `out`.

    Under torchrun all processes call it with the same arguments; they share the work, and the first writes.

    Args:
        model: a Hugging Face folder, a hub id (`id@revision` for a branch, tag or commit), a `.gguf` file or `demo`; or a
            model of transformers in memory, which is saved first to a folder beside `out`, of the size of its weights, that is
            removed at the end.
        out: the folder to make. Nothing stands under this name until the run has ended well; until then `OUT.partial` has
            what is done.
        recipe: what to do: a recipe, a dict as a recipe file would hold it, the name of a built-in recipe, or a recipe file.
        tokenizer: of a model in memory, which comes along, and is needed where text is.
        device: where blocks are run and solved.
        batch_tokens: how many tokens are run at a time; None chooses by the memory that is free, or `max_memory`.
        max_memory: the most memory of the host that each process may have in use, in bytes or in words such as `8GiB`. The C
            library then gives back what is freed at once, from here on in this process.
        resume: whether to go on with a run that was interrupted, if there is one. The result has the same bytes.
        verify: whether to check the new checkpoint before it gets its name.
        card: whether `README.md` is to say how to open the folder, before what that of the source says.
        overwrite: whether `out` may be replaced, if secateur wrote it or it is empty, and an unfinished run be begun again.
        revision: branch, tag or commit of a model of the hub, as `id@revision` says it too.
        trust_remote_code: whether code that comes with the model may run.
        progress: told of every step, in the first process.
        shared: what other runs on the same model have found, the open model included.

    Raises:
        SecateurError: with one line for the user; `UsageError` where the request itself cannot be met.
    """
    started = time.monotonic()
    recipe = as_recipe(recipe)
    inputs = {"MODEL": model if isinstance(model, str | Path) else None}
    inputs |= inputs_of("the calibration text", recipe.calibration.source)
    resolved, goal = plan(recipe), goal_of(recipe)
    limit = limit_memory(max_memory)
    more: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": resolved.dtype}
    with (
        open_ranks(open_device, device) as ranks,
        partial_folder(out, overwrite, resume, ranks, inputs) as partial,
        torch.no_grad(),
        ExitStack() as opened,
    ):
        progress = progress if ranks.first else lambda _: None
        progress(Progress("opening the model"))
        source = (
            shared.source if shared is not None else opened.enter_context(open_files(model, tokenizer, out, **more))
        )
        job = Job(source, recipe, resolved, ranks, batch_tokens, limit, progress, shared)
        clock = Clock(ranks.device)
        job = with_fewer_experts(job, partial.folder, clock)
        if goal is not None:
            job = _searched(job, goal, partial.folder, clock)
        report = _finish(run(job, partial, clock), overwrite, verify, card)
    report.out = Path(out)
    report.seconds = time.monotonic() - started
    report.peak_bytes = peak_memory()
    return report


def _searched(job: Job, goal: Goal, folder: Path, clock: Clock) -> Job:
    """A job with what is best for each linear filled into its recipe; `folder` is that of its unfinished run."""

    def attempt(chosen: Recipe, out: Path) -> None:
        compress(
            job.source.name,
            out,
            chosen,
            device=str(job.device),
            batch_tokens=job.batch_tokens,
            verify=False,
            shared=job.shared or Shared(job.given, out.parent),
        )

    with clock("searching"):
        return job.with_recipe(search(job, goal, folder, attempt))


def _finish(run: Run, overwrite: bool, verify: bool, card: bool) -> Report:
    """Put the checkpoint together, in the first process, and give it its name."""
    report, partial = run.report(), run.partial
    if not run.job.ranks.first:
        return report
    if partial.complete:
        run.job.say("the run had ended: cleaning up")
        partial.clean_up()
    else:
        run.job.say("writing")
        with run.clock("ending"):
            folder = put_together(run, report, card)
            if verify:
                run.job.say("verifying")
                _verify(run.job.source, folder)
            partial.finish(overwrite)
    report.bytes = sum(f.stat().st_size for f in partial.out.glob("*.safetensors"))
    report.phases = dict(run.clock.seconds)
    return report


def _verify(source: Source, folder: Path) -> None:
    problems = verify_folder(folder, trust_remote_code=source.trust_remote_code)
    # A source may come without a tokenizer, if nothing is to be calibrated.
    problems = [p for p in problems if p.where != "tokenizer" or source.has_tokenizer]
    if problems:
        raise RepeatedError(
            f"the new checkpoint is not sound, which should not happen unless the disk is failing: {problems[0]} "
            f"({len(problems)} problems in all)"
        )


def put_together(run: Run, report: Report, card: bool = True) -> Path:
    """Make the checkpoint of what a run has recorded; the folder that it is in."""
    folder, prepared, source = run.partial.assemble(), run.prepared, run.job.source
    quantization = None
    if run.recorder.entries:
        absent = (set(prepared.names) - prepared.chosen) | empty_linears(prepared.model)
        layouts, section = split_entries(run.recorder.entries, run.job.plan, prepared.names)
        quantization = quantization_config(prepared.weights.generalised(layouts, prepared.lists, absent))
        if section is not None:
            quantization[SECTION] = section.to_dict()
    save_config(prepared.written, folder, run.job.plan.dtype, quantization, type(prepared.model).__name__)
    if prepared.weights.untied:
        save_untied(folder)
    report.notes = [*report.notes, *note_zeros(run.recorder.entries), *source.write_companions(folder)]
    if run.job.plan.expert_skip is not None:
        add_skip(run, folder)
    report.bytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    manifest = _manifest(run, report)
    if card:
        write_card(folder, source.name, read_json(folder / "config.json"), manifest, source.hub_name)
    write_manifest(folder, manifest)
    return folder


def _manifest(run: Run, report: Report) -> dict[str, Any]:
    return {
        "secateur": __version__,
        "versions": {name: version for name, version in versions().items() if name != "secateur"},
        "source": {"model": run.job.source.name, "sha256": run.job.source.hashes},
        "recipe": run.job.recipe.to_dict(),
        "calibration": report.calibration,
        "parameters": report.parameters,
        **({"structure": report.structure} if report.structure is not None else {}),
        "weight_bytes": report.bytes,
        "sparsity": report.sparsity,
        "bits": report.bits,
        "notes": report.notes,
        "unused": run.prepared.weights.unused,
        "linears": {linear.name: _told(linear) for linear in report.linears},
        **({"tables": {table.name: _told(table) for table in report.tables}} if report.tables else {}),
    }


def _told(linear: LinearReport) -> dict[str, Any]:
    """What a manifest says of a linear."""
    return {
        "shape": list(linear.shape),
        "layout": linear.layout,
        "sparsity": linear.sparsity,
        "outliers": linear.outliers,
        "bits": linear.bits,
        "bytes": linear.bytes,
        "error": linear.error,
        "error_kind": linear.error_kind,
        "tokens": linear.tokens,
        "borrowed": linear.borrowed,
        **linear.chosen(),
    }
