"""Prediction of probability maps with a trained network, for ``calseg predict``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calseg.errors import RunError
from calseg.files import read_json
from calseg.runs import CasesInterruptedError, Progress, RunFolder, check_apart, no_progress
from calseg.training.checkpoint import CHECKPOINT, METRICS, data_of, description, load_checkpoint, load_state
from calseg.training.config import TrainConfig
from calseg.training.inference import predict_volume
from calseg.training.loop import check_device
from calseg.training.nets import SegmentationNet, build_net_of_run
from calseg.volumes.datasets import Dataset, find_cases
from calseg.volumes.nifti import DataError
from calseg.volumes.patches import CaseCache
from calseg.volumes.probabilities import probabilities_file

CASES = ("validation", "training", "all")
SUMMARY = "predict.json"


def predict_folder(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    cases: str = "validation",
    calibrated: bool = False,
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
        calibrated: True to divide the logits by the run's temperature (:func:`calseg.training.train`). This changes
            probabilities and not which class has the highest. Those of validation cases then look better calibrated
            than those of new cases, because the temperature was fitted to them.
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
    check_apart(Path(out), run, data)
    checkpoint = Path(run) / CHECKPOINT
    saved = load_checkpoint(checkpoint)
    config = TrainConfig.from_json(saved["config"])
    dataset = find_cases(data)
    check_apart(Path(out), files=dataset.files)
    names = _names(dataset, saved, cases, checkpoint)
    temperature = _temperature(Path(run)) if calibrated else 1.0
    net = _load_net(saved, config, checkpoint).to(target)
    net.eval()

    content = {
        "run": str(Path(run).resolve()),
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "iteration": int(saved["iteration"]),
        "data": str(Path(data).resolve()),
        "cases": names,
        "temperature": temperature,
    }
    maps = {name: f"{name}.nii.gz" for name in names}
    same = {
        "the network in RUN": content["checkpoint"],
        "the cases to predict": names,
        "the temperature": temperature,
        **data_of(description(dataset)),
    }
    folder = RunFolder(Path(out), "predict", (SUMMARY, *maps.values()))
    cache = CaseCache(dataset)
    with folder.open({}, same, resume=resume, overwrite=overwrite) as results:
        done = {name for name, file in maps.items() if results.holds(file)}
        results.check_inputs(cache.inputs([name for name in names if name in done]))
        results.write_json(SUMMARY, content)
        try:
            for number, name in enumerate(names, 1):
                if name not in done:
                    logits = predict_volume(net, cache.get(name).image, config.patch_size)
                    probabilities = torch.softmax(logits / temperature, 0).cpu().numpy()
                    results.remember(cache.inputs([name]))
                    results.write(maps[name], probabilities_file(probabilities, cache.case(name).images[0]))
                    done.add(name)
                progress("predict", number, len(names), None)
        except KeyboardInterrupt:
            raise CasesInterruptedError(results.path, len(done), len(names)) from None
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


def _temperature(run: Path) -> float:
    """Return the temperature of a finished run."""
    path = run / METRICS
    metrics = read_json(path) if path.is_file() else {}
    temperature = metrics.get("temperature") if isinstance(metrics, dict) else None
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise RunError(f"{path}: has no temperature; train to the end, or predict without --calibrated")
    return float(temperature)


def _load_net(saved: Mapping[str, Any], config: TrainConfig, checkpoint: Path) -> SegmentationNet:
    """Return the network of a checkpoint."""
    net = build_net_of_run(config, len(saved["channels"]), len(saved["classes"]))
    load_state(saved, checkpoint, net)
    return net
