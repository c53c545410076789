"""The files of a network in training: ``config.json``, ``split.json``, ``checkpoint.pt``, ``metrics.json``.

Each file is written whole or not at all (:class:`calseg.runs.Run`), so that an interruption leaves the previous one. A
checkpoint holds no state of a random generator: every random draw is a pure function of seed and iteration.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calseg.errors import RunError, brief
from calseg.files import as_json
from calseg.runs import Run, check_same_data, check_same_settings
from calseg.training.config import TrainConfig
from calseg.volumes.datasets import Dataset

CHECKPOINT_FORMAT = 3
CHECKPOINT = "checkpoint.pt"
DATA_ENTRIES = ("classes", "channels", "ignore_label", "split")
METRICS = "metrics.json"
RUN_FILES = ("config.json", "split.json", CHECKPOINT, METRICS)


def description(dataset: Dataset) -> dict[str, Any]:
    """What ``dataset.json`` says of the data, for a resumed run to compare."""
    return {
        "classes": dataset.class_names,
        "channels": dataset.channel_names,
        "ignore_label": dataset.ignore_label,
    }


def fingerprint(
    dataset: Dataset, config: TrainConfig, training: Sequence[str], validation: Sequence[str]
) -> dict[str, Any]:
    """What a resumed training must share with the one that it continues, in JSON's types."""
    split = {"training": training, "validation": validation}
    return as_json({"config": asdict(config), **description(dataset), "split": split})


def data_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a :func:`fingerprint` or :func:`description` that tell of the data, by words for them."""
    return {f"the {key} of DATA".replace("_", " "): value for key, value in content.items() if key in DATA_ENTRIES}


def save_checkpoint(
    run: Run,
    name: str,
    content: Mapping[str, Any],
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    seconds: float,
) -> None:
    """Write network and optimizer after ``iteration`` updates, with ``content``, the :func:`fingerprint`."""
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    _check_finite(state, f"the weights after iteration {iteration}", "a smaller --learning-rate may help")
    counters = {"format": CHECKPOINT_FORMAT, "iteration": iteration, "seconds": seconds}
    run.write(name, sealed({**content, **state, **counters}))  # serialised first: a full disk surfaces in write alone


def sealed(content: Mapping[str, Any]) -> bytes:
    """A file that PyTorch reads, with a digest of itself.

    PyTorch writes a ZIP archive. Its comment, which is the end of the file, gets the SHA-256 of all that stands before.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    archive = buffer.getvalue()[: -len(NO_COMMENT)]
    return archive + _seal_of(archive)


NO_COMMENT = bytes(2)
"""The end of an archive without a comment: the comment's length, which is 0."""


def _seal_of(archive: bytes) -> bytes:
    comment = f"sha256 {hashlib.sha256(archive).hexdigest()}".encode()
    return len(comment).to_bytes(2, "little") + comment


SEAL_BYTES = len(_seal_of(b""))


def _check_finite(state: Any, what: str, advice: str) -> None:
    """Refuse tensors, in dictionaries and lists of any depth, that hold a number that is not finite."""
    values = [state]
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
            raise RunError(f"{what}: not all numbers are finite; {advice}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint; no code from it is run (``weights_only``).

    Refused is a file whose digest is not that of its content, that lacks an entry, or with a weight that is not finite.
    """
    try:
        data = path.read_bytes()
        if data[-SEAL_BYTES:] != _seal_of(data[:-SEAL_BYTES]):
            raise ValueError("its digest is not that of its content")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: not found") from None
    except Exception as error:  # a broken archive surfaces as one of many kinds of exception
        raise RunError(f"{path}: corrupt, or not a checkpoint of calseg ({brief(error)})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise RunError(f"{path}: not a checkpoint of calseg")
    if content["format"] != CHECKPOINT_FORMAT:
        raise RunError(f"{path}: checkpoint format {content['format']}, but this version reads {CHECKPOINT_FORMAT}")
    for name, kind in ENTRIES.items():
        if not isinstance(content.get(name), kind):
            raise RunError(f"{path}: not a checkpoint of calseg; its entry {name!r} is missing or no {kind.__name__}")
    if not all(isinstance(content["split"].get(part), list) for part in ("training", "validation")):
        raise RunError(f"{path}: not a checkpoint of calseg; its entry 'split' lacks a part")
    _check_finite([content["model"], content["optimizer"]], str(path), "the network cannot be used")
    return content


ENTRIES = {
    "config": dict,
    "classes": list,
    "channels": list,
    "split": dict,
    "model": dict,
    "optimizer": dict,
    "iteration": int,
    "seconds": float,
}
"""The entries of a checkpoint and their types."""


def load_state(
    saved: Mapping[str, Any], path: Path, net: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Give a network its weights of the checkpoint ``saved``, read from ``path``, and an optimizer its state."""
    try:
        net.load_state_dict(saved["model"])
        if optimizer is not None:
            optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{path}: does not fit this version of calseg ({brief(error)})") from error


def check_same_training(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint whose :func:`fingerprint` ``saved`` is not the one ``wanted``."""
    check_same_settings(path, saved["config"], wanted["config"])
    check_same_data(path, data_of(saved), data_of(wanted))
