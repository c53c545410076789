"""Train nnU-Net in pairs, on labels and on soft labels, from one start and on the same batches, and score both.

    python benchmarks/nnunet_pairs.py --data Task04_Hippocampus --out RUNS

The data may lie in the Decathlon's layout or in nnU-Net's raw layout. nnU-Net plans and preprocesses some of the cases,
and trains a small 2d network on them, whose sizes the plan below has. The soft labels are made once, by what ``calseg
nnunet-soft-labels`` calls, from the predictions of five folds. Then each seed trains a network on each of three
targets: labels, soft labels, and soft labels whose lower levels of deep supervision are those of the nearest voxels
instead of means over the volumes of their voxels. The three have the same first weights, cases, patches and
augmentation. The same is done from one pretrained network, the first that was trained on labels; as with nnU-Net's
option ``-pretrained_weights``, its heads are not taken over. All networks are scored on cases that none has seen. These
are very short trainings, on one core of a CPU.

What is finished is kept in RUNS, so an interrupted call continues where it stopped. The result is
benchmarks/results/nnunet_pairs.json, or with --quick RUNS/nnunet_pairs.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
import tables
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.experiment_planning import plan_and_preprocess_api as nnunet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

import calseg
from calseg.evaluate import EvaluateConfig, score_case
from calseg.files import as_json, read_json, write_json
from calseg.integrations.nnunet.config import SoftLabelConfig
from calseg.integrations.nnunet.soft_labels import make_soft_labels
from calseg.integrations.nnunet.trainers import nnUNetTrainerCalseg, nnUNetTrainerSoftLabels
from calseg.scores import STATISTICS, summarise
from calseg.volumes.datasets import Case, Dataset, find_cases
from calseg.volumes.probabilities import find_map_cases

RESULT = "nnunet_pairs.json"
DATASET = "Dataset001_Pairs"
CONFIGURATION = "pairs"
FOLDS = 5
CALIBRATION = (("ece", "near"), ("nll", "near"), ("ece", "all"))
"""The statistics of calseg's that are shown beside Dice, and their regions."""
SCORES = {"dice": "Dice", **{f"{name} {region}": f"{STATISTICS[name].title} {region}" for name, region in CALIBRATION}}
"""The scores of a network over all test cases: names in the file of results, and titles of columns."""


@dataclass(frozen=True)
class Plan:
    """The numbers of cases and updates, and the sizes of the network.

    Args:
        training: cases to train on, which also have the soft labels.
        test: cases to score.
        fold_updates: updates of the networks whose predictions become soft labels.
        updates: updates from a random start.
        further: updates from the pretrained network.
        batch_size: patches in an update.
        features: features of the network's first level; each level has twice those of the one before.
        most_features: the largest number of features of a level.
        rate: first learning rate of AdamW, which falls to 0 as nnU-Net's does.
        mirroring: whether predictions are means over mirrored images.
    """

    training: int = 20
    test: int = 20
    fold_updates: int = 600
    updates: int = 600
    further: int = 200
    batch_size: int = 6
    features: int = 8
    most_features: int = 64
    rate: float = 2e-3
    mirroring: bool = False

    def quick(self) -> Plan:
        """Return a plan with few cases and updates, which shows that all of it runs, and nothing else."""
        return replace(self, training=FOLDS, test=2, fold_updates=2, updates=2, further=2, batch_size=2)


# ------------------------------------------------------------------------------------------------- targets


class NearestSoftLabels(BasicTransform):
    """Replace the soft labels of lower levels by those of the first, at the voxels from which nnU-Net takes labels."""

    def apply(self, data_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Replace the second half of the entry ``segmentation``, soft labels uint16 ``[C, *S]`` of every level."""
        levels = data_dict["segmentation"]
        first = levels[len(levels) // 2].float()
        for number in range(len(levels) // 2 + 1, len(levels)):
            nearest = F.interpolate(first[None], levels[number].shape[1:], mode="nearest-exact")[0]
            levels[number] = nearest.to(torch.uint16)
        return data_dict


class nnUNetTrainerNearestSoftLabels(nnUNetTrainerSoftLabels):  # noqa: N801  # nnU-Net's way of naming
    """CALSeg's second stage with soft labels of nearest voxels in the lower levels of deep supervision."""

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """Return the transforms of the second stage, and the one that takes nearest voxels."""
        return ComposeTransforms([super().get_training_transforms(*args, **kwargs), NearestSoftLabels()])


TARGETS: Mapping[str, type] = {
    "labels": nnUNetTrainerCalseg,  # nnU-Net's own loss, with the same values and gradients
    "soft labels": nnUNetTrainerSoftLabels,
    "soft labels, nearest": nnUNetTrainerNearestSoftLabels,
}
STARTS = ("random", "pretrained")
FIRST = ("labels", 0, "random")
"""Targets, seed and start of the network that the pretrained ones start from."""
DIFFERENCES = (("soft labels", "labels"), ("soft labels, nearest", "labels"), ("soft labels", "soft labels, nearest"))
"""The pairs that are compared: the first minus the second."""


# ---------------------------------------------------------------------------------------------------- data


def choose(data: Dataset, plan: Plan) -> tuple[list[Case], list[Case]]:
    """Return training and test cases, drawn at random with a fixed seed."""
    wanted = plan.training + plan.test
    if len(data.cases) < wanted:
        raise SystemExit(f"{data.folder}: {len(data.cases)} cases, but {wanted} are wanted")
    cases = list(data.cases)
    random.Random(0).shuffle(cases)
    return cases[: plan.training], cases[plan.training : wanted]


def write_raw(data: Dataset, plan: Plan, raw: Path) -> None:
    """Write the chosen cases in nnU-Net's raw layout, the test cases to imagesTs and labelsTs."""
    for part, cases in zip(("Tr", "Ts"), choose(data, plan), strict=True):
        for kind in ("images", "labels"):
            (raw / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        for case in cases:
            images = [nibabel.load(file) for file in case.images]
            channels = [
                part for image in images for part in (nibabel.four_to_three(image) if image.ndim == 4 else [image])
            ]
            for number, channel in enumerate(channels):
                nibabel.save(channel, raw / f"images{part}" / f"{case.name}_{number:04d}.nii.gz")
            nibabel.save(nibabel.load(case.label), raw / f"labels{part}" / f"{case.name}.nii.gz")
    labels = {name if number else "background": number for number, name in enumerate(data.class_names)}
    content = {
        "channel_names": {str(number): name for number, name in enumerate(data.channel_names)},
        "labels": labels if data.ignore_label is None else {**labels, "ignore": data.ignore_label},
        "numTraining": plan.training,
        "file_ending": ".nii.gz",
    }
    write_json(raw / "dataset.json", content)


def small(configuration: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return a configuration that differs from nnU-Net's "2d" in the size of its batches and of its network."""
    architecture = dict(configuration["architecture"])
    arguments = dict(architecture["arch_kwargs"])
    levels = range(arguments["n_stages"])
    arguments["features_per_stage"] = [min(plan.features << level, plan.most_features) for level in levels]
    architecture["arch_kwargs"] = arguments
    return {"inherits_from": "2d", "batch_size": plan.batch_size, "architecture": architecture}


def prepare(data: Path, out: Path, plan: Plan) -> None:
    """Write the raw data, let nnU-Net plan and preprocess them, and add the small configuration to its plans."""
    write_raw(find_cases(data), plan, out / "raw" / DATASET)
    os.environ.update(nnUNet_n_proc_DA="1")  # what plans the sizes takes it for a number of threads
    with words_in(out / "nnunet.log"):
        nnunet.extract_fingerprints([1], num_processes=1)
        nnunet.plan_experiments([1])
        nnunet.preprocess([1], configurations=["2d"], num_processes=[1])
    path = out / "preprocessed" / DATASET / "nnUNetPlans.json"
    plans = read_json(path)
    plans["configurations"][CONFIGURATION] = small(plans["configurations"]["2d"], plan)
    write_json(path, plans)


@contextmanager
def words_in(path: Path) -> Iterator[None]:
    """Append to a file what nnU-Net prints."""
    with path.open("a") as file, redirect_stdout(file):
        yield


# ------------------------------------------------------------------------------------------------ training


def seed_all(seed: int) -> None:
    """Seed all generators that nnU-Net draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Pairs:
    """The trainings of a prepared folder.

    Args:
        out: the folder.
        plan: numbers of cases and updates.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        self.raw, self.preprocessed = out / "raw" / DATASET, out / "preprocessed" / DATASET
        self.predictions = out / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
        self.pretrained = out / "pretrained.pth"
        self.updates = {"random": plan.updates, "pretrained": plan.further}
        self.channels = len(read_json(self.raw / "dataset.json")["channel_names"])

    def started(self, kind: type, fold: int | str, seed: int, updates: int, weights: Path | None = None) -> Any:
        """Return a trainer with its first weights and its loaders. Both are those of the seed, whatever the trainer."""
        seed_all(seed)
        plans = {**read_json(self.preprocessed / "nnUNetPlans.json"), "continue_training": False}
        dataset_json = read_json(self.preprocessed / "dataset.json")
        trainer: Any = kind(plans, CONFIGURATION, fold, dataset_json, torch.device("cpu"))
        trainer.initialize()
        if weights is not None:
            load_pretrained_weights(trainer.network, str(weights))
        trainer.optimizer = torch.optim.AdamW(trainer.network.parameters(), self.plan.rate)
        trainer.lr_scheduler = PolyLRScheduler(trainer.optimizer, self.plan.rate, updates)
        seed_all(seed)
        trainer.on_train_start()
        trainer.network.train()
        return trainer

    def trained(self, kind: type, fold: int | str, seed: int, updates: int, weights: Path | None = None) -> Any:
        """Return a trainer after so many of its own updates."""
        trainer = self.started(kind, fold, seed, updates, weights)
        for update in range(updates):
            trainer.lr_scheduler.step(update)
            trainer.train_step(next(trainer.dataloader_train))
        return trainer

    def predict(self, trainer: Any, part: str, cases: Sequence[str], folder: Path) -> None:
        """Write the probabilities of cases to a folder, as ``nnUNetv2_predict --save_probabilities`` does."""
        trainer.set_deep_supervision_enabled(False)
        trainer.network.eval()
        predictor = nnUNetPredictor(
            use_mirroring=self.plan.mirroring,
            perform_everything_on_device=False,
            device=trainer.device,
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()],
            trainer.dataset_json, type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
        )  # fmt: skip
        images = self.raw / f"images{part}"
        files = [[str(images / f"{case}_{number:04d}.nii.gz") for number in range(self.channels)] for case in cases]
        folder.mkdir(parents=True, exist_ok=True)
        predictor.predict_from_files_sequential(files, str(folder), save_probabilities=True)

    # ------------------------------------------------------------------------------------------ what is kept

    def soft_labels(self) -> dict[str, Any]:
        """Make the soft labels from the predictions of all folds, and return what ``soft_labels.json`` says."""
        kept = self.out / "soft_labels.json"
        if not kept.is_file():
            for fold in range(FOLDS):
                folder = self.predictions / f"fold_{fold}"
                if not (folder / "done").is_file():
                    print(f"fold {fold}", flush=True)
                    with words_in(self.out / "nnunet.log"):
                        trainer = self.trained(nnUNetTrainerCalseg, fold, fold, self.plan.fold_updates)
                        self.predict(trainer, "Tr", trainer.do_split()[1], folder / "validation")
                    (folder / "done").touch()
            write_json(kept, make_soft_labels(DATASET, CONFIGURATION, SoftLabelConfig(), overwrite=True))
        return dict(read_json(kept))

    def scores(self, targets: str, seed: int, start: str) -> dict[str, float]:
        """Return the scores of a network. It is trained now if it was not."""
        path = self.out / "runs" / f"{start}-{targets.replace(', ', '-').replace(' ', '_')}-seed{seed}.json"
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            print(path.stem, flush=True)
            with words_in(self.out / "nnunet.log"), TemporaryDirectory(dir=self.out) as folder:
                own = FOLDS + 2 * seed + STARTS.index(start)  # no seed of a fold, and another one for each start
                weights = self.first_network() if start == "pretrained" else None
                trainer = self.trained(TARGETS[targets], "all", own, self.updates[start], weights)
                if (targets, seed, start) == FIRST:
                    torch.save({"network_weights": trainer.network.state_dict()}, self.pretrained)
                names = sorted(file.name.removesuffix(".nii.gz") for file in (self.raw / "labelsTs").iterdir())
                self.predict(trainer, "Ts", names, Path(folder))
                write_json(path, self.judged(Path(folder)))
        return dict(read_json(path))

    def first_network(self) -> Path:
        """Return the file of the network that others start from. It is trained now if it was not."""
        self.scores(*FIRST)
        return self.pretrained

    def judged(self, folder: Path) -> dict[str, float]:
        """Return the scores of the probabilities in a folder, as ``calseg evaluate`` counts them."""
        data = find_cases(self.raw)
        config = EvaluateConfig(ignore_label=data.ignore_label)
        cases, _ = find_map_cases(folder, self.raw / "labelsTs")
        sums = {case.name: score_case(case, len(data.class_names), config, {}) for case in cases}
        summary = summarise(sums, data.class_names)
        return {
            "dice": summary["dice_mean"],
            **{f"{name} {region}": summary[region][name] for name, region in CALIBRATION},
        }

    def group(self, start: str, seeds: int) -> dict[str, Any]:
        """Return the scores of all networks from one kind of start, and the differences of their pairs."""
        pairs = [
            {"seed": seed, **{targets: self.scores(targets, seed, start) for targets in TARGETS}}
            for seed in range(seeds)
        ]
        return {
            "updates": self.updates[start],
            "pairs": pairs,
            "differences": [{"of": one, "from": other, **differences(pairs, one, other)} for one, other in DIFFERENCES],
        }


def differences(pairs: Sequence[Mapping[str, Any]], one: str, other: str) -> dict[str, Any]:
    """Return the mean of each score's differences, their standard deviation, and how many of them are gains."""
    result = {}
    for score in SCORES:
        values = [pair[one][score] - pair[other][score] for pair in pairs]
        gains = [value if score == "dice" else -value for value in values]
        result[score] = {"mean": mean(values), "sd": stdev(values), "better": sum(gain > 0 for gain in gains)}
    return result


# ------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the cases, nnU-Net's raw or the Decathlon's"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--seeds", type=int, default=4, help="pairs from each start; at least 2")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="default: both")
    parser.add_argument("--quick", action="store_true", help="few cases and updates: does it run?")
    given = parser.parse_args(arguments)
    if given.seeds < 2:
        parser.error(f"--seeds: at least 2 are wanted, for the spread; got {given.seeds}")
    plan = Plan().quick() if given.quick else Plan()
    out = given.out.resolve()
    os.environ.update({f"nnUNet_{name}": str(out / name) for name in ("raw", "preprocessed", "results")})
    torch.set_num_threads(1)
    kept, settings = out / "plan.json", as_json({"data": str(given.data.resolve()), **asdict(plan)})
    if not kept.is_file():
        prepare(given.data, out, plan)
        write_json(kept, settings)
    elif read_json(kept) != settings:
        raise SystemExit(f"{out}: its trainings are of other data or of another plan ({kept}); give another --out")
    os.environ.update(nnUNet_n_proc_DA="0")  # batches are drawn in this process, so that a seed decides on them
    pairs = Pairs(out, plan)
    soft_labels = pairs.soft_labels()
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {"calseg": calseg.__version__, **{name: metadata.version(name) for name in ("torch", "nnunetv2")}},
        "dataset": find_cases(given.data).name,
        "plan": asdict(plan),
        "seeds": given.seeds,
        "soft_labels": {name: soft_labels[name] for name in ("alpha", "temperature")},
        "targets": list(TARGETS),
        "scores": SCORES,
        "starts": {start: pairs.group(start, given.seeds) for start in STARTS if start in given.starts},
    }
    path = (out if given.quick else tables.RESULTS) / RESULT
    write_json(path, content)
    if not given.quick:
        print(tables.nnunet_pairs(), tables.nnunet_differences(), sep="\n\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
