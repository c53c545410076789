"""The result of the experiment on one data set, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contenders import CONTENDERS, REFERENCE
from experiment import Tested
from scores import near_curve, summarise
from torch import Tensor

from calseg.bootstrap import case_weights, percentile_interval
from calseg.scores import CaseScores

FORMAT = 2
"""The number of the format of the JSON files. Files of the first experiment have none."""


def report(tested: Mapping[str, Tested], perfect: Sequence[CaseScores] = ()) -> dict[str, Any]:
    """Return for each contender and score the mean over the seeds, all values, and the 95 % interval over cases.

    ``minus_reference`` is the paired difference: seeds are the same, and so are the cases in every resample of the
    bootstrap. The entry "truth" holds what the true probabilities score, if they are known.
    """
    seeds = {name: each.seeds for name, each in tested.items()}
    if perfect:
        seeds["truth"] = [perfect]
    scores = _scores(seeds)
    result = {
        name: {
            "title": CONTENDERS[name].title,
            "method": CONTENDERS[name].method,
            "settings": dict(each.settings),
            "first_stage": dict(CONTENDERS[name].first_stage),
            "temperatures": list(each.temperatures),
            "seconds": dict(each.seconds),
            "scores": scores[name],
            "near_curve": near_curve(each.seeds),
        }
        for name, each in tested.items()
    }
    if perfect:
        result["truth"] = {"title": "the truth itself", "scores": scores["truth"], "near_curve": near_curve([perfect])}
    return result


def _scores(seeds: Mapping[str, Sequence[Sequence[CaseScores]]]) -> dict[str, dict[str, Any]]:
    """Return the scores of each contender, whose sums are given for every seed and case."""
    weights = case_weights(len(seeds[REFERENCE][0]))
    points = {name: [summarise(cases) for cases in each] for name, each in seeds.items()}
    drawn = {name: [summarise(cases, weights) for cases in each] for name, each in seeds.items()}

    def mean(values: Sequence[Mapping[str, Any]], key: str) -> Any:
        return sum(seed[key] for seed in values) / len(values)

    def interval(values: Tensor) -> list[float]:
        return [float(end) for end in percentile_interval(values)]

    result: dict[str, dict[str, Any]] = {}
    for name in seeds:
        result[name] = {}
        for key in points[name][0]:
            value, spread = mean(points[name], key), mean(drawn[name], key)
            entry = {"mean": value, "seeds": [seed[key] for seed in points[name]], "interval": interval(spread)}
            if name != REFERENCE:
                entry["minus_reference"] = {
                    "mean": value - mean(points[REFERENCE], key),
                    "interval": interval(spread - mean(drawn[REFERENCE], key)),
                }
            result[name][key] = entry
    return result
