"""Reliability diagrams with the histogram of confidences, drawn with matplotlib (the extra ``calseg[plots]``).

The diagrams show the counts and sums of :class:`calseg.CalibrationBins`, so that the diagram of a whole data set needs
no volume in memory. Bars, gaps and spread differ in lightness and texture, so that they can be told apart in grey-scale
print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "matplotlib":
        raise
    raise ModuleNotFoundError("calseg.plots needs matplotlib: pip install 'calseg[plots]'", name="matplotlib") from None

from calseg.calibration import BINNED, CalibrationBins
from calseg.errors import brief
from calseg.scores import quiet_calibration_error

__all__ = ["class_reliability_diagrams", "class_reliability_map", "reliability_diagram"]

BAR, GAP, INK = "#9ecae1", "#b2182b", "#222222"
QUANTILES = (0.05, 0.95)
LEAST_CASES = 3
"""Least number of cases with voxels in a bin for which the spread over the cases is drawn."""


def reliability_diagram(
    bins: CalibrationBins,
    *,
    cases: CalibrationBins | None = None,
    title: str | None = None,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the accuracy of each bin over confidence, and below it a histogram of the voxels, on a logarithmic axis.

    The bar of a bin ends at its accuracy. The hatched part between accuracy and mean confidence is the gap that the
    calibration error sums up. A text in the corner gives the ECE and the number of voxels.

    Args:
        bins: top-label bins ``[n_bins]``, or those of one class.
        cases: the bins of each case, ``[cases, n_bins]``. If they are given, every bin in which at least three cases
            have voxels gets a line from the 5 % to the 95 % quantile of the accuracies of the cases, with a dot at the
            median.
        title: title of the diagram.
        ax: axes to draw the diagram into, without the histogram. Default: a new figure with both.

    Returns:
        The figure, which is None if ``ax`` is given, and the axes. A new figure has two of them.

    Raises:
        TypeError, ValueError: the bins have the wrong type or shape.

    Example:
        >>> import torch, calseg
        >>> from calseg.plots import reliability_diagram
        >>> logits = 3 * torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> bins = calseg.calibration_bins(logits, logits.argmax(1))
        >>> figure, (diagram, histogram) = reliability_diagram(bins, title="Perfect predictions")
        >>> diagram.get_ylabel(), histogram.get_ylabel()
        ('Accuracy', 'Voxels')
    """
    _check(bins, 1, cases)
    if ax is not None:
        _draw_diagram(ax, bins, cases)
        ax.set_xlabel("Confidence")
        ax.set_title(title or "")
        return None, ax
    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, height_ratios=(3.4, 1), figsize=(3.5, 5.0), layout="constrained"
    )
    _draw_diagram(upper, bins, cases)
    _draw_histogram(lower, bins)
    upper.set_title(title or "")
    _draw_legend(figure, upper, 1 if cases is None else 2)
    return figure, (upper, lower)


def class_reliability_diagrams(
    bins: CalibrationBins,
    names: Sequence[str],
    *,
    cases: CalibrationBins | None = None,
    title: str | None = None,
) -> tuple[Any, Any]:
    """Draw a reliability diagram and a histogram for each class, in one figure with shared axes.

    Args:
        bins: class-wise bins ``[K, n_bins]``: the probability of each class against its frequency.
        names: names of the K classes.
        cases: the bins of each case, ``[cases, K, n_bins]``. If they are given, the spread over the cases is drawn.
        title: title of the figure.

    Returns:
        The figure, and an array ``[K, 2]`` of axes: diagram and histogram of each class.

    Raises:
        TypeError, ValueError: the bins have the wrong type or shape, or the number of names is not K.

    Example:
        >>> import torch, calseg
        >>> from calseg.plots import class_reliability_diagrams
        >>> logits = 3 * torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> bins = calseg.calibration_bins(logits, logits.argmax(1), class_wise=True)
        >>> figure, axes = class_reliability_diagrams(bins, ["background", "liver", "kidney", "spleen"])
        >>> axes.shape, axes[1, 0].get_title()
        ((4, 2), 'liver')
    """
    _check(bins, 2, cases, names)
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = plt.figure(figsize=(max(3.5, 0.6 + 2.3 * columns), 1.0 + 3.3 * rows), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=(3.4, 1) * rows)
    axes = np.empty((len(names), 2), dtype=object)
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        upper = figure.add_subplot(grid[2 * row, column], sharey=axes[0, 0])
        lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper, sharey=axes[0, 1])
        mine = _of_class(bins, number)
        _draw_diagram(upper, mine, None if cases is None else _of_class(cases, number), "frequency")
        _draw_histogram(lower, mine)
        upper.set_title(brief(name, 40), parse_math=False)
        upper.set_ylabel("Frequency of class")
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("Probability")
        if column:
            for each in (upper, lower):
                each.set_ylabel("")
                each.tick_params(labelleft=False)
        axes[number] = upper, lower
    if title is not None:
        figure.suptitle(title)
    _draw_legend(figure, axes[0, 0], 2)
    return figure, axes


def class_reliability_map(
    bins: CalibrationBins, names: Sequence[str], *, title: str | None = None
) -> tuple[Any, tuple[Any, Any]]:
    """Draw the bins of each class as a row of colours. It suits many classes, where a diagram of each is too much.

    The left map shows the frequency of the class in each bin of its probability, and above the classes the colours of
    perfect calibration. The right map shows the number of voxels in each bin. Bins without voxels stay white. The ECE
    of each class stands at the right.

    Args:
        bins: class-wise bins ``[K, n_bins]``: the probability of each class against its frequency.
        names: names of the K classes.
        title: title of the figure.

    Returns:
        The figure, and its axes: map of frequencies and map of voxels.

    Raises:
        TypeError, ValueError: the bins have the wrong type or shape, or the number of names is not K.

    Example:
        >>> import torch, calseg
        >>> from calseg.plots import class_reliability_map
        >>> logits = 3 * torch.randn(1, 50, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> bins = calseg.calibration_bins(logits, logits.argmax(1), class_wise=True)
        >>> figure, (frequency, voxels) = class_reliability_map(bins, [f"organ {number}" for number in range(50)])
        >>> frequency.get_xlabel(), len(frequency.get_yticklabels())
        ('Probability', 51)
    """
    _check(bins, 2, None, names)
    n_bins = bins.count.shape[1]
    count = np.ma.masked_equal(bins.count.numpy(), 0)
    perfect = (np.arange(n_bins) + 0.5) / n_bins
    frequency = np.ma.masked_invalid(np.vstack([perfect, bins.accuracy().numpy()]))
    edges, rows = np.linspace(0, 1, n_bins + 1), np.arange(len(names) + 1)
    height = 1.7 + 0.16 * len(names)
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(8.0, height), layout="constrained")
    of_frequency: dict[str, Any] = {"cmap": "cividis", "vmin": 0, "vmax": 1}
    left.pcolormesh(edges, (-2.5, -1.5), frequency[:1], **of_frequency)
    drawn = left.pcolormesh(edges, rows - 0.5, frequency[1:], **of_frequency)
    scale = LogNorm(0.1, max(10.0, float(bins.count.max())))  # a single voxel is darker than none
    counted = right.pcolormesh(edges, rows - 0.5, count, cmap="Greys", norm=scale)
    for ax, mesh, label in ((left, drawn, "Frequency of class"), (right, counted, "Voxels")):
        ax.set_xlabel("Probability")
        figure.colorbar(mesh, ax=ax, label=label, location="bottom", fraction=0.3 / height, pad=0.1 / height)
    left.set_yticks(
        [-2, *rows[:-1]], ["perfect", *(brief(name, 40) for name in names)], fontsize="x-small", parse_math=False
    )
    left.invert_yaxis()
    errors = quiet_calibration_error(bins).tolist()
    for row, error in enumerate(errors):
        text = "ECE -" if math.isnan(error) else f"ECE {error:.4f}"
        right.text(1.02, row, text, va="center", fontsize="x-small", transform=right.get_yaxis_transform())
    if title is not None:
        figure.suptitle(title)
    return figure, (left, right)


def _check(bins: Any, axes: int, cases: Any, names: Sequence[str] | None = None) -> None:
    """Check that bins have ``axes`` axes, that those of the cases have one more, and that each class has a name."""
    for name, given, wanted in (("bins", bins, axes), ("cases", cases, axes + 1)):
        if given is None and name == "cases":
            continue
        if not isinstance(given, CalibrationBins):
            raise TypeError(f"{name}: got a {type(given).__name__}, wanted CalibrationBins")
        if given.count.dim() != wanted:
            raise ValueError(f"{name}: got counts of shape {list(given.count.shape)}, wanted {wanted} axes")
    if names is not None and len(names) != len(bins.count):
        raise ValueError(f"names: got {len(names)}, wanted {len(bins.count)}: one per class of the bins")


def _of_class(bins: CalibrationBins, number: int) -> CalibrationBins:
    """Return the bins of one class."""
    binned = {name: getattr(bins, name)[..., number, :] for name in BINNED}
    return bins._replace(**binned)


def _draw_diagram(ax: Any, bins: CalibrationBins, cases: CalibrationBins | None, what: str = "accuracy") -> None:
    """Draw a reliability diagram into given axes."""
    width = 1 / len(bins.count)
    filled = np.flatnonzero(bins.count.numpy())
    edges = filled * width
    accuracy, confidence = bins.accuracy().numpy()[filled], bins.mean_confidence().numpy()[filled]
    style = {"width": width, "align": "edge", "linewidth": 0.6}
    ax.bar(edges, accuracy, color=BAR, edgecolor=INK, label=what, **style)
    ax.bar(
        edges, confidence - accuracy, bottom=accuracy, facecolor="none", edgecolor=GAP, hatch="//////",
        label="gap to confidence" if what == "accuracy" else "gap to probability", **style,
    )  # fmt: skip
    ax.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=0.9, label="perfect calibration")
    if cases is not None:
        _draw_spread(ax, cases, width)
    error = float(quiet_calibration_error(bins))
    lines = ["ECE -" if math.isnan(error) else f"ECE {error:.4f}", f"{_short(int(bins.count.sum()))} voxels"]
    if cases is not None:
        lines.append(f"{len(cases.count)} cases")
    ax.text(
        0.03, 0.97, "\n".join(lines), transform=ax.transAxes, va="top", fontsize="x-small",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1), ylabel=what.capitalize())


def _short(count: int) -> str:
    """Return a count in three digits with a unit, such as "1.23 million"."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {word}"
    return f"{count:,}"


def _draw_legend(figure: Any, ax: Any, columns: int) -> None:
    """Draw the legend of these axes below the figure."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="x-small")


def _draw_spread(ax: Any, cases: CalibrationBins, width: float) -> None:
    """Draw the quantiles of the accuracy over the cases."""
    accuracy = cases.accuracy().numpy()
    drawn = np.flatnonzero((cases.count > 0).sum(0).numpy() >= LEAST_CASES)
    if len(drawn):
        low, middle, high = np.nanquantile(accuracy[:, drawn], (QUANTILES[0], 0.5, QUANTILES[1]), axis=0)
        ax.errorbar(
            (drawn + 0.5) * width, middle, yerr=(middle - low, high - middle), color=INK, fmt="o", markersize=2.5,
            linewidth=1.0, capsize=2.0, label="cases: median, 5 % to 95 %",
        )  # fmt: skip


def _draw_histogram(ax: Any, bins: CalibrationBins) -> None:
    """Draw the number of voxels in each bin."""
    count = bins.count.numpy()
    ax.bar(np.arange(len(count)) / len(count), count, width=1 / len(count), align="edge", color="#737373")
    # Set the limits before the logarithmic scale, which cannot find them if a count is 0.
    ax.set_ylim(0.8, max(10.0, 2 * float(count.max())))
    ax.set_yscale("log")
    ax.set_xlabel("Confidence")
    ax.set_ylabel("Voxels")
