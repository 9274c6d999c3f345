"""How a model uses its experts, as a heat map: a row for each layer, a column for each expert."""

from __future__ import annotations

from pathlib import Path

from secateur.experts.use_of_experts import ExpertUse
from secateur.report.bench_plot import check_plot, save_plot

USE = "use"


def plot_experts(found: ExpertUse, file: Path, what: str = USE) -> None:
    """Write a heat map of the share of tokens that each expert is sent, or of a score, with a mark on super experts.

    Args:
        what: `use`, or the name of a score.

    Raises:
        UsageError: the file has another ending than .png or .svg, cannot be written, or matplotlib is missing.
    """
    check_plot(file)
    # Not pyplot, which would keep figures for the whole process and may look for a screen.
    from matplotlib.figure import Figure

    values = [layer.share if what == USE else layer.scores[what] for layer in found.layers]
    count = len(values[0])
    size = (2.5 + min(0.4 * count, 14), 1.8 + min(0.3 * len(values), 14))
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    label = "share of tokens" if what == USE else f"score by {what}"
    figure.colorbar(image, ax=axes, label=label)
    supers = [(e, y) for y, layer in enumerate(found.layers) for e in layer.supers]
    if supers:
        axes.scatter(*zip(*supers, strict=True), marker="*", color="red", label="super expert")
        axes.legend(loc="upper right", fontsize="small")
    axes.set_title(f"Experts of {found.model}", fontsize="medium", parse_math=False)
    axes.set_xlabel("number of the expert")
    axes.set_ylabel("layer of experts")
    save_plot(figure, file)
