"""The calibration windows of a run, in all its processes.

N: windows, S: tokens of a window.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from secateur.calibration.kept_windows import SELF, calibration_ids, is_kept
from secateur.core.stats import Level
from secateur.model.structure import weight_matrix
from secateur.pipeline.job import Job
from secateur.pipeline.prepared import Prepared
from secateur.recipes.recipe import Calibration


@dataclass(frozen=True)
class Windows:
    """Windows of calibration text.

    Attributes:
        ids_NS: of all processes.
        settings: the calibration with its numbers filled in.
        bos_ids: what the tokenizer puts before a text, where windows begin with it.
    """

    ids_NS: Tensor
    settings: Calibration
    bos_ids: list[int]

    def record(self, needs_fisher: bool) -> dict[str, Any]:
        """What the manifest says of them."""
        samples, seq_len = self.ids_NS.shape
        said = {"samples": samples, "seq_len": seq_len, "tokens": self.ids_NS.numel(), "bos": bool(self.bos_ids)}
        return {**said, "fisher": True} if needs_fisher else said


def windows_of(job: Job) -> Windows:
    """The windows of a recipe, in this process."""
    asked = job.recipe.calibration, job.device, job.say, job.limit is not None
    known = job.shared or job.text
    return Windows(*(calibration_ids(job.source, *asked) if known is None else known.calibration_ids(*asked)))


def calibrate(job: Job, prepared: Prepared) -> tuple[Job, Windows | None]:
    """The windows, in all processes, and the job with their numbers in its recipe; None where methods look at no text.

    Raises:
        UsageError: the model has to be in memory as a whole for it, and may not.
    """
    if not job.plan.needs_text:
        return job, None
    what, instead = "`calibration` self", "`calibration` docs or a file of text"
    if job.plan.needs_fisher:
        what, instead = "`sensitivity` fisher", "`sensitivity` hessian"
    job.room.check(whole_memory(job, prepared), what, instead)
    said, tensors = None, []
    if job.ranks.first:
        windows = windows_of(job)
        said, tensors = [asdict(windows.settings), windows.bos_ids], [windows.ids_NS]
    (settings, bos_ids), (ids_NS,) = job.ranks.share_with_tensors(said, tensors)
    windows = Windows(ids_NS, Calibration(**settings), bos_ids)
    return replace(job, recipe=replace(job.recipe, calibration=windows.settings)), windows


def whole_memory(job: Job, prepared: Prepared) -> int:
    """The most memory that the process takes where the model has to be in memory as a whole, in bytes; 0 where it has not."""
    wanted = job.recipe.calibration
    sampled = (
        (job.plan.level > Level.NONE or job.plan.expert_skip is not None)
        and wanted.source == SELF
        and not is_kept(job.source, wanted, job.device)
    )
    if not (sampled or job.plan.needs_fisher):
        return 0
    size = prepared.whole_memory
    if job.plan.needs_fisher:
        sizes = [weight_matrix(prepared.linear(name)).numel() for name in prepared.chosen]
        size += 4 * (sum(sizes) + max(sizes))
    return size
