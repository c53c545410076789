"""Cases in memory, and the patches that are drawn from them for training."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calseg.files import InputFile, file_digest
from calseg.volumes.datasets import IGNORE_INDEX, Case, Dataset, LabelMap, Volume, case_inputs, load_case
from calseg.volumes.probabilities import read_soft_labels


def normalise(image: Volume) -> Volume:
    """Scale every channel ``image[c]`` to mean 0 and variance 1. A constant channel becomes 0."""
    result = np.zeros_like(image)
    for channel, out in zip(image, result, strict=True):
        low, high = float(channel.min()), float(channel.max())
        if low < high:
            # Scale to [0, 1] first, so that float64 sums of squares cannot overflow for any finite float32 input.
            scaled = (channel.astype(np.float64) - low) / (high - low)
            out[...] = (scaled - scaled.mean()) / scaled.std()
    return result


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory.

    Attributes:
        name: Name of the case.
        image: Normalised image, float32 ``[channels, x, y, z]``.
        label: Label map, int16 ``[x, y, z]``.
        foreground: Up to 4096 flat indices, spread evenly over the voxels with a label above 0. Patches are centred on
            them.
        labelled: The same for the voxels that are not ignored.
        soft_labels: Soft labels, float32 ``[classes, x, y, z]``, or None.
    """

    name: str
    image: Volume
    label: LabelMap
    foreground: NDArray[np.int64]
    labelled: NDArray[np.int64]
    soft_labels: Volume | None = None


def _spread(indices: NDArray[np.int64], count: int = 4096) -> NDArray[np.int64]:
    """Return up to ``count`` of the indices, spread evenly."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(np.int64)]


@dataclass
class CaseCache:
    """Cache of cases, which are read when they are first used.

    If the cases take more than ``max_bytes`` bytes, the least recently used one is dropped. ``soft_labels`` maps the
    names of cases to their files of soft labels.
    """

    dataset: Dataset
    max_bytes: int = 2 << 30
    soft_labels: Mapping[str, Path] = field(default_factory=dict)
    _kept: OrderedDict[str, LoadedCase] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _inputs: dict[str, list[InputFile]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cases = {case.name: case for case in self.dataset.cases}

    def case(self, name: str) -> Case:
        """The case of that name and its files."""
        return self._cases[name]

    def inputs(self, names: Sequence[str]) -> dict[str, list[InputFile]]:
        """The files of the cases ``names`` by their content, for a run to remember; each file is read once."""
        for name in names:
            if name not in self._inputs:
                self._inputs[name] = case_inputs(self._cases[name], self.dataset)
                if name in self.soft_labels:
                    path = self.soft_labels[name]
                    self._inputs[f"soft label of {name}"] = [InputFile(path, path.name, file_digest(path))]
        keys = (key for name in names for key in (name, f"soft label of {name}"))
        return {key: self._inputs[key] for key in keys if key in self._inputs}

    def get(self, name: str) -> LoadedCase:
        """Return a case, which is read, checked and normalised if it is not in the cache."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        case = self._cases[name]
        image, label = load_case(case, self.dataset)
        soft = None
        if name in self.soft_labels:
            soft = read_soft_labels(self.soft_labels[name], label, len(self.dataset.class_names), case.images[0])
        loaded = LoadedCase(
            name=name,
            image=normalise(image),
            label=label,
            foreground=_spread(np.flatnonzero(label > 0)),
            labelled=_spread(np.flatnonzero(label != IGNORE_INDEX)),
            soft_labels=soft,
        )
        self._kept[name] = loaded
        self._bytes += _bytes_of(loaded)
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= _bytes_of(gone)
        return loaded


def _bytes_of(case: LoadedCase) -> int:
    """Return the size of a case in memory."""
    return case.image.nbytes + case.label.nbytes + (0 if case.soft_labels is None else case.soft_labels.nbytes)


class Batch(NamedTuple):
    """Patches ``image[batch, channels, x, y, z]`` and ``label[batch, x, y, z]``.

    ``soft_labels[batch, classes, x, y, z]`` is None if the cases have no soft labels.
    """

    image: Volume
    label: LabelMap
    soft_labels: Volume | None


@dataclass(frozen=True)
class PatchSampler:
    """Sampler of training patches.

    The patches are a pure function of seed and iteration, so a resumed run gets the same ones. Every case is used once
    per epoch, and the order is shuffled in every epoch. A share ``foreground`` of the patches is centred on a voxel of
    a class above 0. A volume that is smaller than the patch lies at a random place in it. The rest of the patch is 0,
    the mean, in the image, and :data:`IGNORE_INDEX` in the label. Images get a random gain, offset and noise. Each of
    the axes ``flip_axes`` (0 to 2) is mirrored with probability 1/2.
    """

    names: tuple[str, ...]
    patch_size: tuple[int, int, int]
    batch_size: int
    seed: int
    foreground: float = 1 / 3
    flip_axes: tuple[int, ...] = ()

    def batch(self, cache: CaseCache, iteration: int) -> Batch:
        """Return the patches of an iteration."""
        patches = []
        for number in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
            epoch, position = divmod(number, len(self.names))
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.names))
            case = cache.get(self.names[order[position]])
            patches.append(self._patch(case, np.random.default_rng((self.seed, 1, number))))
        images, labels, soft = zip(*patches, strict=True)
        return Batch(np.stack(images), np.stack(labels), None if soft[0] is None else np.stack(soft))

    def _patch(self, case: LoadedCase, rng: np.random.Generator) -> tuple[Volume, LabelMap, Volume | None]:
        """Return a patch of a case: image, label and soft labels."""
        wants_foreground = rng.random() < self.foreground
        start = self._start(case, rng, case.foreground if wants_foreground and len(case.foreground) else None)
        label = _crop(case.label[None], start, self.patch_size, IGNORE_INDEX)[0]
        if not (label != IGNORE_INDEX).any():  # choose a patch that has labels
            start = self._start(case, rng, case.labelled)
            label = _crop(case.label[None], start, self.patch_size, IGNORE_INDEX)[0]
        image = _crop(case.image, start, self.patch_size, 0, lambda inside: _vary(inside, rng))
        axes = tuple(axis + 1 for axis in self.flip_axes if rng.random() < 0.5)
        soft = None
        if case.soft_labels is not None:
            soft = np.flip(_crop(case.soft_labels, start, self.patch_size, 0), axes)
        return np.flip(image, axes), np.flip(label[None], axes)[0], soft

    def _start(self, case: LoadedCase, rng: np.random.Generator, centres: NDArray[np.int64] | None) -> tuple[int, ...]:
        """Return the first voxel of the patch on each axis. It may be negative if the volume is smaller."""
        slack = [size - patch for size, patch in zip(case.label.shape, self.patch_size, strict=True)]
        start = [int(rng.integers(min(s, 0), max(s, 0) + 1)) for s in slack]
        if centres is not None:
            centre = np.unravel_index(int(rng.choice(centres)), case.label.shape)
            for axis, s in enumerate(slack):
                if s > 0:
                    start[axis] = min(max(int(centre[axis]) - self.patch_size[axis] // 2, 0), s)
        return tuple(start)


def _crop(
    volume: NDArray[Any], start: Sequence[int], size: Sequence[int], fill: float, change: Any = None
) -> NDArray[Any]:
    """Return ``volume[:, start : start + size]`` with ``fill`` outside. ``change`` is applied to the part inside."""
    inside, target = [slice(None)], [slice(None)]
    for first, length, extent in zip(start, size, volume.shape[1:], strict=True):
        low, high = max(first, 0), min(first + length, extent)
        inside.append(slice(low, high))
        target.append(slice(low - first, high - first))
    result = np.full((len(volume), *size), fill, dtype=volume.dtype)
    part = volume[tuple(inside)]
    result[tuple(target)] = part if change is None else change(part)
    return result


def _vary(image: Volume, rng: np.random.Generator) -> Volume:
    """Apply a random gain, offset and white noise. They are small compared with the unit variance of images."""
    shape = (len(image), 1, 1, 1)
    gain = rng.uniform(0.9, 1.1, shape).astype(np.float32)
    offset = rng.uniform(-0.1, 0.1, shape).astype(np.float32)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.1))
    varied: Volume = image * gain + offset + noise
    return varied
