"""Probability maps of a trained network, for ``calseg evaluate`` and others: what ``calseg predict`` runs.

Needs the extra ``calseg[train]`` (MONAI, nibabel).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calseg.data import CaseCache, DataError, Dataset, find_cases, probabilities_file
from calseg.nets import SegmentationNet, build_net
from calseg.training import (
    CasesInterruptedError,
    Progress,
    TrainConfig,
    TrainingError,
    check_device,
    load_checkpoint,
    no_progress,
    predict_volume,
    prepare_run,
    read_json,
    write_atomic,
    write_json,
)

CASES = ("validation", "training", "all")
STATE = "predict.json"


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

    ``cases`` is "validation" or "training", by the split of the run, or "all". ``resume`` goes on after an
    interruption: maps are written whole or not at all. Returns what ``out/predict.json`` holds. Raises
    :class:`~calseg.data.DataError` or :class:`~calseg.training.TrainingError` for what the user can mend,
    :class:`~calseg.training.CasesInterruptedError` after Ctrl-C.
    """
    if cases not in CASES:
        raise TrainingError(f"cases must be one of {', '.join(CASES)}; got {cases!r}")
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
    prepare_run(
        folder, resume=resume, overwrite=overwrite, files=(STATE, *(path.name for path in maps.values())), state=STATE
    )
    if resume and read_json(folder / STATE) != content:
        raise TrainingError(f"{folder / STATE}: cannot be resumed; the run, its network, the data or the cases changed")
    write_json(folder / STATE, content)

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
    net = build_net(
        len(saved["channels"]),
        len(saved["classes"]),
        spatial_dims=config.spatial_dims,
        dense_head=config.method == "vls",
        seed=config.seed,
    )
    try:
        net.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise TrainingError(f"{checkpoint}: does not fit this version of calseg ({error})") from error
    return net
