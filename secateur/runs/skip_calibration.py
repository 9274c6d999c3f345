"""Finding out, once a mixture is compressed, which experts are weak: its config says so to whoever loads it."""

from __future__ import annotations

from pathlib import Path

from secateur.folder.reader import read_json
from secateur.folder.writer import write_json
from secateur.kernels.backends import AUTO
from secateur.mixture.skipping import KEY, quantiles_on, section_of
from secateur.model.load import load_source, load_within
from secateur.model.source import open_source
from secateur.pipeline.run import Run

# Ratios of some tens of thousands of tokens are known to a hundredth.
_TOKENS = 2**14


def add_skip(run: Run, folder: Path) -> None:
    """Run the first calibration windows through a checkpoint that is in place, and write to its config what experts weigh."""
    job, share = run.job, run.job.plan.expert_skip
    assert run.windows is not None
    assert share is not None
    source = open_source(str(folder), job.source.trust_remote_code, codes=True)
    if job.limit is None:
        model = load_source(source, source.dtype, job.device, backend=AUTO)
    else:
        model = load_within(source, source.dtype, job.device, job.limit, AUTO)
    ids_NS = run.windows.ids_NS
    windows = list(ids_NS[: max(1, _TOKENS // ids_NS.shape[1])])
    found = quantiles_on(model, windows, lambda done, total: job.say(f"weighing experts, window {done} of {total}"))
    content = read_json(folder / "config.json")
    content["quantization_config"][KEY] = section_of(share, found)
    write_json(folder / "config.json", content)
