"""Regions over which calibration is measured, and the voxels near the foreground of a label map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from calseg import checks as check
from calseg.tensors import LABEL_DTYPES

NEAR_RADIUS = 3.0
MAX_DISTANCE = 1e9
REGIONS = {
    "near": f"within {NEAR_RADIUS:g} voxels of the foreground",
    "all": "all voxels",
    "foreground": "foreground (label not 0)",
}
"""The regions over which calibration is measured, with their titles in reports, which use the default radius.

The foreground is the region of many papers. The outcome that is predicted chooses it, so even the true probabilities
have a high error there. Whether a voxel is near the foreground hardly depends on its own label.
"""

Spacing = float | Sequence[float] | None


def check_region(region: Any, radius: Any, spacing: Any) -> None:
    """Check the options of a region. The number of spacings is checked when the axes are known."""
    if region not in REGIONS:
        raise ValueError(f"region: got {check.shown(region)}, wanted one of {', '.join(map(repr, REGIONS))}")
    check.check_number("radius", radius, 0.0, MAX_DISTANCE, f"from 0 to {MAX_DISTANCE:g}")
    if spacing is not None:
        if region != "near":
            raise ValueError(f"spacing: got {check.shown(spacing)} with region={region!r}, wanted it with 'near' only")
        for size in sizes_of(spacing):
            check.check_number("spacing", size, 0.0, MAX_DISTANCE, f"above 0, to {MAX_DISTANCE:g}", open_low=True)


def sizes_of(spacing: Any) -> list[Any]:
    """Return the numbers of a spacing, those of NumPy as Python's. What is no number is returned as it is."""
    sizes = [*spacing] if isinstance(spacing, Iterable) and not isinstance(spacing, str) else [spacing]
    return [float(size) if isinstance(size, Real) and not isinstance(size, bool) else size for size in sizes]


def near_foreground(
    target: Tensor, radius: float = NEAR_RADIUS, *, spacing: Spacing = None, ignore_index: int = -100
) -> Tensor:
    """Return where a voxel lies within a distance of a foreground voxel, one whose label is not 0.

    Both outcomes, foreground and background, occur near the foreground, and what is hard to predict lies there. The
    Euclidean distance between the centres of voxels is exact. A distance that equals the radius is within it. The time
    grows with the radius in voxels and with the box around the foreground.

    Args:
        target: labels ``[N, *S]`` or ``[N, 1, *S]`` of an integer dtype or bool. The items of the batch are separate.
        radius: largest distance, in voxels, or in the unit of ``spacing`` if that is given. Default 3.
        spacing: distance of neighbouring voxels, as one number for all spatial axes or as one per axis in the order of
            the axes. Default None: 1, so distances are in voxels.
        ignore_index: label of voxels that are not counted: they are neither foreground nor part of the result.
            Default -100.

    Returns:
        A bool tensor with the shape of ``target``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> import torch, calseg
        >>> target = torch.tensor([[0, 0, 0, 0, 2, 1, 0, 0]])
        >>> calseg.near_foreground(target, 2).int()
        tensor([[0, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
        >>> calseg.near_foreground(target == 2, 5, spacing=2.5).int()  # 5 mm around one class
        tensor([[0, 0, 1, 1, 1, 1, 1, 0]], dtype=torch.int32)
    """
    if not isinstance(target, Tensor) or target.dtype not in LABEL_DTYPES:
        raise TypeError(f"target: got {check.describe(target)}, wanted class indices")
    if target.dim() < 2:
        raise ValueError(f"target: got {check.describe(target)}, wanted shape [N, *S] with a spatial axis")
    check_region("near", radius, spacing)
    check.check_integer("ignore_index", ignore_index)
    steps = _spacing_of_axes(spacing, target)
    foreground, counted = target.bool(), None
    if _can_hold(target.dtype, ignore_index):
        counted = target != ignore_index
        foreground &= counted
    near = torch.zeros_like(foreground)
    for seeds, result in zip(foreground, near, strict=True):
        box = _box_around(seeds, [math.floor(min(radius / step * (1 + 1e-6), MAX_DISTANCE)) for step in steps])
        if box is not None:
            result[box] = _is_within(seeds[box], float(radius), steps)
    return near if counted is None else near & counted


def region_mask(region: str, labels: Tensor, radius: float, spacing: Spacing, ignore_index: int) -> Tensor | None:
    """Return where labels ``[N, *S]`` are in a region, or None for all voxels."""
    if region == "all":
        return None
    if region == "foreground":
        return labels.bool()
    if labels.dim() < 2:
        raise ValueError(f"region: got 'near' for labels of shape {list(labels.shape)}, wanted [N, *S]: spatial axes")
    return near_foreground(labels, radius, spacing=spacing, ignore_index=ignore_index)


def _can_hold(dtype: torch.dtype, value: int) -> bool:
    """Return whether a label can have this value. PyTorch would compare a label of 8 bits with 156 instead of -100."""
    if dtype == torch.bool or dtype.is_floating_point:
        return dtype.is_floating_point
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _spacing_of_axes(spacing: Spacing, target: Tensor) -> list[float]:
    """Return the spacing of every axis of ``target`` but the first. For ``[N, 1, *S]``, that of the channel is 1."""
    axes = target.dim() - 1
    if spacing is None:
        return [1.0] * axes
    steps = sizes_of(spacing)
    if not isinstance(spacing, Iterable):
        return steps * axes
    if len(steps) == axes - 1 and target.shape[1] == 1:
        steps.insert(0, 1.0)
    if len(steps) != axes:
        raise ValueError(f"spacing: got {check.shown(spacing)}, wanted one for each of {axes} spatial axes")
    return steps


def _box_around(seeds: Tensor, margins: Sequence[int]) -> tuple[slice, ...] | None:
    """Return the smallest box that holds all seeds ``[*S]``, widened by a margin per axis. None without a seed."""
    box = []
    for axis, margin in enumerate(margins):
        others = [other for other in range(seeds.dim()) if other != axis]
        filled = (seeds.any(others) if others else seeds).nonzero()
        if not len(filled):
            return None
        box.append(slice(max(int(filled[0]) - margin, 0), int(filled[-1]) + margin + 1))
    return tuple(box)


def _is_within(seeds: Tensor, radius: float, steps: Sequence[float]) -> Tensor:
    """Return where ``[*S]`` lies within ``radius`` of a seed.

    A pass along each axis replaces the squared distance of every voxel by the least sum of that of a voxel in the same
    line and the squared distance to that voxel. Squared distances are integers of 8 bits if they can be.
    """
    limit = radius * radius
    if all(step == 1 for step in steps):
        limit = float(math.floor(limit * (1 + 1e-12)))
        dtype = torch.uint8 if 2 * limit + 1 < 256 else torch.float32
    else:
        limit, dtype = limit * (1 + 1e-6), torch.float32
    beyond = math.ceil(limit) + 1  # for voxels that no seed has reached
    squares = torch.full_like(seeds, beyond, dtype=dtype).masked_fill_(seeds, 0)
    for axis, step in enumerate(steps):
        least, length = squares.clone(), seeds.shape[axis]
        for offset in range(1, length):
            square = (offset * step) ** 2
            if square > limit:
                break
            moved = squares + (int(square) if dtype == torch.uint8 else square)
            for to, source in ((offset, 0), (0, offset)):
                place = least.narrow(axis, to, length - offset)
                torch.minimum(place, moved.narrow(axis, source, length - offset), out=place)
        squares = least
    return squares <= limit
