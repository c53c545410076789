"""Train every method in the same way, tune it on the tuning cases, and score it on the test cases.

    python benchmarks/calibration/run.py hippocampus --data Task04_Hippocampus --out RUNS

Every method has the same network, cases, updates and seeds. It has up to three settings to choose from, one of which is
the published one. All settings are tried with the first seed. The chosen one has the lowest foreground ECE on the
tuning cases, among the settings whose Dice there is at most 0.01 below that of cross-entropy. It is trained with every
seed, and scored on the test cases, which were not used before. Finished runs are kept in RUNS, so an interrupted
experiment can continue. The result is benchmarks/results/calibration-NAME.json.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from datasets import MAKERS, PLANS, Plan, prepare
from figures import table
from scores import DESCRIPTIONS, curves, summarise
from torch import Tensor

import calseg
from calseg.bootstrap import case_weights, percentile_interval
from calseg.files import read_json, write_json
from calseg.methods import fit_temperature
from calseg.scores import CaseScores
from calseg.training import TrainConfig
from calseg.training.checkpoint import load_checkpoint
from calseg.training.inference import predict_volume
from calseg.training.nets import build_net_of_run
from calseg.training.stage_one import SUMMARY, estimate
from calseg.training.stage_two import split_names, started, train
from calseg.volumes.datasets import find_cases
from calseg.volumes.nifti import read_volume
from calseg.volumes.patches import CaseCache

RESULTS = Path(__file__).parents[1] / "results"
GRID: dict[str, tuple[dict[str, float], ...]] = {
    "cross_entropy": ({},),
    "label_smoothing": ({"alpha": 0.1}, {"alpha": 0.05}, {"alpha": 0.2}),
    "svls": ({"sigma": 1.0}, {"sigma": 2.0}),
    "focal": ({"gamma": 3.0}, {"gamma": 2.0}, {"gamma": 1.0}),
    "mbls": ({"margin": 5.0}, {"margin": 10.0}, {"margin": 2.5}),
    "nacl": ({"alpha": 0.1}, {"alpha": 0.05}, {"alpha": 0.2}),
    "vls": ({"alpha": 0.1}, {"alpha": 0.3}, {"alpha": 0.3, "temperature": 2.0}),
    "calseg": ({"alpha": 0.5}, {"alpha": 0.5, "temperature": 2.0}, {"alpha": 0.5, "temperature": 1.5}),
}
"""The settings of each method. The first one is the published one or the default. SVLS has a kernel of 3 voxels, so a
larger sigma would change little."""

SCALED = "temperature_scaling"
"""The networks of cross-entropy, with logits divided by a temperature that is fitted on the tuning cases."""

UNTUNED = "calseg_defaults"
"""CALSeg with its default settings, beside the one with the settings chosen on the tuning cases."""


class Experiment:
    """The experiment on one data set: its plan, its folders, and its steps."""

    def __init__(self, name: str, out: Path, plan: Plan) -> None:
        self.name, self.root, self.plan = name, out / name, plan
        self.data = {part: find_cases(self.root / part) for part in ("development", "test")}
        self._caches = {part: CaseCache(dataset) for part, dataset in self.data.items()}

    def config(self, method: str, settings: Mapping[str, float], seed: int) -> TrainConfig:
        """Return the settings of a training run."""
        plan = self.plan
        return TrainConfig(
            method=method,
            iterations=plan.iterations,
            batch_size=plan.batch_size,
            patch_size=plan.patch_size,
            val_fraction=plan.tuning / (plan.training + plan.tuning),
            seed=seed,
            **settings,  # type: ignore[arg-type]
        )

    def folder(self, config: TrainConfig, settings: Mapping[str, float]) -> Path:
        """Return the folder of a run."""
        words = [config.method, *(f"{key}{value:g}" for key, value in settings.items()), f"seed{config.seed}"]
        return self.root / "runs" / "-".join(words)

    def trained(self, method: str, settings: Mapping[str, float], seed: int) -> Path:
        """Return the folder of a finished run. The run is made now if it does not exist."""
        config = self.config(method, settings, seed)
        run = self.folder(config, settings)
        if not (run / "metrics.json").is_file():
            print(f"{self.name}: {run.name}", flush=True)
            soft_labels = self._soft_labels(run, config) if method == "calseg" else None
            resume = started(run)
            train(self.root / "development", run, config, soft_labels=soft_labels, resume=resume, overwrite=not resume)
        return run

    def _soft_labels(self, run: Path, config: TrainConfig) -> Path:
        """Return the folder of the soft labels of a run. Runs share the networks of the first stage if they can."""
        shared = replace(config, alpha=1.0, temperature=1.0)
        words = [f"{key}{getattr(config, key):g}" for key in ("folds", "latent_size", "beta", "reconstruction", "seed")]
        networks = self.root / "stage1" / "-".join(words)
        training, _ = split_names(self.data["development"], config)
        for out, settings, source in ((networks, shared, None), (self.soft_labels(run), config, networks)):
            resume = started(out)
            if not ((out / SUMMARY).is_file() and "estimate" in read_json(out / SUMMARY)):
                estimate(
                    self.root / "development", out, settings,
                    names=training, networks=source, resume=resume, overwrite=not resume,
                )  # fmt: skip
        return self.soft_labels(run) / "soft_labels"

    def soft_labels(self, run: Path) -> Path:
        """Folder of the first stage whose soft labels a run is trained on."""
        return self.root / "soft_labels" / run.name

    def predictions(self, run: Path, part: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Return name, logits and label of each tuning case or test case."""
        saved = load_checkpoint(run / "checkpoint.pt")
        config = TrainConfig.from_json(saved["config"])
        dataset = self.data["test" if part == "test" else "development"]
        net = build_net_of_run(config, len(dataset.channel_names), len(dataset.class_names))
        net.load_state_dict(saved["model"])
        net.eval()
        cache = self._caches["test" if part == "test" else "development"]
        names = [case.name for case in dataset.cases] if part == "test" else saved["split"]["validation"]
        result = []
        for name in names:
            case = cache.get(name)
            logits = predict_volume(net, case.image, config.patch_size)
            result.append((name, logits.clone(), torch.from_numpy(case.label)))
        return result

    def scores(self, run: Path, part: str, temperature: float | None = None) -> list[CaseScores]:
        """Return the sums of the "tuning" or "test" cases of a run. They are computed now if they do not exist."""
        path = run / f"scores-{part}{'' if temperature is None else '-scaled'}.json"
        if not path.is_file():
            cases = {}
            for name, logits, label in self.predictions(run, part):
                scaled = (logits / (temperature or 1.0)).double()
                cases[name] = CaseScores.of(scaled, label, truth=self._truth(name)).to_json()
            write_json(path, cases)
        return [CaseScores.from_json(sums) for sums in read_json(path).values()]

    def _truth(self, name: str) -> torch.Tensor | None:
        path = self.root / "truth" / f"{name}.nii.gz"
        return torch.from_numpy(read_volume(path)).movedim(-1, 0) if path.is_file() else None

    def temperature(self, run: Path) -> float:
        """Return the temperature of temperature scaling, which is fitted on the tuning cases."""
        path = run / "temperature.json"
        if not path.is_file():
            cases = self.predictions(run, "tuning")
            write_json(path, fit_temperature([logits for _, logits, _ in cases], [label for *_, label in cases]))
        return float(read_json(path))

    # ------------------------------------------------------------------------------------------------ steps

    def tune(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return ``{method: {"settings": chosen, "tried": [...]}}``, from the first seed on the tuning cases."""
        chosen: dict[str, dict[str, Any]] = {}
        floor = 0.0
        for method in methods:
            tried = []
            for settings in GRID[method]:
                run = self.trained(method, settings, 0)
                summary = summarise(self.scores(run, "tuning"))
                tried.append({"settings": settings, **summary})
            if method == "cross_entropy":
                floor = tried[0]["dice"] - 0.01
            good = [each for each in tried if each["dice"] >= floor] or tried
            best = min(good, key=lambda each: float(each["fg_ece"]))
            chosen[method] = {"settings": best["settings"], "tried": tried}
        return chosen

    def test(self, chosen: Mapping[str, Any], seeds: int) -> dict[str, Any]:
        """Return ``{method: [sums of the cases for each seed]}``, and the fitted temperatures of the methods."""
        result: dict[str, list[list[CaseScores]]] = {}
        temperatures: dict[str, list[float]] = {}
        wanted = [(method, method, choice["settings"]) for method, choice in chosen.items()]
        if "calseg" in chosen:
            wanted.append((UNTUNED, "calseg", GRID["calseg"][0]))
        for name, method, settings in wanted:
            runs = [self.trained(method, settings, seed) for seed in range(seeds)]
            result[name] = [self.scores(run, "test") for run in runs]
            if method == "cross_entropy":
                temperatures[SCALED] = [self.temperature(run) for run in runs]
                result[SCALED] = [
                    self.scores(run, "test", t) for run, t in zip(runs, temperatures[SCALED], strict=True)
                ]
            if method == "calseg" and "temperature" not in settings:
                temperatures[name] = [float(read_json(self.soft_labels(run) / SUMMARY)["temperature"]) for run in runs]
        return {"tested": result, "temperatures": temperatures}


def report(
    chosen: Mapping[str, Any],
    tested: Mapping[str, Sequence[Sequence[CaseScores]]],
    temperatures: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return for each method and score the mean over the seeds, all values, and the 95 % interval over cases.

    ``minus_cross_entropy`` is the paired difference: seeds are the same, and so are the cases in every resample of the
    bootstrap.
    """
    weights = case_weights(len(tested["cross_entropy"][0]))

    def interval(values: Tensor) -> list[float]:
        return [float(end) for end in percentile_interval(values)]

    points = {method: [summarise(cases) for cases in seeds] for method, seeds in tested.items()}
    drawn = {method: [summarise(cases, weights) for cases in seeds] for method, seeds in tested.items()}

    def mean(seeds: Sequence[Mapping[str, Any]], key: str) -> Any:
        return sum(seed[key] for seed in seeds) / len(seeds)

    result: dict[str, Any] = {}
    for method in tested:
        scores: dict[str, Any] = {}
        for key in points[method][0]:
            spread = mean(drawn[method], key)
            scores[key] = {
                "mean": mean(points[method], key),
                "seeds": [seed[key] for seed in points[method]],
                "interval": interval(spread),
            }
            if method != "cross_entropy":
                scores[key]["minus_cross_entropy"] = {
                    "mean": scores[key]["mean"] - mean(points["cross_entropy"], key),
                    "interval": interval(spread - mean(drawn["cross_entropy"], key)),
                }
        settings = GRID["calseg"][0] if method == UNTUNED else chosen.get(method, {"settings": {}})["settings"]
        result[method] = {"settings": settings, "scores": scores, "curves": curves(tested[method])}
        if method in temperatures:
            result[method]["temperatures"] = list(temperatures[method])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(MAKERS))
    parser.add_argument("--data", type=Path, help="folder of the cases; the synthetic set needs none")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--methods", nargs="+", choices=sorted(GRID), default=list(GRID))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--iterations", type=int, help="updates of every network; default: the plan's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = PLANS[arguments.name]
    if arguments.iterations:
        plan = replace(plan, iterations=arguments.iterations)
    prepare(arguments.name, arguments.data, arguments.out / arguments.name, plan)
    experiment = Experiment(arguments.name, arguments.out, plan)
    methods = [method for method in GRID if method in {"cross_entropy", *arguments.methods}]
    chosen = experiment.tune(methods)
    result = report(chosen, **experiment.test(chosen, arguments.seeds))
    content = {
        "dataset": arguments.name,
        "plan": asdict(plan),
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "calseg": calseg.__version__,
        "scores": DESCRIPTIONS,
        "tuning": chosen,
        "test": result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"calibration-{arguments.name}.json"
    write_json(path, content)
    print(table(content))
    print(f"written to {path}; the tables of all data sets and their figure: {Path(__file__).with_name('figures.py')}")


if __name__ == "__main__":
    main()
