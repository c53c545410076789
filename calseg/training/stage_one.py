"""The first stage of CALSeg: training networks that estimate soft labels, and writing the soft labels of every case.

In the folder of a run, ``stage1`` holds a network per fold, ``soft_labels`` holds ``NAME.nii.gz`` for every training
case, and ``soft_labels.json`` is the summary. Soft labels are cross-fitted: the training cases are split into folds,
and the cases of a fold get soft labels from a network that was trained on the other folds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calseg.functional import gaussian_kl, vls_cross_entropy
from calseg.methods import fit_temperature
from calseg.runs import (
    CasesInterruptedError,
    Progress,
    RunError,
    RunFolder,
    as_json,
    no_progress,
    read_json,
    write_atomic,
    write_json,
)
from calseg.scores import count_classes, mean_of
from calseg.training.checkpoint import RUN_FILES, fingerprint, network_folder
from calseg.training.config import TrainConfig
from calseg.training.inference import in_windows
from calseg.training.loop import Patches, check_device, fit, noise_seed
from calseg.training.nets import StageOneNet, build_stage_one
from calseg.volumes.datasets import IGNORE_INDEX, Dataset, find_cases
from calseg.volumes.patches import CaseCache, LoadedCase
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
            estimates of networks that were not trained on a case fit the labels best.
        names: names of the cases. Default: every case of ``data``.
        networks: folder of another run on the same cases, whose first stage is used instead of training one. The
            settings ``alpha``, ``temperature`` and ``num_samples`` may then differ.
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
    dataset = find_cases(data)
    names = [case.name for case in dataset.cases] if names is None else list(names)
    run = Path(out)
    wanted = as_json({"config": asdict(config), "names": names})
    folder = stage_one_folder(run, config.folds)
    if folder.open(resume=resume, overwrite=overwrite):
        saved = read_json(folder.state_path)
        folder.check_same_settings(saved.get("config", {}), wanted["config"])
        folder.check_same_data(saved, wanted, {"names": "the training cases"})
    else:
        write_json(run / "config.json", {"data": str(Path(data).resolve()), **wanted["config"]})
        write_json(folder.state_path, {**wanted, "cases": {}})
    try:
        return _estimate(
            dataset, run, config, names, None if networks is None else Path(networks), target,
            data=data, checkpoint_every=checkpoint_every, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        done = len(read_json(run / SUMMARY)["cases"])
        raise CasesInterruptedError(run / "soft_labels", done, len(names)) from None


def _estimate(
    dataset: Dataset,
    run: Path,
    config: TrainConfig,
    names: Sequence[str],
    networks: Path | None,
    target: torch.device,
    *,
    data: str | Path,
    checkpoint_every: int,
    progress: Progress,
) -> dict[str, Any]:
    """Make the networks, the temperature and the maps, except for those that ``run`` already holds."""
    cache = CaseCache(dataset)
    folds = split_folds(names, config.folds, config.split_seed)  # no more than there are cases
    # Fix the settings on which the networks do not depend, so that other runs can use the same networks.
    stage = replace(config, alpha=1.0, temperature=1.0, num_samples=1)
    nets: list[StageOneNet] = []
    seconds = 0.0
    for number, members in enumerate(folds):
        folder = _fold(networks or run, number)
        is_trained = network_folder(folder).holds_run
        if networks is not None and not is_trained:
            raise RunError(f"{folder / 'checkpoint.pt'}: not found; there is no first stage of these folds")
        content = fingerprint(dataset, stage, _others(names, members), members)
        nets.append(_build(dataset, config).to(target))
        seconds += fit(
            nets[-1], _loss_of(nets[-1], config), folder, content, cache, stage,
            data=data, resume=is_trained, checkpoint_every=checkpoint_every,
            progress=progress, stage=f"fold {number + 1}/{len(folds)}",
        )  # fmt: skip

    pairs = [(net, name) for net, members in zip(nets, folds, strict=True) for name in members]
    content = read_json(run / SUMMARY)
    if "temperature" not in content:
        fitted = config.temperature is None
        content["temperature"] = _fit_temperature(pairs, cache, config, progress) if fitted else config.temperature
        write_json(run / SUMMARY, content)
    final = replace(config, temperature=content["temperature"])
    cases: dict[str, dict[str, float]] = content["cases"]
    for done, (net, name) in enumerate(pairs, 1):
        if name not in cases:
            cases[name] = _write(net, dataset, cache.get(name), run / "soft_labels", final)
            write_json(run / SUMMARY, content)
        progress("soft labels", done, len(pairs), None)
    summary: dict[str, Any] = {
        **content,
        "seconds": seconds,
        "estimate": {key: float(np.mean([case[key] for case in cases.values()])) for key in next(iter(cases.values()))},
    }
    write_json(run / SUMMARY, summary)
    return summary


def split_folds(names: Sequence[str], folds: int, seed: int) -> list[list[str]]:
    """Split names into ``folds`` parts of about equal size. The parts depend on the arguments only."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"fold:{seed}:{name}".encode()).digest())
    return [sorted(order[number::folds]) for number in range(min(folds, len(order)))]


def _fold(run: Path, number: int) -> Path:
    """Return the folder of the network of a fold."""
    return run / "stage1" / f"fold_{number}"


def _others(names: Sequence[str], members: Sequence[str]) -> list[str]:
    """Return the cases that the network of a fold is trained on: those of other folds, or all if there are none."""
    return [name for name in names if name not in set(members)] or list(names)


def stage_one_folder(run: Path, folds: int) -> RunFolder:
    """Return the run folder of a first stage. The network to deploy may later be in the same folder."""
    files = (SUMMARY, *RUN_FILES, "stage1/fold_*/*.json", "stage1/fold_*/checkpoint.pt", "soft_labels/*.nii.gz")
    folders = (*(f"stage1/fold_{number}" for number in range(folds)), "soft_labels")
    return RunFolder(run, SUMMARY, files, folders)


def _build(dataset: Dataset, config: TrainConfig) -> StageOneNet:
    """Return the networks of the first stage, before training."""
    return build_stage_one(
        len(dataset.channel_names),
        len(dataset.class_names),
        spatial_dims=config.spatial_dims,
        latent_size=config.latent_size,
        seed=config.seed,
    )


def _loss_of(net: StageOneNet, config: TrainConfig) -> Callable[[Patches, int], Tensor]:
    """Return the function that computes the loss of the first stage.

    It is the sum of the cross-entropy of the label, the squared error of the image, and the KL divergence of the
    posterior from its prior. The first two are means over the labelled voxels. The KL divergence is summed over the
    code, and is a mean over the patches.
    """

    def loss_of(patches: Patches, iteration: int) -> Tensor:
        generator = torch.Generator().manual_seed(noise_seed(config.seed, iteration, 0))
        noise = torch.randn(len(patches.image), net.latent_size, generator=generator, device="cpu").to(patches.image)
        logits, image, mu, logvar = net(patches.image, patches.label, noise)
        valid = patches.label != IGNORE_INDEX
        voxels = valid.sum().clamp(min=1)
        nll = vls_cross_entropy(logits, patches.label, ignore_index=IGNORE_INDEX, reduction="sum") / voxels
        error: Tensor = ((image - patches.image).square().mean(1) * valid).sum() / voxels
        return nll + config.reconstruction * error + config.beta * gaussian_kl(mu, logvar)

    return loss_of


# ------------------------------------------------------------------------------------------- soft labels


def estimate_case(net: StageOneNet, case: LoadedCase, config: TrainConfig) -> Tensor:
    """Return the estimate of a case before it is blended with the label, float32 ``[classes, x, y, z]``.

    Sliding windows with the size of the training patches overlap by half. Each window draws codes from its own
    posterior. The results are averaged with Gaussian weights.
    """
    device = next(net.parameters()).device
    seed = int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:4], "big")
    # Number the classes from 1, because windows are padded with 0, which must not mean background.
    label = np.where(case.label == IGNORE_INDEX, 0, case.label + 1).astype(np.float32)
    volume = torch.from_numpy(np.concatenate([case.image, label[None]])).to(device)
    is_flat = config.spatial_dims == 2

    def estimate(window: Tensor) -> Tensor:
        if is_flat:
            window = window[..., 0]
        classes = window[:, -1].long() - 1
        soft = net.estimate_soft_labels(
            window[:, :-1],
            torch.where(classes < 0, IGNORE_INDEX, classes),
            num_samples=config.num_samples,
            temperature=config.temperature,
            alpha=1.0,
            ignore_index=IGNORE_INDEX,
            generator=torch.Generator().manual_seed(noise_seed(config.seed, seed, 3)),
        )
        maps: Tensor = soft[..., None] if is_flat else soft
        return maps

    net.eval()
    with torch.inference_mode():
        return in_windows(estimate, volume, config.patch_size)


def _fit_temperature(
    pairs: Sequence[tuple[StageOneNet, str]], cache: CaseCache, config: TrainConfig, progress: Progress
) -> float:
    """Return the temperature for which the estimates fit the labels best.

    It is fitted to the logarithms of the estimates, which are means over the codes. The logits of all codes would take
    too much memory.
    """
    logits, labels = [], []
    for done, (net, name) in enumerate(pairs, 1):
        case = cache.get(name)
        soft = estimate_case(net, case, replace(config, temperature=1.0)).cpu()
        logits.append(soft.clamp(min=1e-12).log())
        labels.append(torch.from_numpy(case.label))
        progress("temperature", done, len(pairs), None)
    return fit_temperature(logits, labels, ignore_index=IGNORE_INDEX)


def _write(net: StageOneNet, dataset: Dataset, case: LoadedCase, folder: Path, config: TrainConfig) -> dict[str, float]:
    """Estimate and write the soft labels of a case, and return the :func:`_quality` of the estimate."""
    soft = estimate_case(net, case, config).cpu()
    label = torch.from_numpy(case.label).long()
    valid = label != IGNORE_INDEX
    onehot = torch.zeros_like(soft).scatter_(0, torch.where(valid, label, 0)[None], valid[None].to(soft))
    blended = (1 - config.alpha) * onehot + config.alpha * soft
    like = next(each.label for each in dataset.cases if each.name == case.name)
    write_atomic(soft_labels_path(folder, case.name), soft_labels_file(blended.numpy(), like))
    return _quality(soft, label, dataset)


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
