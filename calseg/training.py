"""Training and evaluation behind ``calseg train``. Needs the extra ``calseg[train]`` (MONAI, nibabel).

A run is a folder: ``config.json``, ``split.json``, ``checkpoint.pt`` and, at the end, ``metrics.json``. Each
is written to a temporary file and renamed, so that an interruption leaves the previous one whole. Every
random draw is a pure function of (seed, iteration): a resumed run ends bit for bit where an uninterrupted one
on the same machine would, and a checkpoint holds no state of a random generator.
"""

from __future__ import annotations

import io
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from calseg.calibration import CalibrationBins, calibration_bins, calibration_error_from_bins
from calseg.data import (
    IGNORE_INDEX,
    Batch,
    CaseCache,
    Dataset,
    PatchSampler,
    find_cases,
    soft_labels_path,
    split_cases,
)
from calseg.functional import vls_cross_entropy, vls_elbo
from calseg.methods import focal_cross_entropy, mbls_cross_entropy, nacl_cross_entropy, svls_cross_entropy
from calseg.nets import Output, SegmentationNet, build_net
from calseg.runs import (  # noqa: F401
    CasesInterruptedError,
    Progress,
    RunFolder,
    RunInterruptedError,
    no_progress,
    read_json,
    write_atomic,
    write_json,
)
from calseg.runs import RunError as TrainingError

CHECKPOINT_FORMAT = 2
METHODS = ("cross_entropy", "label_smoothing", "svls", "focal", "mbls", "nacl", "vls", "calseg")
RUN_FILES = ("config.json", "split.json", "checkpoint.pt", "metrics.json")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run on given cases; ``calseg train --help`` explains each.

    A setting that is None becomes the method's default, of :data:`DEFAULTS`; the ``temperature`` of "calseg" stays
    None, and is then fitted (:func:`calseg.stages.estimate`).
    """

    method: str = "cross_entropy"
    iterations: int = 300
    batch_size: int = 2
    patch_size: tuple[int, int, int] = (48, 64, 48)
    learning_rate: float = 1e-2
    seed: int = 0
    val_fraction: float = 0.2
    split_seed: int = 0
    foreground: float = 1 / 3
    flip_axes: tuple[int, ...] = ()
    alpha: float = None  # type: ignore[assignment]
    sigma: float = 1.0
    gamma: float = 3.0
    margin: float = 5.0
    temperature: float = None  # type: ignore[assignment]
    num_samples: int = None  # type: ignore[assignment]
    beta: float = None  # type: ignore[assignment]
    latent_size: int = 4
    reconstruction: float = 0.1
    folds: int = 4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise TrainingError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        for name, value in DEFAULTS.get(self.method, DEFAULTS["vls"]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("iterations", "batch_size", "num_samples", "latent_size", "folds"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("learning_rate", "temperature", "sigma"):
            if getattr(self, name) is not None and not (0 < getattr(self, name) < math.inf):
                raise TrainingError(f"{name} must be positive and finite; got {getattr(self, name)}")
        for name in ("foreground", "alpha"):
            if not (0 <= getattr(self, name) <= 1):
                raise TrainingError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if not (0 < self.val_fraction < 1):
            raise TrainingError(f"val_fraction must lie strictly between 0 and 1; got {self.val_fraction}")
        for name in ("beta", "margin", "reconstruction"):
            if not (0 <= getattr(self, name) < math.inf):
                raise TrainingError(f"{name} must be finite and not negative; got {getattr(self, name)}")
        if not (self.gamma == 0 or 1 <= self.gamma < math.inf):
            raise TrainingError(f"gamma must be 0 or at least 1; got {self.gamma}")
        if self.seed < 0 or self.split_seed < 0:
            raise TrainingError("seed and split_seed must not be negative")
        sides = self.patch_size[:2] if self.spatial_dims == 2 else self.patch_size
        if len(self.patch_size) != 3 or any(side < 8 or side % 8 for side in sides):
            raise TrainingError(
                f"patch_size must be three positive multiples of 8, or two and 1 for slices; got {self.patch_size}"
            )
        if max(sides) == 8:
            raise TrainingError(
                f"patch_size {self.patch_size} leaves one voxel at the network's coarsest level; enlarge a side"
            )
        if any(axis not in (0, 1, 2) for axis in self.flip_axes):
            raise TrainingError(f"flip_axes are among 0, 1 and 2; got {self.flip_axes}")

    @property
    def spatial_dims(self) -> int:
        """2 where a patch is one slice, for a network of two dimensions that sees slices only; else 3."""
        return 2 if self.patch_size[2:] == (1,) else 3

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of ``dataclasses.asdict`` after a trip through JSON."""
        try:
            settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**settings)
        except TypeError as error:
            raise TrainingError(f"not the settings of a run: {error}") from error


DEFAULTS: dict[str, dict[str, float]] = {
    "vls": {"alpha": 0.1, "temperature": 1.0, "num_samples": 4, "beta": 0.001},
    "calseg": {"alpha": 0.5, "num_samples": 8, "beta": 0.001},
}
"""Of the settings that several methods share; the methods not listed take those of "vls".

The experiment behind them is in benchmarks/README.md, "Does it calibrate?"; its figures here are of tuning cases.
CALSeg: with ``alpha`` 1 hippocampus' Dice is .834, with 0.5 it is .844. A fitted temperature had a lower NLL than
cross-entropy on each of the three data sets; one of 2 has a lower foreground ECE on two of them, and a higher NLL than
the fitted one on all.
Over the codes drawn the foreground's probabilities vary by .01 to .04, so 8 are enough. Of "vls", ``alpha`` 0.3 with
temperature 2 had a lower foreground ECE and a higher NLL than these.
"""


# ------------------------------------------------------------------------------------------------- files


def prepare_run(
    out: Path, *, resume: bool, overwrite: bool, files: Sequence[str] = RUN_FILES, state: str = "checkpoint.pt"
) -> None:
    """Gone soon: see :class:`calseg.runs.RunFolder`."""
    RunFolder(out, state, tuple(files)).open(resume=resume, overwrite=overwrite)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it (``weights_only``)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainingError(f"{path}: not found") from None
    except Exception as error:  # a broken archive surfaces as one of many kinds of exception
        raise TrainingError(f"{path}: corrupt, or not a checkpoint of calseg ({type(error).__name__})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise TrainingError(f"{path}: not a checkpoint of calseg")
    if content["format"] != CHECKPOINT_FORMAT:
        raise TrainingError(
            f"{path}: checkpoint format {content['format']}, but this version reads {CHECKPOINT_FORMAT}"
        )
    return content


# --------------------------------------------------------------------------------------------- objective


def noise_seed(seed: int, iteration: int, stream: int) -> int:
    """A 63-bit seed for the noise of one loss call, a pure function of its arguments."""
    high, low = np.random.SeedSequence((seed, 2, iteration, stream)).generate_state(2)
    return (int(high) << 31) ^ int(low)


def objective(
    output: Output, label: Tensor, config: TrainConfig, iteration: int, soft_labels: Tensor | None = None
) -> Tensor:
    """The training loss, a scalar: the mean over the labelled voxels of ``label[N, *S]``.

    With a dense head it is the stage-1 ELBO of (mu, logvar) plus the cross-entropy of the logits with the
    soft labels that (mu, logvar), held fixed, give. Sums are divided here, so that a batch without a labelled
    voxel gives 0 and not NaN.
    """
    loss = _summed_loss(output, label, config, iteration, soft_labels)
    return loss / (label != IGNORE_INDEX).sum().clamp(min=1)


def _summed_loss(
    output: Output, label: Tensor, config: TrainConfig, iteration: int, soft_labels: Tensor | None
) -> Tensor:
    logits, alpha = output.logits, config.alpha
    if soft_labels is not None:
        return vls_cross_entropy(logits, label, soft_labels=soft_labels, ignore_index=IGNORE_INDEX, reduction="sum")
    if output.mu is not None and output.logvar is not None:
        return _summed_vls(output.logits, output.mu, output.logvar, label, config, iteration)
    if config.method == "svls":
        return svls_cross_entropy(logits, label, sigma=config.sigma, ignore_index=IGNORE_INDEX, reduction="sum")
    if config.method == "focal":
        return focal_cross_entropy(logits, label, gamma=config.gamma, ignore_index=IGNORE_INDEX, reduction="sum")
    if config.method == "mbls":
        return mbls_cross_entropy(
            logits, label, alpha=alpha, margin=config.margin, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    if config.method == "nacl":
        return nacl_cross_entropy(logits, label, alpha=alpha, ignore_index=IGNORE_INDEX, reduction="sum")
    smoothing = alpha if config.method == "label_smoothing" else 0.0
    return vls_cross_entropy(logits, label, label_smoothing=smoothing, ignore_index=IGNORE_INDEX, reduction="sum")


def _summed_vls(
    logits: Tensor, mu: Tensor, logvar: Tensor, label: Tensor, config: TrainConfig, iteration: int
) -> Tensor:
    elbo = vls_elbo(
        mu,
        logvar,
        label,
        num_samples=config.num_samples,
        beta=config.beta,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        seed=noise_seed(config.seed, iteration, 0),
    )
    return elbo + vls_cross_entropy(
        logits,
        label,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        mu=mu.detach(),
        logvar=logvar.detach(),
        alpha=config.alpha,
        temperature=config.temperature,
        num_samples=config.num_samples,
        beta=0.0,
        seed=noise_seed(config.seed, iteration, 1),
    )


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Linear warm-up over the first 5 %, then polynomial decay with exponent 0.9 (as nnU-Net's)."""
    warm = max(config.iterations // 20, 1)
    decay = (1 - iteration / config.iterations) ** 0.9
    return config.learning_rate * min((iteration + 1) / warm, 1.0) * float(decay)


# -------------------------------------------------------------------------------------------- evaluation


class Scores:
    """Proper scores and calibration error of a stream of predictions.

    Per region ("all" voxels, and "foreground": the voxels whose label is above 0) it holds the integer sums of
    :class:`calseg.CalibrationBins`, over ``n_bins`` equal bins of the top probability.
    """

    def __init__(self, n_bins: int = 15) -> None:
        self.n_bins = n_bins
        self.bins: dict[str, CalibrationBins | None] = {"all": None, "foreground": None}

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add ``logits`` float ``[C, *S]`` and ``label`` (integers) ``[*S]``; ignored voxels are skipped."""
        for region, held in self.bins.items():
            new = calibration_bins(
                logits[None], label[None], n_bins=self.n_bins, include_background=region == "all",
                ignore_index=IGNORE_INDEX,
            )  # fmt: skip
            self.bins[region] = new if held is None else held + new

    def compute(self) -> dict[str, dict[str, float | None]]:
        """``{region: {"nll", "brier", "ece"}}``; None where the region has no voxel."""
        result: dict[str, dict[str, float | None]] = {}
        for region, bins in self.bins.items():
            result[region] = dict.fromkeys(("nll", "brier", "ece"))
            if bins is not None and bins.num_voxels:
                scores = bins.mean_nll(), bins.mean_brier(), calibration_error_from_bins(bins)
                result[region] = {name: float(score) for name, score in zip(result[region], scores, strict=True)}
        return result


def dice_per_class(prediction: Tensor, label: Tensor, num_classes: int) -> list[float | None]:
    """Dice of classes 1, 2, ... over the voxels not ignored; None for a class that neither map holds."""
    valid = label != IGNORE_INDEX
    result: list[float | None] = []
    for number in range(1, num_classes):
        mine, true = (prediction == number) & valid, label == number
        total = int(mine.sum()) + int(true.sum())
        result.append(2 * int((mine & true).sum()) / total if total else None)
    return result


def predict_volume(net: SegmentationNet, image: NDArray[np.float32], patch_size: Sequence[int]) -> Tensor:
    """Logits float32 ``[C, x, y, z]`` of a normalised image ``[channels, x, y, z]``, by sliding window.

    Windows of the training patch's size overlap by half and their logits are averaged with Gaussian weights;
    a volume that one window covers is padded with 0, as in training.
    """

    def predict(window: Tensor) -> Tensor:
        return net.predict(window[..., 0])[..., None] if patch_size[2] == 1 else net.predict(window)

    with torch.inference_mode():
        return in_windows(predict, torch.from_numpy(image).to(next(net.parameters()).device), patch_size)


def in_windows(function: Callable[[Tensor], Tensor], volume: Tensor, patch_size: Sequence[int]) -> Tensor:
    """``function`` of ``volume[channels, x, y, z]``, over overlapping windows ``[N, channels, *patch_size]``."""
    whole = sliding_window_inference(
        volume[None], roi_size=tuple(patch_size), sw_batch_size=2, predictor=function, overlap=0.5, mode="gaussian"
    )
    assert isinstance(whole, Tensor)
    return whole[0]


def evaluate(
    net: SegmentationNet,
    cache: CaseCache,
    names: Sequence[str],
    patch_size: Sequence[int],
    progress: Progress,
    also: Callable[[str, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Score whole volumes; ``also(name, logits)`` sees every prediction.

    The Dice of a class is the mean over the cases where the prediction or the label holds it.
    """
    net.eval()
    scores = Scores()
    class_names = cache.dataset.class_names
    cases: dict[str, dict[str, float | None]] = {}
    for done, name in enumerate(names, 1):
        case = cache.get(name)
        logits = predict_volume(net, case.image, patch_size)
        label = torch.from_numpy(case.label).to(logits.device)
        scores.update(logits, label)
        dice = dice_per_class(logits.argmax(0), label, len(class_names))
        cases[name] = dict(zip(class_names[1:], dice, strict=True))
        if also is not None:
            also(name, logits)
        progress("evaluate", done, len(names), None)
    by_class = {name: _mean([case[name] for case in cases.values()]) for name in class_names[1:]}
    return {
        "dice": by_class,
        "dice_mean": _mean(list(by_class.values())),
        "voxels": {region: int(bins.num_voxels) if bins else 0 for region, bins in scores.bins.items()},
        **scores.compute(),
        "cases": cases,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


# ---------------------------------------------------------------------------------------------- training


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the iteration in progress can end; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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


def check_device(name: str) -> torch.device:
    """The device of that name, or a :class:`TrainingError`."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"device {name!r} cannot be used ({reason})") from error
    return device


def split_names(dataset: Dataset, config: TrainConfig) -> tuple[list[str], list[str]]:
    """The cases to train on and to validate on."""
    return split_cases([case.name for case in dataset.cases], config.val_fraction, config.split_seed)


def fingerprint(
    dataset: Dataset, config: TrainConfig, training: Sequence[str], validation: Sequence[str]
) -> dict[str, Any]:
    """What a resumed run must share with the run that it continues, in JSON's types."""
    content = {
        "config": asdict(config),
        "classes": dataset.class_names,
        "channels": dataset.channel_names,
        "split": {"training": training, "validation": validation},
    }
    return dict(json.loads(json.dumps(content)))


def check_same_config(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to resume the run in ``path`` with settings that are not its own."""
    changed = [
        f"{item.name} is {ours[item.name]!r} but was {theirs.get(item.name)!r}"
        for item in fields(TrainConfig)
        if ours[item.name] != theirs.get(item.name)
    ]
    if changed:
        raise TrainingError(f"{path}: cannot be resumed with other settings: {'; '.join(changed)}")


def _check_same(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    check_same_config(path, saved.get("config", {}), wanted["config"])
    for key in ("classes", "channels", "split"):
        if saved.get(key) != wanted[key]:
            raise TrainingError(f"{path}: cannot be resumed on other data: the {key} of DATA changed since")


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
    """Train the network to deploy on the cases of ``data`` and score the validation cases.

    Returns what ``metrics.json`` holds. ``soft_labels`` is the folder of soft labels for the method "calseg"
    (:func:`calseg.stages.train` makes them first). ``also`` is passed to :func:`evaluate`. Raises
    :class:`~calseg.data.DataError` or :class:`TrainingError` for what the user can mend,
    :class:`RunInterruptedError` after SIGINT or SIGTERM, the checkpoint written.
    """
    if (config.method == "calseg") != (soft_labels is not None):
        raise TrainingError(f"soft labels go with the method calseg, and only with it; got {config.method!r}")
    target = check_device(device)
    dataset = find_cases(data)
    training, validation = split_names(dataset, config)
    content = fingerprint(dataset, config, training, validation)
    run = Path(out)
    prepare_run(run, resume=resume, overwrite=overwrite)
    net = build_net(
        len(dataset.channel_names),
        len(dataset.class_names),
        spatial_dims=config.spatial_dims,
        dense_head=config.method == "vls",
        seed=config.seed,
    ).to(target)
    files = {} if soft_labels is None else {name: soft_labels_path(Path(soft_labels), name) for name in training}
    cache = CaseCache(dataset, soft_labels=files)

    def loss_of(patches: Patches, iteration: int) -> Tensor:
        return objective(net(patches.image), patches.label, config, iteration, patches.soft_labels)

    seconds = fit(
        net, loss_of, run, content, cache, config,
        data=data, resume=resume, checkpoint_every=checkpoint_every, progress=progress,
    )  # fmt: skip
    begun = time.perf_counter()
    scores = evaluate(net, cache, validation, config.patch_size, progress, also)
    metrics = {
        "dataset": dataset.name,
        "method": config.method,
        "iterations": config.iterations,
        "classes": list(dataset.class_names),
        **scores,
        "seconds": {"train": seconds, "evaluate": time.perf_counter() - begun},
        "config": content["config"],
    }
    write_json(run / "metrics.json", metrics)
    return metrics


class Patches(NamedTuple):
    """A batch on the device: ``image[N, channels, *S]``, ``label[N, *S]``, ``soft_labels[N, C, *S]``."""

    image: Tensor
    label: Tensor
    soft_labels: Tensor | None


def _patches(batch: Batch, device: torch.device) -> Patches:
    image, label, soft_labels = (None if part is None else torch.from_numpy(part).to(device) for part in batch)
    assert image is not None
    assert label is not None
    if label.shape[-1] == 1:  # patches of one slice are for networks of two dimensions
        return Patches(image[..., 0], label[..., 0], None if soft_labels is None else soft_labels[..., 0])
    return Patches(image, label, soft_labels)


def fit(
    net: nn.Module,
    loss_of: Callable[[Patches, int], Tensor],
    run: Path,
    content: dict[str, Any],
    cache: CaseCache,
    config: TrainConfig,
    *,
    data: str | Path,
    resume: bool,
    checkpoint_every: int,
    progress: Progress,
    stage: str = "train",
) -> float:
    """Train ``net`` in place, with checkpoints in ``run``; returns the seconds it took, those before a resumption too.

    ``content`` is the :func:`fingerprint`, ``loss_of(patches, iteration)`` the loss of a batch, ``stage`` the name
    for ``progress``.
    """
    checkpoint = run / "checkpoint.pt"
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    iteration, seconds = 0, 0.0
    if resume:
        saved = load_checkpoint(checkpoint)
        _check_same(checkpoint, saved, content)
        try:
            net.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            iteration, seconds = int(saved["iteration"]), float(saved["seconds"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(f"{checkpoint}: does not fit this version of calseg ({error})") from error
    write_json(run / "config.json", {"data": str(Path(data).resolve()), **content["config"]})
    write_json(run / "split.json", content["split"])

    names = tuple(content["split"]["training"])
    read_all(cache, (*names, *content["split"]["validation"]), progress)
    sampler = PatchSampler(
        names, config.patch_size, config.batch_size, config.seed, config.foreground, config.flip_axes
    )

    def save() -> None:
        buffer = io.BytesIO()  # serialised first, so that a full disk surfaces in write_atomic alone
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        counters = {"format": CHECKPOINT_FORMAT, "iteration": iteration, "seconds": seconds}
        torch.save({**content, **state, **counters}, buffer)
        write_atomic(checkpoint, buffer.getvalue())

    if not resume:
        save()
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
                save()
            if received:
                raise RunInterruptedError(
                    f"interrupted after iteration {iteration}, which is saved in {checkpoint}", received[0]
                )
    return seconds


def read_all(cache: CaseCache, names: Sequence[str], progress: Progress) -> None:
    """Read every case once, so that a bad file stops the run now and not after an hour."""
    for done, name in enumerate(names, 1):
        cache.get(name)
        progress("read", done, len(names), None)


def _step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Patches, int], Tensor],
    patches: Patches,
    config: TrainConfig,
    iteration: int,
) -> float:
    """One update in place; returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, iteration)
    loss = loss_of(patches, iteration)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at iteration {iteration + 1}; a smaller --learning-rate may help "
            "(the last checkpoint is kept)"
        )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0)
    optimizer.step()
    return value
