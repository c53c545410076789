"""Scores of a prediction that add up over cases, so that cases can be resampled; and their summary.

A case gives sums only: ``{name: number or list}``. :func:`summarise` adds them up, weighted, for one weighting of the
cases or for many at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calseg.calibration import CalibrationBins, calibration_bins
from calseg.data import IGNORE_INDEX
from calseg.reference import UNIT
from calseg.training import dice_per_class

BINS = 15
SCORES = {
    "dice": "mean over the foreground classes of the mean over the cases",
    "ece": "top label, all voxels, pooled",
    "fg_ece": "top label, voxels whose label is not 0, pooled",
    "cw_ece": "mean over the classes of the class's error, all voxels, pooled",
    "nll": "all voxels",
    "fg_nll": "voxels whose label is not 0",
    "brier": "all voxels",
    "fg_brier": "voxels whose label is not 0",
    "truth_ece": "top label, all voxels, against the true probability instead of a label",
    "disputed_ece": "the same, where the true probability of background is under 0.99",
    "truth_error": "mean absolute error of the probabilities where that of background is under 0.99",
}


def score_case(logits: Tensor, label: Tensor, truth: Tensor | None = None) -> dict[str, Any]:
    """Sums over the voxels of a case: ``logits`` and ``truth`` ``[C, *S]``, ``label`` ``[*S]``."""
    dice = dice_per_class(logits.argmax(0), label, len(logits))
    result: dict[str, Any] = {
        "dice": [0.0 if value is None else value for value in dice],
        "dice_cases": [float(value is not None) for value in dice],
    }
    x, y = logits[None].double(), label[None]
    for region, with_background in (("", True), ("fg_", False)):
        bins = calibration_bins(x, y, n_bins=BINS, include_background=with_background)
        result[f"{region}voxels"] = float(bins.num_voxels)
        result[f"{region}nll"] = float(bins.mean_nll() * bins.num_voxels)
        result[f"{region}brier"] = float(bins.mean_brier() * bins.num_voxels)
        result[f"{region}gap"] = _gaps(bins)
        result[f"{region}curve"] = [bins.count.tolist(), (bins.confidence.double() / UNIT).tolist(), bins.hits.tolist()]
    result["class_gap"] = _gaps(calibration_bins(x, y, n_bins=BINS, class_wise=True))
    if truth is not None:
        valid = label != IGNORE_INDEX
        p, t = torch.softmax(x[0, :, valid], 0), truth[:, valid].double()
        confidence, top = p.max(0)
        disputed = t[0] < 0.99
        share = t.gather(0, top[None])[0]
        index = (confidence * BINS).long().clamp(max=BINS - 1)
        for region, inside in (("truth", slice(None)), ("disputed", disputed)):
            curve = [
                torch.bincount(index[inside], values[inside], BINS).tolist()
                for values in (torch.ones_like(share), confidence, share)
            ]
            result[f"{region}_gap"] = [sure - right for _, sure, right in zip(*curve, strict=True)]
            result[f"{region}_curve"] = curve
        result["disputed_voxels"] = float(disputed.sum())
        result["truth_error"] = float((p - t)[:, disputed].abs().mean(0).sum())
    return result


def _gaps(bins: CalibrationBins) -> list[Any]:
    """Per bin the sum of confidence minus hits, ``[..., BINS]``; what the calibration error adds up."""
    return list((bins.confidence.double() / UNIT - bins.hits).tolist())


def summarise(cases: Sequence[Mapping[str, Any]], weights: NDArray[np.float64] | None = None) -> dict[str, Any]:
    """The scores of :data:`SCORES` that the cases allow; arrays ``[B]`` for ``weights[B, cases]``, else numbers."""
    single = weights is None
    w = np.ones((1, len(cases))) if weights is None else weights
    total = {key: np.tensordot(w, np.array([case[key] for case in cases], float), 1) for key in cases[0]}

    def error(gap: str, voxels: str) -> NDArray[np.float64]:
        return np.asarray(np.abs(total[gap]).sum(-1) / np.maximum(total[voxels], 1))

    scores = {
        "dice": (total["dice"] / np.maximum(total["dice_cases"], 1e-12)).mean(-1),
        "ece": error("gap", "voxels"),
        "fg_ece": error("fg_gap", "fg_voxels"),
        "cw_ece": (np.abs(total["class_gap"]).sum(-1) / total["voxels"][:, None]).mean(-1),
        **{key: total[key] / total["voxels"] for key in ("nll", "brier")},
        **{key: total[key] / np.maximum(total["fg_voxels"], 1) for key in ("fg_nll", "fg_brier")},
    }
    if "truth_gap" in total:
        scores["truth_ece"] = error("truth_gap", "voxels")
        scores["disputed_ece"] = error("disputed_gap", "disputed_voxels")
        scores["truth_error"] = total["truth_error"] / np.maximum(total["disputed_voxels"], 1)
    return {key: float(value[0]) if single else value for key, value in scores.items()}


def curves(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Reliability diagrams of all seeds' predictions, pooled: per bin voxels, mean confidence, and frequency.

    The frequency is how often the top label is right, or against the truth its mean probability. None: an empty bin.
    """
    result = {}
    for name in ("fg_curve", "disputed_curve"):
        if all(name in case for cases in seeds for case in cases):
            voxels, *sums = np.sum([case[name] for cases in seeds for case in cases], 0)
            means = [[float(a / b) if b else None for a, b in zip(total, voxels, strict=True)] for total in sums]
            result[name] = {"voxels": [int(count) for count in voxels], "confidence": means[0], "frequency": means[1]}
    return result


def resamples(cases: int, count: int = 2000) -> NDArray[np.float64]:
    """Weights ``[count, cases]`` of the bootstrap, always the same, so that all methods are compared on the same."""
    return np.random.default_rng(0).multinomial(cases, np.full(cases, 1 / cases), count).astype(float)
