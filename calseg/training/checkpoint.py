"""Checkpoints, and the folder of a network: ``config.json``, ``split.json``, ``checkpoint.pt``, ``metrics.json``.

Every file is written atomically (:func:`calseg.runs.write_atomic`), so that an interruption leaves the previous one. A
checkpoint holds no state of a random generator, because every random draw is a pure function of seed and iteration.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calseg.runs import RunError, RunFolder, as_json, write_atomic
from calseg.training.config import TrainConfig
from calseg.volumes.datasets import Dataset

CHECKPOINT_FORMAT = 2
RUN_FILES = ("config.json", "split.json", "checkpoint.pt", "metrics.json")


def network_folder(path: Path) -> RunFolder:
    """Return the run folder of a network."""
    return RunFolder(path, "checkpoint.pt", RUN_FILES)


def fingerprint(
    dataset: Dataset, config: TrainConfig, training: Sequence[str], validation: Sequence[str]
) -> dict[str, Any]:
    """Return the content that must be equal in a run and in its resumption, in the types of JSON."""
    return as_json(
        {
            "config": asdict(config),
            "classes": dataset.class_names,
            "channels": dataset.channel_names,
            "split": {"training": training, "validation": validation},
        }
    )


def save_checkpoint(
    path: Path,
    content: Mapping[str, Any],
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    seconds: float,
) -> None:
    """Write network and optimizer after ``iteration`` updates. ``content`` is the :func:`fingerprint` of the run."""
    buffer = io.BytesIO()  # serialise to memory, so that a full disk raises in write_atomic() only
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    counters = {"format": CHECKPOINT_FORMAT, "iteration": iteration, "seconds": seconds}
    torch.save({**content, **state, **counters}, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint. No code from the file is executed (``weights_only``)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: not found") from None
    except Exception as error:  # a broken archive raises many kinds of exceptions
        raise RunError(f"{path}: corrupt, or not a checkpoint of calseg ({type(error).__name__})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise RunError(f"{path}: not a checkpoint of calseg")
    if content["format"] != CHECKPOINT_FORMAT:
        raise RunError(f"{path}: checkpoint format {content['format']}, but this version reads {CHECKPOINT_FORMAT}")
    return content


def check_same_run(folder: RunFolder, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise :class:`RunError` if the fingerprints of a saved run and of its resumption differ."""
    folder.check_same_settings(saved.get("config", {}), wanted["config"])
    folder.check_same_data(saved, wanted, {key: f"the {key} of DATA" for key in ("classes", "channels", "split")})
