"""Soft labels for nnU-Net's preprocessed data, for ``calseg nnunet-soft-labels``.

Their source is the held-out predictions of a finished run of nnU-Net, or maps from elsewhere. In a run with five folds,
every case is predicted by a network that was not trained on it, and ``--npz`` keeps the probabilities. These are the
cross-fitted estimates that CALSeg's first stage makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from calseg.errors import CalsegError, RunError, listing
from calseg.files import InputFile, file_stamp, read_json
from calseg.integrations.nnunet import check_version
from calseg.integrations.nnunet.config import ALPHA, SoftLabelConfig
from calseg.integrations.nnunet.preprocessed import Preprocessed, Volume, find_dataset, folder_of_variable
from calseg.integrations.nnunet.store import SUMMARY, file_of, packed
from calseg.methods import TemperatureFit
from calseg.regions import near_foreground
from calseg.runs import CasesInterruptedError, Progress, Run, RunFolder, no_progress
from calseg.volumes.nifti import DataError, naming
from calseg.volumes.probabilities import KEY, soft_labels_path, sum_tolerance

FITTED_VOXELS = 1 << 20
"""The temperature is fitted to at most so many voxels near the foreground of a case, evenly spaced."""


class Source(NamedTuple):
    """Where the estimates are.

    Args:
        folder: the folder, for ``soft_labels.json``.
        files: the file of every case.
        read: function that reads one, ``[C, *S]`` as nnU-Net reads the image.
        is_held_out: whether the estimates are predictions, whose temperature can be fitted.
    """

    folder: Path
    files: Mapping[str, Path]
    read: Callable[[Path], Volume]
    is_held_out: bool


def make_soft_labels(
    dataset: str,
    configuration: str,
    config: SoftLabelConfig,
    *,
    run: Path | None = None,
    maps: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write soft labels beside the preprocessed data of a configuration, for :class:`nnUNetTrainerSoftLabels`.

    Args:
        dataset: number or name of the data set.
        configuration: name of the configuration, as in "3d_fullres".
        config: the settings.
        run: folder of a finished run of nnU-Net with the probabilities of its validation cases, ``fold_0`` and so on.
            Default: that of ``nnUNetTrainer`` on the same plans and configuration.
        maps: folder with a file ``CASE.nii.gz`` of soft labels for every case, 4-D with the classes last, in place of
            a run.
        resume: True to continue an interrupted call with the same arguments.
        overwrite: True to replace the soft labels of an earlier call.
        progress: function that is called after every case.

    Returns:
        The content of ``soft_labels.json``, with alpha, temperature and the names of the cases.

    Raises:
        CalsegError: a file, a fold or a setting is wrong, and the user can fix it.
        CasesInterruptedError: Ctrl-C was pressed. The finished cases are kept.
    """
    check_version()
    if run is not None and maps is not None:
        raise RunError("--run and --maps exclude each other")
    data = Preprocessed(find_dataset(dataset), config.plans, configuration)
    source = _held_out(data, run) if maps is None else _maps(data, maps)
    if not source.is_held_out:
        config = replace(config, temperature=config.temperature or 1.0)
    alpha = (ALPHA if source.is_held_out else 1.0) if config.alpha is None else config.alpha
    files = (SUMMARY, *map(file_of, data.cases))
    folder = RunFolder(data.soft_labels_folder, "nnunet-soft-labels", files, has_out=False)
    same = {"the cases": data.cases, "the source": str(source.folder.resolve())}
    settings = {**asdict(config), "alpha": alpha, "configuration": configuration}
    with folder.open(settings, same, resume=resume, overwrite=overwrite) as results:
        results.check_inputs({case: _input(path) for case, path in source.files.items()})
        temperature = config.temperature or _kept_temperature(results) or _fit(data, source, progress)
        content = {
            "dataset": data.folder.name,
            "configuration": configuration,
            "source": same["the source"],
            "alpha": alpha,
            "temperature": temperature,
            "cases": data.cases,
        }
        results.write_json(SUMMARY, content)
        _write(results, data, source, temperature, progress)
    return content


# ------------------------------------------------------------------------------------------------ sources


def _held_out(data: Preprocessed, run: Path | None) -> Source:
    """The probabilities of the validation cases of every fold of a run."""
    if run is None:
        name = f"nnUNetTrainer__{data.plans}__{data.configuration}"
        run = folder_of_variable("nnUNet_results") / data.folder.name / name
    if not run.is_dir():
        raise CalsegError(f"{run}: no such folder; train all folds with nnUNetv2_train ... --npz, or give --run")
    folds = data.folds()
    files = {
        case: run / f"fold_{number}" / "validation" / f"{case}.npz"
        for number, fold in enumerate(folds)
        for case in fold["val"]
        if case in data.cases
    }
    without_fold = [case for case in data.cases if case not in files]
    if without_fold:
        raise CalsegError(f"{data.folder / 'splits_final.json'}: no fold holds out {listing(without_fold)}")
    missing = {path.parent.parent.name: path for path in files.values() if not path.is_file()}
    if missing:
        raise CalsegError(
            f"{run}: no probabilities of the validation cases of {', '.join(missing)}, as"
            f" {next(iter(missing.values())).name}; run nnUNetv2_train ... --npz, or ... --val --npz after training"
        )
    return Source(run, {case: files[case] for case in data.cases}, _read_npz, is_held_out=True)


def _maps(data: Preprocessed, folder: Path) -> Source:
    """Soft labels from elsewhere."""
    files = {case: soft_labels_path(folder, case) for case in data.cases}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise CalsegError(f"{folder}: has no {listing(missing)}, for preprocessed cases of {data.folder.name}")
    return Source(folder, files, data.read_maps, is_held_out=False)


def _read_npz(path: Path) -> Volume:
    with naming(path), np.load(path) as content:
        if KEY not in content:
            raise DataError(f"{path}: has no key {KEY!r}, but {listing(list(content)) or 'nothing'}")
        return np.asarray(content[KEY], np.float32)


def _input(path: Path) -> list[InputFile]:
    return [InputFile(path, path.name, file_stamp(path))]


def _read(data: Preprocessed, source: Source, case: str) -> Volume:
    """Read the estimate of a case, and check that it holds probabilities. Maps may leave voxels out, with zeros."""
    path = source.files[case]
    estimate = source.read(path)
    total = estimate.sum(0)
    tolerance = sum_tolerance(len(estimate))
    is_one = np.abs(total - 1) <= tolerance
    if not source.is_held_out:
        is_one |= np.abs(total) <= tolerance
    if not (is_one.all() and (estimate >= -1e-3).all()):  # NaN fails both comparisons
        raise DataError(f"{path}: probabilities of all classes, which sum to 1 in every voxel, are wanted")
    return estimate


# ------------------------------------------------------------------------------------------- soft labels


def _kept_temperature(results: Run) -> float | None:
    """Return the temperature of an earlier call that this one continues."""
    if not results.holds(SUMMARY):
        return None
    return float(read_json(results.path / SUMMARY)["temperature"])


def _fit(data: Preprocessed, source: Source, progress: Progress) -> float:
    """Return the temperature under which the estimates fit the labels near the foreground best.

    Estimates and labels are compared before preprocessing.
    """
    ignore_index = -100 if data.labels.ignore_label is None else int(data.labels.ignore_label)
    fit = TemperatureFit(ignore_index)
    for done, case in enumerate(data.cases, 1):
        estimate, label = _read(data, source, case), data.read_label(case)
        data.cropped(estimate, case, source.files[case])  # checks the shape
        near = near_foreground(torch.from_numpy(label)[None], ignore_index=ignore_index).flatten().nonzero()[:, 0]
        chosen = near[:: math.ceil(len(near) / FITTED_VOXELS) or 1].numpy()
        flat = torch.from_numpy(estimate.reshape(len(estimate), -1)[:, chosen])
        fit.add(flat.clamp(min=1e-12).log(), torch.from_numpy(label.reshape(-1)[chosen]))
        progress("temperature", done, len(data.cases), None)
    return fit.temperature()


def _write(results: Run, data: Preprocessed, source: Source, temperature: float, progress: Progress) -> None:
    """Write the soft labels of every case that the run does not hold yet."""
    done = {case for case in data.cases if results.holds(file_of(case))}
    try:
        for number, case in enumerate(data.cases, 1):
            if case not in done:
                path = source.files[case]
                results.remember({case: _input(path)})
                estimate = data.cropped(_read(data, source, case), case, path)
                estimate = data.resampled(_tempered(estimate, temperature), case)
                results.write(file_of(case), packed(estimate, data.image_file(case)))
                done.add(case)
            progress("soft labels", number, len(data.cases), None)
    except KeyboardInterrupt:
        raise CasesInterruptedError(results.path, len(done), len(data.cases)) from None


def _tempered(estimate: Volume, temperature: float) -> Volume:
    """Return the softmax of ``log(estimate) / temperature``. Voxels of zeros stay zeros."""
    if temperature == 1:
        return np.ascontiguousarray(estimate)
    largest = estimate.max(0)
    powers = np.power(estimate.clip(min=0) / np.where(largest > 0, largest, 1), np.float32(1 / temperature))
    total = powers.sum(0)
    return np.asarray(powers / np.where(total > 0, total, 1), np.float32)
