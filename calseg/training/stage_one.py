"""The first stage of CALSeg: training networks that estimate soft labels, and writing the soft labels of every case.

In the folder of a run, ``stage1`` holds a network per fold, ``soft_labels`` holds ``NAME.nii.gz`` for every training
case, and ``soft_labels.json`` is the summary. Soft labels are cross-fitted: the training cases are split into folds,
and the cases of a fold get soft labels from a network that was trained on the other folds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calseg.errors import RunError, listing
from calseg.files import as_json, file_digest, read_json
from calseg.methods import TemperatureFit
from calseg.runs import (
    CasesInterruptedError,
    Progress,
    Run,
    RunFolder,
    changed_files,
    check_apart,
    no_progress,
    read_state,
)
from calseg.scores import count_classes, mean_of
from calseg.training.checkpoint import (
    CHECKPOINT,
    check_same_training,
    data_of,
    description,
    fingerprint,
    load_checkpoint,
    load_state,
)
from calseg.training.config import TrainConfig
from calseg.training.estimator import Estimator, build_estimator, estimate_case, estimator_loss, training_settings
from calseg.training.loop import check_device, fit, read_all
from calseg.volumes.datasets import IGNORE_INDEX, Dataset, find_cases
from calseg.volumes.patches import CaseCache
from calseg.volumes.probabilities import soft_labels_file, soft_labels_path

SUMMARY = "soft_labels.json"


def estimate(
    data: str | Path,
    out: str | Path,
    config: TrainConfig,
    *,
    names: Sequence[str] | None = None,
    networks: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    checkpoint_every: int = 50,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Train the first stage, and write ``out/soft_labels/NAME.nii.gz`` for every case.

    The files are 4-D NIfTI, uint16 ``[x, y, z, classes]``, with a slope that turns the numbers into probabilities. An
    ignored voxel is 0 in every class.

    Args:
        data: folder in the Medical Segmentation Decathlon's or nnU-Net's raw layout.
        out: folder of the run.
        config: settings of the run. If the temperature is None, it is fitted: it is then the one for which the
            estimates of networks that were not trained on a case fit the labels near the foreground best.
        names: names of the cases. Default: every case of ``data``.
        networks: folder of another run on the same cases, whose first stage is used instead of training one. The
            settings ``alpha``, ``temperature`` and ``num_samples`` may then differ, and codes of the posterior serve
            codes of the prior.
        resume: True to continue the run in ``out``, which must have the same settings and cases.
        overwrite: True to replace the run in ``out``.
        device: name of a PyTorch device.
        checkpoint_every: number of updates between checkpoints.
        progress: function that is called after every step.

    Returns:
        The content of ``soft_labels.json``. ``cases`` holds the quality of each estimate before it is blended with the
        label (:func:`_quality`), ``estimate`` the means over the cases, and ``temperature`` the one that was used.

    Raises:
        CalsegError: a file or a setting is wrong, or the folder is not empty. The user can fix it.
        RunInterruptedError: SIGINT or SIGTERM was received. The results so far are kept on disk.
    """
    target = check_device(device)
    check_apart(Path(out), data, *([] if networks is None else [networks]))
    dataset = find_cases(data)
    check_apart(Path(out), files=dataset.files)
    names = [case.name for case in dataset.cases] if names is None else list(names)
    present = {case.name for case in dataset.cases}
    if not names or not present.issuperset(names):
        gone = [name for name in names if name not in present]
        raise RunError(f"names must be cases of {data}, at least one; got {listing(gone) or 'none'}")
    cache, trained, digests = CaseCache(dataset), None, None
    if networks is not None:
        trained = _load_networks(Path(networks), cache, config, names, target)
        digests = [file_digest(Path(networks) / fold_folder(number) / CHECKPOINT) for number in range(len(trained[0]))]
    folder = RunFolder(Path(out), "soft-labels", stage_one_files(names, config.folds))
    same = {"the training cases": names, "the networks": digests, **data_of(description(dataset))}
    with folder.open(asdict(config), same, resume=resume, overwrite=overwrite) as run:
        return estimate_in(
            run, cache, config, names, target, trained=trained, checkpoint_every=checkpoint_every, progress=progress
        )


Networks = tuple[list[Estimator], float]
"""The network of every fold, and the seconds that their training took."""


def estimate_in(
    run: Run,
    cache: CaseCache,
    config: TrainConfig,
    names: Sequence[str],
    target: torch.device,
    *,
    trained: Networks | None = None,
    checkpoint_every: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write soft labels in the folder of ``run``, from ``trained`` or new networks: see :func:`estimate`."""
    if not run.holds(SUMMARY):
        content = as_json({"config": asdict(config), "names": names, "cases": {}})
        run.write_json("config.json", {"data": str(cache.dataset.folder.resolve()), **content["config"]})
        run.write_json(SUMMARY, content)
    try:
        if trained is None:
            trained = _train_networks(run, cache, config, names, target, checkpoint_every, progress)
        else:
            read_all(cache, names, run, progress)
        return _write_soft_labels(run, cache, config, names, trained, progress)
    except KeyboardInterrupt:
        done = len(read_summary(run, config, names)["cases"])
        raise CasesInterruptedError(run.path / "soft_labels", done, len(names)) from None


def _fingerprints(dataset: Dataset, config: TrainConfig, names: Sequence[str]) -> list[dict[str, Any]]:
    """The fingerprint of the training of every fold."""
    stage = training_settings(config)
    folds = split_folds(names, config.folds, config.split_seed)
    return [fingerprint(dataset, stage, _others(names, members), members) for members in folds]


def _train_networks(
    run: Run,
    cache: CaseCache,
    config: TrainConfig,
    names: Sequence[str],
    target: torch.device,
    checkpoint_every: int,
    progress: Progress,
) -> Networks:
    """Train the network of every fold; what the run holds of it is not done again."""
    nets: list[Estimator] = []
    seconds = 0.0
    contents, settings = _fingerprints(cache.dataset, config, names), training_settings(config)
    for number, content in enumerate(contents):
        nets.append(build_estimator(cache.dataset, settings).to(target))
        seconds += fit(
            nets[-1], estimator_loss(nets[-1], settings), run, content, cache, settings, folder=fold_folder(number),
            checkpoint_every=checkpoint_every, progress=progress, stage=f"fold {number + 1}/{len(contents)}",
        )  # fmt: skip
    return nets, seconds


def _load_networks(
    networks: Path, cache: CaseCache, config: TrainConfig, names: Sequence[str], target: torch.device
) -> Networks:
    """The networks of another run, which must have read the same files for the same cases."""
    nets: list[Estimator] = []
    seconds = 0.0
    for number, content in enumerate(_fingerprints(cache.dataset, config, names)):
        path = networks / fold_folder(number) / CHECKPOINT
        if not path.is_file():
            raise RunError(f"{path}: not found; there is no first stage of these folds")
        saved = load_checkpoint(path)
        check_same_training(path, saved, content)
        if saved["iteration"] < (wanted := content["config"]["iterations"]):
            done = f"{saved['iteration']} of {wanted}"
            raise RunError(f"{path}: its training has not ended (iteration {done}); resume it first")
        nets.append(build_estimator(cache.dataset, config).to(target))
        load_state(saved, path, nets[-1])
        seconds += float(saved["seconds"])
    state = read_state(networks)
    if state is not None and (changed := changed_files(state, cache.inputs(names))):
        raise RunError(f"{networks}: its networks do not serve; {listing(changed)} changed since their training")
    return nets, seconds


def _write_soft_labels(
    run: Run, cache: CaseCache, config: TrainConfig, names: Sequence[str], trained: Networks, progress: Progress
) -> dict[str, Any]:
    """Fit the temperature and write the maps; what the run holds of them is not made again."""
    nets, seconds = trained
    folds = split_folds(names, config.folds, config.split_seed)  # no more than there are cases
    pairs = [(net, name) for net, members in zip(nets, folds, strict=True) for name in members]
    content = read_summary(run, config, names)
    if "temperature" not in content:
        fitted = config.temperature is None
        content["temperature"] = _fit_temperature(pairs, cache, config, progress) if fitted else config.temperature
        run.write_json(SUMMARY, content)
    final = replace(config, temperature=content["temperature"])
    cases: dict[str, dict[str, float]] = content["cases"]
    for done, (net, name) in enumerate(pairs, 1):
        if name not in cases or not run.holds(soft_label_file(name)):
            cases[name] = _write(run, net, cache, name, final)
            run.write_json(SUMMARY, content)
        progress("soft labels", done, len(pairs), None)
    summary: dict[str, Any] = {
        **content,
        "seconds": seconds,
        "estimate": {key: float(np.mean([case[key] for case in cases.values()])) for key in next(iter(cases.values()))},
    }
    run.write_json(SUMMARY, summary)
    return summary


def read_summary(run: Run, config: TrainConfig, names: Sequence[str], *, is_finished: bool = False) -> dict[str, Any]:
    """The content of ``soft_labels.json``, checked: of a first stage on the cases ``names``, or of a finished one."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and -LARGEST < value < LARGEST  # NaN fails

    def is_quality(values: Any) -> bool:
        return isinstance(values, dict) and values.keys() == set(QUALITY) and all(map(is_number, values.values()))

    path = run.path / SUMMARY
    content = read_json(path)
    if not (
        isinstance(content, dict)
        and content.keys() <= {"config", "names", "cases", "temperature", "seconds", "estimate"}
        and as_json({"config": asdict(config), "names": names}).items() <= content.items()
        and isinstance(cases := content.get("cases"), dict)
        and cases.keys() <= set(names)
        and all(map(is_quality, cases.values()))
        and is_number(temperature := content.get("temperature", 1.0))
        and temperature > 0
        and is_number(content.get("seconds", None if is_finished else 0.0))
        and is_quality(content.get("estimate", None if is_finished else dict.fromkeys(QUALITY, 0.0)))
    ):
        raise RunError(f"{path}: not what the first stage on these cases writes; give --overwrite to start anew")
    return content


def split_folds(names: Sequence[str], folds: int, seed: int) -> list[list[str]]:
    """Split names into ``folds`` parts of about equal size. The parts depend on the arguments only."""
    order = sorted(
        names, key=lambda name: hashlib.sha256(f"fold:{seed}:{name}".encode(errors="surrogateescape")).digest()
    )
    return [sorted(order[number::folds]) for number in range(min(folds, len(order)))]


def fold_folder(number: int) -> str:
    """The folder of the network of a fold, within that of the run."""
    return f"stage1/fold_{number}/"


def _others(names: Sequence[str], members: Sequence[str]) -> list[str]:
    """Return the cases that the network of a fold is trained on: those of other folds, or all if there are none."""
    return [name for name in names if name not in set(members)] or list(names)


def soft_label_file(name: str) -> str:
    """The file of soft labels of a case, within the folder of the run."""
    return soft_labels_path(Path("soft_labels"), name).as_posix()


def stage_one_files(names: Sequence[str], folds: int) -> tuple[str, ...]:
    """The files of a first stage on the cases ``names``, within the folder of the run."""
    of_folds = (
        f"{fold_folder(number)}{name}"
        for number in range(min(folds, len(names)))
        for name in ("config.json", "split.json", CHECKPOINT)
    )
    return ("config.json", SUMMARY, *of_folds, *map(soft_label_file, names))


# ------------------------------------------------------------------------------------------- soft labels


def _fit_temperature(
    pairs: Sequence[tuple[Estimator, str]], cache: CaseCache, config: TrainConfig, progress: Progress
) -> float:
    """Return the temperature for which the estimates fit the labels near the foreground best.

    It is fitted to the logarithms of the estimates, which are means over the codes. The logits of all codes would take
    too much memory.
    """
    fit = TemperatureFit(IGNORE_INDEX, region="near")
    for done, (net, name) in enumerate(pairs, 1):
        case = cache.get(name)
        soft = estimate_case(net, case, replace(config, temperature=1.0)).cpu()
        fit.add(soft.clamp(min=1e-12).log(), torch.from_numpy(case.label))
        progress("temperature", done, len(pairs), None)
    return fit.temperature()


def _write(run: Run, net: Estimator, cache: CaseCache, name: str, config: TrainConfig) -> dict[str, float]:
    """Estimate and write the soft labels of a case, and return :func:`_quality` of the estimate."""
    case = cache.get(name)
    soft = estimate_case(net, case, config).cpu()
    label = torch.from_numpy(case.label).long()
    valid = label != IGNORE_INDEX
    onehot = torch.zeros_like(soft).scatter_(0, torch.where(valid, label, 0)[None], valid[None].to(soft))
    blended = (1 - config.alpha) * onehot + config.alpha * soft
    run.write(soft_label_file(name), soft_labels_file(blended.numpy(), cache.case(name).images[0]))
    return _quality(soft, label, cache.dataset)


QUALITY = ("dice", "nll", "confidence", "accuracy")
LARGEST = 1e300


def _quality(soft: Tensor, label: Tensor, dataset: Dataset) -> dict[str, float]:
    """Return the Dice of an estimate, and its NLL, mean confidence and accuracy over the foreground.

    A mean confidence above the accuracy means that the estimate is over-confident.
    """
    dice = count_classes(soft.argmax(0), label, len(dataset.class_names)).dice()[1:]
    inside = label > 0
    p, y = soft[:, inside].double(), label[inside]
    confidence, top = p.max(0)
    nll = -p.gather(0, y[None]).clamp(min=1e-12).log()
    return {
        "dice": mean_of([value for value in dice.tolist() if not math.isnan(value)]) or 0.0,
        "nll": float(nll.mean()) if len(y) else 0.0,
        "confidence": float(confidence.mean()) if len(y) else 1.0,
        "accuracy": float((top == y).double().mean()) if len(y) else 1.0,
    }
