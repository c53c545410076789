"""Tests of the reliability diagrams: they show the numbers of the bins."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import labels, scores
from torch import Tensor

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402

import calseg  # noqa: E402
from calseg.plots import BAR, class_reliability_diagrams, class_reliability_map, reliability_diagram  # noqa: E402
from calseg.report import draw_diagrams  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def volumes(count: int = 6) -> tuple[Tensor, Tensor]:
    x = scores(count, 3, 8, 9, 10, dtype=torch.float32)
    guess = torch.rand((count, 8, 9, 10), generator=torch.Generator().manual_seed(3)) < 0.6
    return x, torch.where(guess, x.argmax(1), labels((count, 3, 8, 9, 10)))


def rectangles(ax) -> list[tuple[float, float, float, float]]:
    return [(r.get_x(), r.get_y(), r.get_width(), r.get_height()) for r in ax.patches]


def check_diagram(ax, bins: calseg.CalibrationBins) -> None:
    """Check the bars of bins with voxels: from 0 to the accuracy, and from there to the confidence."""
    filled = bins.count.nonzero()[:, 0]
    accuracy, confidence = bins.accuracy()[filled], bins.mean_confidence()[filled]
    drawn = torch.tensor(rectangles(ax), dtype=torch.float64)
    left, n = filled.double() / len(bins.count), len(filled)
    assert len(drawn) == 2 * n
    width = torch.full_like(left, 1 / len(bins.count))
    bars = torch.stack([left, torch.zeros_like(left), width, accuracy], 1)
    gaps = torch.stack([left, accuracy, width, confidence - accuracy], 1)
    torch.testing.assert_close(drawn, torch.cat([bars, gaps]), atol=1e-12, rtol=0)
    assert all(patch.get_hatch() for patch in ax.patches[n:])  # visible without colours
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    error = float(calseg.calibration_error_from_bins(bins))
    assert f"ECE {error:.4f}" in ax.texts[0].get_text()


def check_histogram(ax, bins: calseg.CalibrationBins) -> None:
    assert [bar.get_height() for bar in ax.patches] == bins.count.tolist()
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 1 < int(bins.count.max()) < ax.get_ylim()[1]


@pytest.mark.parametrize("n_bins", [1, 7, 15])
def test_diagram_and_histogram(n_bins: int) -> None:
    bins = calseg.calibration_bins(*volumes(), n_bins=n_bins)
    figure, (diagram, histogram) = reliability_diagram(bins, title="A title")
    check_diagram(diagram, bins)
    check_histogram(histogram, bins)
    assert diagram.get_title() == "A title"
    assert (diagram.get_ylabel(), histogram.get_xlabel(), histogram.get_ylabel()) == (
        "Accuracy",
        "Confidence",
        "Voxels",
    )
    assert "4,320 voxels" in diagram.texts[0].get_text()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "perfect calibration",
        "accuracy",
        "gap to confidence",
    ]


def test_spread_over_cases() -> None:
    bins = calseg.calibration_bins(*volumes(), per_item=True)
    _, (diagram, _) = reliability_diagram(bins.pool(), cases=bins)
    median, _, (lines,) = diagram.containers[2]
    accuracy = bins.accuracy().numpy()
    shown = [b for b in range(15) if (bins.count[:, b] > 0).sum() >= 3]
    assert 3 < len(shown) < 15
    low, middle, high = np.nanquantile(accuracy[:, shown], (0.05, 0.5, 0.95), axis=0)
    np.testing.assert_allclose(median.get_xdata(), (np.array(shown) + 0.5) / 15)
    np.testing.assert_allclose(median.get_ydata(), middle)
    ends = np.array([segment[:, 1] for segment in lines.get_segments()])
    np.testing.assert_allclose(ends, np.stack([low, high], 1), atol=1e-12)
    assert "6 cases" in diagram.texts[0].get_text()


def test_classes() -> None:
    bins = calseg.calibration_bins(*volumes(), class_wise=True, per_item=True)
    figure, axes = class_reliability_diagrams(bins.pool(), ["air", "liver", "spleen"], cases=bins, title="Organs")
    assert axes.shape == (3, 2)
    for number, (diagram, histogram) in enumerate(axes):
        mine = bins.pool()._replace(
            count=bins.count.sum(0)[number],
            confidence=bins.confidence.sum(0)[number],
            hits=bins.hits.sum(0)[number],
            partial_hits=bins.partial_hits.sum(0)[number],
        )
        check_diagram(diagram, mine)
        check_histogram(histogram, mine)
        assert diagram.get_title() == ("air", "liver", "spleen")[number]
        assert histogram.get_xlabel() == "Probability"
    assert figure.get_suptitle() == "Organs"
    assert axes[0, 0].get_ylabel() == "Frequency of class"


def test_many_classes_wrap() -> None:
    x = scores(1, 9, 6, 6, dtype=torch.float32)
    bins = calseg.calibration_bins(x, x.argmax(1), class_wise=True)
    figure, axes = class_reliability_diagrams(bins, [str(c) for c in range(9)])
    figure.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in axes.flat]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_map_of_many_classes() -> None:
    x = scores(1, 40, 12, 12, dtype=torch.float32)
    bins = calseg.calibration_bins(x, labels((1, 40, 12, 12)), class_wise=True)
    names = [f"organ ${number}" for number in range(40)]
    figure, (frequency, voxels) = class_reliability_map(bins, names, title="Organs")
    figure.savefig(io.BytesIO())
    perfect, drawn = (mesh.get_array() for mesh in frequency.collections)
    np.testing.assert_allclose(perfect[0], (np.arange(15) + 0.5) / 15)
    assert (drawn.mask == (bins.count == 0).numpy()).all()
    np.testing.assert_array_equal(drawn.compressed(), bins.accuracy()[bins.count > 0])
    np.testing.assert_array_equal(voxels.collections[0].get_array().filled(0), bins.count)
    assert [text.get_text() for text in frequency.get_yticklabels()] == ["perfect", *names]
    assert [text.get_text() for text in voxels.texts] == [
        f"ECE {error:.4f}" for error in calseg.calibration_error_from_bins(bins).tolist()
    ]
    rows = [text.get_window_extent() for text in voxels.texts]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(rows))


def test_the_report_has_a_map_of_many_classes(tmp_path: Path) -> None:
    """Diagrams of each would take minutes."""
    x = scores(2, 40, 12, 12, dtype=torch.float32)
    options = {"n_bins": 15, "per_item": True}
    bins = {region: calseg.calibration_bins(x, x.argmax(1), **options) for region in ("near", "all", "foreground")}
    bins["all_classes"] = calseg.calibration_bins(x, x.argmax(1), class_wise=True, **options)
    draw_diagrams(tmp_path, bins, [str(number) for number in range(40)])
    assert len(list(tmp_path.iterdir())) == 8
    width, height = plt.imread(tmp_path / "reliability_classes.png").shape[1::-1]
    assert (width, height) == (1600, round(200 * (1.7 + 0.16 * 40)))


def test_a_map_without_voxels() -> None:
    bins = calseg.calibration_bins(torch.zeros(1, 20, 2), torch.full((1, 2), -100), class_wise=True)
    figure, (_, voxels) = class_reliability_map(bins, [str(number) for number in range(20)])
    figure.savefig(io.BytesIO())
    assert voxels.texts[0].get_text() == "ECE -"


def test_into_given_axes() -> None:
    bins = calseg.calibration_bins(*volumes())
    _, ax = plt.subplots()
    assert reliability_diagram(bins, ax=ax) == (None, ax)
    check_diagram(ax, bins)
    assert ax.get_xlabel() == "Confidence"


def test_empty_bins_draw_an_empty_diagram() -> None:
    x, target = volumes()
    bins = calseg.calibration_bins(x, torch.full_like(target, -100))
    figure, (diagram, _) = reliability_diagram(bins, cases=calseg.CalibrationBins(*(f[None] for f in bins)))
    assert not diagram.patches
    assert "ECE -\n0 voxels" in diagram.texts[0].get_text()
    figure.savefig(io.BytesIO())


def test_counts_are_short() -> None:
    one = calseg.calibration_bins(torch.tensor([[0.75, 0.25]]), torch.tensor([0]), from_logits=False)
    for count, words in ((999_999, "999,999"), (1_234_567, "1.23 million"), (2**34, "17.2 billion")):
        bins = calseg.CalibrationBins(*(sums * count for sums in one))
        assert f"\n{words} voxels" in reliability_diagram(bins)[1][0].texts[0].get_text()


def test_the_picture() -> None:
    """The rendered picture has bars up to the accuracy, hatching up to the confidence, and white above."""
    p = torch.tensor([[0.9, 0.1]] * 10)
    bins = calseg.calibration_bins(p, torch.tensor([0] * 5 + [1] * 5), n_bins=2, from_logits=False)
    figure, (diagram, _) = reliability_diagram(bins)
    figure.set_dpi(200)
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba()) / 255.0

    def patch(x: float, y: float) -> np.ndarray:
        """Return the pixels of a square around a point of the diagram."""
        (left, bottom), (right, top) = diagram.transData.transform([(x - 0.025, y - 0.025), (x + 0.025, y + 0.025)])
        height = len(image)
        return image[round(height - top) : round(height - bottom), round(left) : round(right), :3]

    for x, y, colour in (
        (0.9, 0.25, to_rgba(BAR)[:3]),  # below the accuracy, 0.5
        (0.25, 0.6, (1, 1, 1)),  # an empty bin
        (0.6, 0.95, (1, 1, 1)),  # above the confidence, 0.9
    ):
        np.testing.assert_allclose(patch(x, y), np.broadcast_to(colour, patch(x, y).shape), atol=0.01)
    grey = patch(0.9, 0.7).mean(2)  # the gap: dark lines on white, also without colours
    assert grey.min() < 0.45 < 0.95 < grey.max()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b, c: reliability_diagram([1, 2]), TypeError, "bins: got a list"),
        (lambda b, c: reliability_diagram(c), ValueError, r"bins: got counts of shape \[3, 15\]"),
        (lambda b, c: reliability_diagram(b, cases=b), ValueError, "cases: got counts"),
        (lambda b, c: class_reliability_diagrams(b, ["a"]), ValueError, "bins: got counts"),
        (lambda b, c: class_reliability_diagrams(c, ["a", "b"]), ValueError, "names: got 2, wanted 3"),
        (lambda b, c: class_reliability_map(b, ["a"]), ValueError, "bins: got counts"),
        (lambda b, c: class_reliability_map(c, ["a", "b"]), ValueError, "names: got 2, wanted 3"),
    ],
)
def test_errors(call, error, message) -> None:
    x, target = volumes()
    bins, classes = (calseg.calibration_bins(x, target, class_wise=kind) for kind in (False, True))
    with pytest.raises(error, match=message):
        call(bins, classes)
    assert not plt.get_fignums()
