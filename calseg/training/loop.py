"""The training loop of both stages: batches, updates, checkpoints and signals.

Every random draw is a pure function of seed and iteration. So a resumed run ends with the same bits as an uninterrupted
one on the same machine.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from calseg.errors import RunError
from calseg.runs import Progress, Run, RunInterruptedError
from calseg.training.checkpoint import CHECKPOINT, check_same_training, load_checkpoint, load_state, save_checkpoint
from calseg.training.config import TrainConfig
from calseg.volumes.patches import Batch, CaseCache, PatchSampler


class Patches(NamedTuple):
    """A batch on the device: ``image[N, channels, *S]``, ``label[N, *S]``, ``soft_labels[N, C, *S]``."""

    image: Tensor
    label: Tensor
    soft_labels: Tensor | None


def _patches(batch: Batch, device: torch.device) -> Patches:
    """Move a batch to the device."""
    image, label, soft_labels = (None if part is None else torch.from_numpy(part).to(device) for part in batch)
    assert image is not None
    assert label is not None
    if label.shape[-1] == 1:  # remove the axis of a single slice for a 2-D network
        return Patches(image[..., 0], label[..., 0], None if soft_labels is None else soft_labels[..., 0])
    return Patches(image, label, soft_labels)


def fit(
    net: nn.Module,
    loss_of: Callable[[Patches, int], Tensor],
    run: Run,
    content: dict[str, Any],
    cache: CaseCache,
    config: TrainConfig,
    *,
    folder: str = "",
    checkpoint_every: int,
    progress: Progress,
    stage: str = "train",
) -> float:
    """Train ``net`` in place, and return the seconds that it took, including those before a resumption.

    Where the run has a checkpoint of this training, the training goes on from there.

    Args:
        net: the network.
        loss_of: called as ``loss_of(patches, iteration)``; the loss of a batch, a 0-d tensor.
        run: the run that writes the checkpoints.
        content: the :func:`~calseg.training.checkpoint.fingerprint`.
        cache: the cases.
        config: the settings.
        folder: the folder of the checkpoints within that of the run, with a slash at its end.
        checkpoint_every: updates between checkpoints.
        progress: told of every update.
        stage: name of this training for ``progress``.
    """
    checkpoint = f"{folder}{CHECKPOINT}"
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    iteration, seconds = 0, 0.0
    is_resumed = run.holds(checkpoint)
    if is_resumed:
        path = run.path / checkpoint
        saved = load_checkpoint(path)
        check_same_training(path, saved, content)
        load_state(saved, path, net, optimizer)
        iteration, seconds = int(saved["iteration"]), float(saved["seconds"])

    names = tuple(content["split"]["training"])
    read_all(cache, (*names, *content["split"]["validation"]), run, progress)
    run.write_json(f"{folder}config.json", {"data": str(cache.dataset.folder.resolve()), **content["config"]})
    run.write_json(f"{folder}split.json", content["split"])
    sampler = PatchSampler(
        names, config.patch_size, config.batch_size, config.seed, config.foreground, config.flip_axes
    )
    if not is_resumed:
        save_checkpoint(run, checkpoint, content, net, optimizer, iteration, seconds)
    device = next(net.parameters()).device
    net.train()
    begun = time.perf_counter() - seconds
    with _signals() as received:
        while iteration < config.iterations:
            patches = _patches(sampler.batch(cache, iteration), device)
            loss = _step(net, optimizer, loss_of, patches, config, iteration)
            iteration += 1
            seconds = time.perf_counter() - begun
            progress(stage, iteration, config.iterations, loss)
            if iteration % checkpoint_every == 0 or iteration == config.iterations or received:
                save_checkpoint(run, checkpoint, content, net, optimizer, iteration, seconds)
            if received:
                raise RunInterruptedError(
                    f"interrupted after iteration {iteration}, which is saved in {run.path / checkpoint}", received[0]
                )
    return seconds


def read_all(cache: CaseCache, names: Sequence[str], run: Run, progress: Progress) -> None:
    """Read every case once, so that a bad file, or one that changed since the run began, stops it before any update."""
    for done, name in enumerate(names, 1):
        cache.get(name)
        progress("read", done, len(names), None)
    inputs = cache.inputs(names)
    run.check_inputs(inputs)
    run.remember(inputs)


def _step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Patches, int], Tensor],
    patches: Patches,
    config: TrainConfig,
    iteration: int,
) -> float:
    """Make one update of the network in place, and return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, iteration)
    loss = loss_of(patches, iteration)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RunError(
            f"the loss is {value} at iteration {iteration + 1}; a smaller --learning-rate may help "
            "(the last checkpoint is kept)"
        )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0)
    optimizer.step()
    return value


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Return the learning rate: linear warm-up over the first 5 %, and polynomial decay with exponent 0.9."""
    warm = max(config.iterations // 20, 1)
    decay = (1 - iteration / config.iterations) ** 0.9
    return config.learning_rate * min((iteration + 1) / warm, 1.0) * float(decay)


def noise_seed(seed: int, iteration: int, stream: int) -> int:
    """Return a 63-bit seed for the noise of one call of a loss. It is a pure function of the arguments."""
    high, low = np.random.SeedSequence((seed, 2, iteration, stream)).generate_state(2)
    return (int(high) << 31) ^ int(low)


def check_device(name: str) -> torch.device:
    """Return the device of that name. Raise :class:`RunError` if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"device {name!r} cannot be used ({reason})") from error
    return device


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP, so that the iteration in progress can end; a second one acts at once.

    A signal that the process ignores, as under ``nohup``, stays ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}
    previous = {number: handler for number, handler in previous.items() if handler != signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
