"""The experiment on one data set: training, choice of settings, and sums of the scores of every case.

Everything that is finished is kept in the folder of the experiment: runs, first stages, and the sums of the cases. So
an interrupted experiment continues, and contenders share what they have in common.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import CONTENDERS, REFERENCE, Contender, Settings, words
from datasets import Plan
from scores import summarise
from torch import Tensor

from calseg.files import read_json, write_json
from calseg.methods import METHODS, TemperatureFit
from calseg.scores import CaseScores
from calseg.training.checkpoint import load_checkpoint
from calseg.training.config import TrainConfig
from calseg.training.estimator import training_settings
from calseg.training.inference import predict_volume
from calseg.training.nets import build_net_of_run
from calseg.training.stage_one import SUMMARY, estimate
from calseg.training.stage_two import split_names, started, train
from calseg.volumes.datasets import find_cases
from calseg.volumes.nifti import read_volume
from calseg.volumes.patches import CaseCache

TOLERANCE = 0.005
"""By how much the Dice of a setting may be below the reference's on the tuning cases."""


class Tested(NamedTuple):
    """A contender with the setting that was chosen.

    Attributes:
        settings: The setting.
        seeds: The sums of the test cases of every seed.
        temperatures: The temperature of every seed that was fitted, if one was: that of the logits if these are
            scaled, else that of the soft labels.
        seconds: The mean over the seeds of the time that each stage took to train.
    """

    settings: Settings
    seeds: Sequence[Sequence[CaseScores]]
    temperatures: Sequence[float]
    seconds: Mapping[str, float]


class Task(NamedTuple):
    """A run that is trained and scored: the name of a contender, its setting, a seed, and "tuning" or "test"."""

    name: str
    settings: Settings
    seed: int
    part: str


class Experiment:
    """The experiment on one data set: its plan, its folders, and its steps.

    Args:
        name: name of the data set.
        root: folder of the experiment.
        plan: numbers of cases and updates.
        jobs: number of processes that train and score, each with one thread. Default: this process does.
    """

    def __init__(self, name: str, root: Path, plan: Plan, jobs: int = 0) -> None:
        self.name, self.root, self.plan, self.jobs = name, root, plan, jobs
        self.data = {part: find_cases(root / part) for part in ("development", "test")}
        self._caches = {part: CaseCache(dataset) for part, dataset in self.data.items()}

    # ------------------------------------------------------------------------------------------------ training

    @contextmanager
    def _made_once(self, folder: Path) -> Iterator[None]:
        """Hold the right to make a folder. Another process that asks for it waits until it is given back."""
        locks = self.root / "locks"
        locks.mkdir(exist_ok=True)
        with open(locks / f"{folder.parent.name}-{folder.name}", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def config(self, method: str, settings: Settings, seed: int) -> TrainConfig:
        """Return the settings of a training run."""
        plan = self.plan
        return TrainConfig(
            method=method,
            iterations=plan.iterations,
            batch_size=plan.batch_size,
            patch_size=plan.patch_size,
            val_fraction=plan.tuning / (plan.training + plan.tuning),
            seed=seed,
            **settings,
        )

    def trained(self, contender: Contender, settings: Settings, seed: int) -> Path:
        """Return the folder of a finished run. The run is made now if it does not exist."""
        config = self.config(contender.method, settings, seed)
        stages = [words(settings), *(["first", words(contender.first_stage)] if contender.first_stage else [])]
        run = self.root / "runs" / "-".join([contender.method, *filter(None, stages), f"seed{seed}"])
        with self._made_once(run):
            if not (run / "metrics.json").is_file():
                print(f"{self.name}: {run.name}", flush=True)
                soft_labels = None
                if METHODS[contender.method].soft_labels:
                    soft_labels = self.estimated(replace(config, **contender.first_stage)) / "soft_labels"
                resume = started(run)
                data = self.root / "development"
                train(data, run, config, soft_labels=soft_labels, resume=resume, overwrite=not resume)
        return run

    def estimated(self, config: TrainConfig) -> Path:
        """Return the folder of a finished first stage. Networks are shared by the estimates that they can serve."""
        shared = training_settings(config)
        of_networks = (
            "estimator",
            "iterations",
            "dice_weight",
            "folds",
            "latent_size",
            "beta",
            "reconstruction",
            "seed",
        )
        name = words({name: getattr(shared, name) for name in of_networks})
        networks = self.root / "first_stage" / name
        of_estimate = {name: getattr(config, name) for name in ("estimator", "alpha", "num_samples")}
        temperature = "fitted" if config.temperature is None else f"{config.temperature:g}"
        out = self.root / "soft_labels" / f"{name}-{words({**of_estimate, 'temperature': temperature})}"
        training, _ = split_names(self.data["development"], config)
        for folder, settings, source in ((networks, shared, None), (out, config, networks)):
            with self._made_once(folder):
                if not ((folder / SUMMARY).is_file() and "estimate" in read_json(folder / SUMMARY)):
                    resume = started(folder)
                    estimate(
                        self.root / "development", folder, settings,
                        names=training, networks=source, resume=resume, overwrite=not resume,
                    )  # fmt: skip
        return out

    # -------------------------------------------------------------------------------------------------- scores

    def predictions(self, run: Path, part: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Return name, logits and label of each "tuning" or "test" case."""
        saved = load_checkpoint(run / "checkpoint.pt")
        config = TrainConfig.from_json(saved["config"])
        folder = "test" if part == "test" else "development"
        dataset, cache = self.data[folder], self._caches[folder]
        net = build_net_of_run(config, len(dataset.channel_names), len(dataset.class_names))
        net.load_state_dict(saved["model"])
        net.eval()
        names = [case.name for case in dataset.cases] if part == "test" else saved["split"]["validation"]
        for name in names:
            case = cache.get(name)
            yield name, predict_volume(net, case.image, config.patch_size).clone(), torch.from_numpy(case.label)

    def scores(self, run: Path, part: str, scaled: str | None = None) -> list[CaseScores]:
        """Return the sums of the "tuning" or "test" cases of a run. They are computed now if they do not exist.

        Args:
            run: folder of a finished run.
            part: "tuning" or "test".
            scaled: region to which the temperature of the logits is fitted. Default: the logits are not scaled.
        """
        path = run / f"scores-{part}{'' if scaled is None else f'-scaled-{scaled}'}.json"
        if not path.is_file():
            cases = {}
            temperature = 1.0 if scaled is None else self.temperature(run, scaled)
            for name, logits, label in self.predictions(run, part):
                scaled_logits = (logits / temperature).double()
                cases[name] = CaseScores.of(scaled_logits, label, class_wise=False, truth=self.truth(name)).to_json()
            write_json(path, cases)
        return [CaseScores.from_json(sums) for sums in read_json(path).values()]

    def truth(self, name: str) -> Tensor | None:
        """Return the true probabilities of a case, float ``[C, x, y, z]``, or None if they are not known."""
        path = self.root / "truth" / f"{name}.nii.gz"
        return torch.from_numpy(read_volume(path)).movedim(-1, 0) if path.is_file() else None

    def perfect_forecast(self) -> list[CaseScores]:
        """Return the sums of the test cases for the true probabilities. The list is empty if they are not known."""
        cases = []
        for case in self.data["test"].cases:
            truth = self.truth(case.name)
            if truth is not None:
                label = torch.from_numpy(self._caches["test"].get(case.name).label)
                scores = CaseScores.of(truth.double(), label, from_logits=False, class_wise=False, truth=truth)
                cases.append(scores)
        return cases

    def temperature(self, run: Path, region: str) -> float:
        """Return the temperature of temperature scaling, which is fitted to a region of the tuning cases."""
        path = run / f"temperature-{region}.json"
        if not path.is_file():
            fit = TemperatureFit(region=region)
            for _, logits, label in self.predictions(run, "tuning"):
                fit.add(logits, label)
            write_json(path, fit.temperature())
        return float(read_json(path))

    # --------------------------------------------------------------------------------------------------- steps

    def _finish(self, tasks: Sequence[Task]) -> None:
        """Train and score in other processes, if there are any. What they have made is on disk afterwards."""
        if self.jobs:
            # runs that a scaled contender shares with another are trained by the other
            ordered = sorted(tasks, key=lambda task: CONTENDERS[task.name].scaled is not None)
            with ProcessPoolExecutor(self.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                for done in [pool.submit(_do, self.name, self.root, self.plan, task) for task in ordered]:
                    done.result()

    def tune(self, names: Sequence[str], most: int | None = None) -> dict[str, dict[str, Any]]:
        """Return ``{contender: {"settings": chosen, "tried": [...]}}``, from the first seed on the tuning cases.

        The chosen setting has the lowest NLL near the foreground, among those whose Dice is at most
        :data:`TOLERANCE` below the reference's. If there is none, all settings are eligible.

        Args:
            names: names of contenders, the reference first.
            most: number of settings that are tried at most. Default: all.
        """
        self._finish([Task(name, each, 0, "tuning") for name in names for each in CONTENDERS[name].settings[:most]])
        chosen: dict[str, dict[str, Any]] = {}
        for name in names:
            contender = CONTENDERS[name]
            tried: list[dict[str, Any]] = []
            for settings in contender.settings[:most]:
                run = self.trained(contender, settings, 0)
                tried.append({"settings": dict(settings), **summarise(self.scores(run, "tuning", contender.scaled))})
            floor = (chosen[REFERENCE]["tried"] if chosen else tried)[0]["dice"] - TOLERANCE
            for each in tried:
                each["keeps_dice"] = each["dice"] >= floor
            eligible = [each for each in tried if each["keeps_dice"]] or tried
            best = min(eligible, key=lambda each: float(each["near_nll"]))
            chosen[name] = {"settings": best["settings"], "keeps_dice": best["keeps_dice"], "tried": tried}
        return chosen

    def test(self, chosen: Mapping[str, Any], seeds: int) -> dict[str, Tested]:
        """Return the scores of every contender on the test cases, with the setting that was chosen."""
        self._finish(
            [Task(name, each["settings"], seed, "test") for name, each in chosen.items() for seed in range(seeds)]
        )
        result = {}
        for name, choice in chosen.items():
            contender, settings = CONTENDERS[name], choice["settings"]
            runs = [self.trained(contender, settings, seed) for seed in range(seeds)]
            tested = [self.scores(run, "test", contender.scaled) for run in runs]
            temperatures = []
            seconds = {"second_stage": [float(read_json(run / "metrics.json")["seconds"]["train"]) for run in runs]}
            if METHODS[contender.method].soft_labels:
                configs = (self.config(contender.method, settings, seed) for seed in range(seeds))
                stages = [self.estimated(replace(config, **contender.first_stage)) / SUMMARY for config in configs]
                summaries = [read_json(stage) for stage in stages]
                temperatures = [float(summary["temperature"]) for summary in summaries]
                seconds["first_stage"] = [float(summary["seconds"]) for summary in summaries]
            if contender.scaled is not None:
                temperatures = [self.temperature(run, contender.scaled) for run in runs]
            means = {stage: sum(values) / len(values) for stage, values in seconds.items()}
            result[name] = Tested(settings, tested, temperatures, means)
        return result


def _do(name: str, root: Path, plan: Plan, task: Task) -> None:
    """Train and score in a process of its own."""
    experiment, contender = Experiment(name, root, plan), CONTENDERS[task.name]
    experiment.scores(experiment.trained(contender, task.settings, task.seed), task.part, contender.scaled)
