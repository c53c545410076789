"""Training of the network to deploy with any method, and its scores on the validation cases.

For the method "calseg", the first stage (:mod:`calseg.training.stage_one`) is run before, in the same folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calseg.errors import RunError
from calseg.methods import METHODS, Output, Target, TemperatureFit
from calseg.runs import Progress, Run, RunFolder, check_apart, no_progress, read_state
from calseg.scores import CaseScores, summarise
from calseg.training.checkpoint import CHECKPOINT, METRICS, RUN_FILES, data_of, fingerprint
from calseg.training.config import TrainConfig
from calseg.training.inference import predict_volume
from calseg.training.loop import Patches, check_device, fit, noise_seed
from calseg.training.nets import SegmentationNet, build_net
from calseg.training.stage_one import estimate_in, read_summary, soft_label_file, stage_one_files
from calseg.volumes.datasets import IGNORE_INDEX, Dataset, find_cases, split_cases
from calseg.volumes.patches import CaseCache
from calseg.volumes.probabilities import soft_labels_path


def train(
    data: str | Path,
    out: str | Path,
    config: TrainConfig,
    *,
    soft_labels: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    checkpoint_every: int = 50,
    progress: Progress = no_progress,
    also: Callable[[str, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Train the network to deploy on the cases of ``data``, and score the validation cases.

    For the method "calseg", the first stage is run before, unless ``soft_labels`` is given.

    Args:
        data: folder in the Medical Segmentation Decathlon's or nnU-Net's raw layout.
        out: folder of the run.
        config: settings of the run.
        soft_labels: folder with ``NAME.nii.gz`` for every training case. Only for the method "calseg".
        resume: True to continue the run in ``out``, which must have the same settings and data.
        overwrite: True to replace the run in ``out``.
        device: name of a PyTorch device.
        checkpoint_every: number of updates between checkpoints.
        progress: function that is called after every step.
        also: function ``also(name, logits)`` that is called with the prediction of every validation case.

    Returns:
        The content of ``metrics.json``. The entry ``temperature`` is the one that fits the predictions near the
        foreground of the validation cases best (:func:`calseg.methods.fit_temperature`). If the first stage was run,
        the entry ``soft_labels`` holds the quality of its estimates
        (:func:`~calseg.training.stage_one.estimate`).

    Raises:
        CalsegError: a file or a setting is wrong, or the folder is not empty. The user can fix it.
        RunInterruptedError: SIGINT or SIGTERM was received. The results so far are kept on disk.
    """
    makes_soft_labels = METHODS[config.method].soft_labels
    if soft_labels is not None and not makes_soft_labels:
        raise RunError(f"soft labels go with the method calseg, and only with it; got {config.method!r}")
    target = check_device(device)
    check_apart(Path(out), data, *([] if soft_labels is None else [soft_labels]))
    dataset = find_cases(data)
    training, validation = split_names(dataset, config)
    content = fingerprint(dataset, config, training, validation)
    has_first_stage = makes_soft_labels and soft_labels is None
    maps = {} if soft_labels is None else {name: soft_labels_path(Path(soft_labels), name) for name in training}
    check_apart(Path(out), files=[*dataset.files, *maps.values()])
    files = (*RUN_FILES, *(stage_one_files(training, config.folds) if has_first_stage else ()))
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, "progress": progress}
    folder = RunFolder(Path(out), "train", tuple(dict.fromkeys(files)))
    with folder.open(content["config"], data_of(content), resume=resume, overwrite=overwrite) as run:
        summary = None
        if has_first_stage:
            maps = {name: run.path / soft_label_file(name) for name in training}
            if run.holds(CHECKPOINT):  # the first stage has ended
                summary = read_summary(run, config, training, is_finished=True)
            else:
                summary = estimate_in(run, CaseCache(dataset), config, training, target, **options)
        metrics = _train_network(run, CaseCache(dataset, soft_labels=maps), config, content, target, also, **options)
        if summary is not None:
            metrics["soft_labels"] = summary["estimate"]
            metrics["seconds"]["stage1"] = summary["seconds"]
        run.write_json(METRICS, metrics)
    return metrics


def started(run: Path) -> bool:
    """Whether the folder ``run`` holds a run to resume."""
    return read_state(run) is not None


def split_names(dataset: Dataset, config: TrainConfig) -> tuple[list[str], list[str]]:
    """Return the names of the cases to train on and of those to validate on."""
    return split_cases([case.name for case in dataset.cases], config.val_fraction, config.split_seed)


def _train_network(
    run: Run,
    cache: CaseCache,
    config: TrainConfig,
    content: dict[str, Any],
    target: torch.device,
    also: Callable[[str, Tensor], None] | None,
    *,
    checkpoint_every: int,
    progress: Progress,
) -> dict[str, Any]:
    """Train the network to deploy on the cases of ``cache`` and score it; ``content`` is its fingerprint."""
    dataset = cache.dataset
    net = build_net(
        len(dataset.channel_names),
        len(dataset.class_names),
        spatial_dims=config.spatial_dims,
        dense_head=METHODS[config.method].dense_head,
        seed=config.seed,
    ).to(target)

    def loss_of(patches: Patches, iteration: int) -> Tensor:
        return objective(net(patches.image), patches.label, config, iteration, patches.soft_labels)

    seconds = fit(net, loss_of, run, content, cache, config, checkpoint_every=checkpoint_every, progress=progress)
    begun = time.perf_counter()
    temperature = TemperatureFit(IGNORE_INDEX, region="near")

    def seen(name: str, logits: Tensor) -> None:
        temperature.add(logits, torch.from_numpy(cache.get(name).label).to(logits.device))
        if also is not None:
            also(name, logits)

    scores = score_cases(net, cache, content["split"]["validation"], config.patch_size, progress, seen)
    return {
        "dataset": dataset.name,
        "method": config.method,
        "iterations": config.iterations,
        "classes": list(dataset.class_names),
        **summarise(scores, dataset.class_names),
        "temperature": temperature.temperature(),
        "seconds": {"train": seconds, "evaluate": time.perf_counter() - begun},
        "config": content["config"],
    }


def objective(
    output: Output, label: Tensor, config: TrainConfig, iteration: int, soft_labels: Tensor | None = None
) -> Tensor:
    """Return the loss of the method for ``label[N, *S]``, a 0-d tensor. It is 0 if no voxel has a label."""
    target = Target(label, soft_labels, (noise_seed(config.seed, iteration, 0), noise_seed(config.seed, iteration, 1)))
    return METHODS[config.method].loss(output, target, config.dice_weight, **config.method_settings)


def score_cases(
    net: SegmentationNet,
    cache: CaseCache,
    names: Sequence[str],
    patch_size: Sequence[int],
    progress: Progress,
    also: Callable[[str, Tensor], None],
) -> Mapping[str, CaseScores]:
    """Predict whole volumes and score them. ``also(name, logits)`` is called with every prediction."""
    net.eval()
    cases: dict[str, CaseScores] = {}
    for done, name in enumerate(names, 1):
        case = cache.get(name)
        logits = predict_volume(net, case.image, patch_size)
        label = torch.from_numpy(case.label).to(logits.device)
        cases[name] = CaseScores.of(logits, label, class_wise=False)
        also(name, logits)
        progress("evaluate", done, len(names), None)
    return cases
