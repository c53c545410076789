"""Prediction of probability maps with a trained network, for ``calseg predict``."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calseg.runs import (
    CasesInterruptedError,
    Progress,
    RunError,
    RunFolder,
    no_progress,
    read_json,
    write_atomic,
    write_json,
)
from calseg.training.checkpoint import load_checkpoint
from calseg.training.config import TrainConfig
from calseg.training.inference import predict_volume
from calseg.training.loop import check_device
from calseg.training.nets import SegmentationNet, build_net_of_run
from calseg.volumes.datasets import Dataset, find_cases
from calseg.volumes.nifti import DataError
from calseg.volumes.patches import CaseCache
from calseg.volumes.probabilities import probabilities_file

CASES = ("validation", "training", "all")
STATE = "predict.json"
WORDS = {
    "run": "the folder RUN",
    "checkpoint": "the network in RUN",
    "iteration": "the network in RUN",
    "data": "the folder DATA",
    "cases": "the cases to predict",
}
"""Words for the entries of ``predict.json``, for the error if one of them has changed."""


def predict_folder(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    cases: str = "validation",
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write ``out/NAME.nii.gz``, float32 ``[x, y, z, classes]``, for cases of ``data`` with the network of ``run``.

    Args:
        run: folder of the training run.
        data: folder of the cases.
        out: folder of the probability maps.
        cases: "validation" or "training", by the split of the run, or "all".
        resume: True to continue an interrupted prediction. Existing maps are complete and are not computed again.
        overwrite: True to replace the maps that ``out`` holds.
        device: name of a PyTorch device.
        progress: function that is called after every case.

    Returns:
        The content of ``out/predict.json``.

    Raises:
        CalsegError: a file or a setting is wrong, and the user can fix it.
        CasesInterruptedError: Ctrl-C was pressed. The finished maps are kept.
    """
    if cases not in CASES:
        raise RunError(f"cases must be one of {', '.join(CASES)}; got {cases!r}")
    target = check_device(device)
    checkpoint = Path(run) / "checkpoint.pt"
    saved = load_checkpoint(checkpoint)
    config = TrainConfig.from_json(saved["config"])
    dataset = find_cases(data)
    names = _names(dataset, saved, cases, checkpoint)
    net = _load_net(saved, config, checkpoint).to(target)
    net.eval()

    folder = Path(out)
    content = {
        "run": str(Path(run).resolve()),
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "iteration": int(saved["iteration"]),
        "data": str(Path(data).resolve()),
        "cases": names,
    }
    maps = {name: folder / f"{name}.nii.gz" for name in names}
    results = RunFolder(folder, STATE, tuple(glob.escape(path.name) for path in maps.values()))
    if results.open(resume=resume, overwrite=overwrite):
        results.check_same_data(read_json(results.state_path), content, WORDS)
    write_json(results.state_path, content)

    cache = CaseCache(dataset)
    labels = {case.name: case.label for case in dataset.cases}
    try:
        for done, (name, path) in enumerate(maps.items(), 1):
            if not path.exists():
                logits = predict_volume(net, cache.get(name).image, config.patch_size)
                probabilities = torch.softmax(logits, 0).cpu().numpy()
                write_atomic(path, probabilities_file(probabilities, labels[name]))
            progress("predict", done, len(maps), None)
    except KeyboardInterrupt:
        raise CasesInterruptedError(folder, sum(path.exists() for path in maps.values()), len(maps)) from None
    return content


def _names(dataset: Dataset, saved: Mapping[str, Any], cases: str, checkpoint: Path) -> list[str]:
    """Return the names of the cases to predict, after checking that the data fit the checkpoint."""
    for key, ours in (("classes", dataset.class_names), ("channels", dataset.channel_names)):
        if list(saved[key]) != list(ours):
            raise DataError(
                f"{dataset.folder}: the {key} are {', '.join(ours)}, but {checkpoint} was trained on"
                f" {', '.join(saved[key])}"
            )
    present = [case.name for case in dataset.cases]
    if cases == "all":
        return present
    names = [str(name) for name in saved["split"][cases]]
    gone = [name for name in names if name not in present]
    if gone:
        raise DataError(f"{dataset.folder}: the {cases} case {gone[0]!r} of {checkpoint} is not in it (--cases all?)")
    return names


def _load_net(saved: Mapping[str, Any], config: TrainConfig, checkpoint: Path) -> SegmentationNet:
    net = build_net_of_run(config, len(saved["channels"]), len(saved["classes"]))
    try:
        net.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise RunError(f"{checkpoint}: does not fit this version of calseg ({error})") from error
    return net
