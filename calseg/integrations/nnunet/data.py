"""Soft labels on their way through nnU-Net's patches and augmentation, as further channels of the label.

1. :class:`SoftLabelDataset` puts the soft labels of a case behind its label, ``[1 + C, *S]``. nnU-Net's loader cuts the
   same patch out of both.
2. :class:`SplitSoftLabels`, the first transform, makes them a ``regression_target``, which nnU-Net's transforms move
   and interpolate as they do with an image, and leave alone where only intensities change.
3. :class:`BlendSoftLabels`, the last one, blends them with the label, and hands both on for every level of deep
   supervision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from numpy.typing import NDArray
from torch import Tensor

from calseg.integrations.nnunet.store import STEPS, file_of, opened


class SoftLabelDataset:
    """nnU-Net's data set of preprocessed cases, with soft labels behind every label.

    Args:
        base: nnU-Net's data set.
        folder: folder of the soft labels.
    """

    def __init__(self, base: Any, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.identifiers: list[str] = base.identifiers

    def load_case(self, identifier: str) -> tuple[Any, LabelAndSoft, Any, Any]:
        """Return image, label with soft labels, label of the stage before (or None), and properties of a case."""
        image, label, before, properties = self.base.load_case(identifier)
        return image, LabelAndSoft(label, opened(self.folder / file_of(identifier))), before, properties


class LabelAndSoft:
    """A label and soft labels on disk as one array int16 ``[1 + C, *S]``, of which a part is read when it is sliced."""

    dtype = np.dtype(np.int16)

    def __init__(self, label: Any, soft: Any) -> None:
        self.label, self.soft = label, soft
        self.shape = (label.shape[0] + soft.shape[0], *label.shape[1:])

    def __getitem__(self, part: tuple[slice, ...]) -> NDArray[np.int16]:
        return np.concatenate([np.asarray(array[part], np.int16) for array in (self.label, self.soft)])


class SplitSoftLabels(BasicTransform):
    """Make the soft labels, channels 1 to C of the segmentation, a ``regression_target`` in [0, 1], float32.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def apply(self, data_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Split the entry ``segmentation``. Outside of the image, soft labels are 0 in every class."""
        joined = data_dict["segmentation"]
        label, soft, before = joined.split([1, self.classes, len(joined) - 1 - self.classes])
        data_dict["segmentation"] = torch.cat([label, before])  # before: the label of the stage before, in a cascade
        data_dict["regression_target"] = soft.clamp(min=0).float() / STEPS
        return data_dict


class BlendSoftLabels(BasicTransform):
    """Append soft labels ``(1 - alpha) onehot(label) + alpha estimate`` to the labels, for every level.

    What the estimate lacks to a sum of 1, as outside of the image, goes to the class of the label. Where the label is
    no class, soft labels are 0. A level with a lower resolution gets their mean over each of its voxels, without those
    that are 0. ``benchmarks/nnunet_pairs.py`` compares this with nearest voxels.

    The entry ``segmentation`` becomes a list: the labels of all levels, int16 ``[1, *S]``, then the soft labels of all
    levels, uint16 ``[C, *S]`` in steps of 1 / 65535.

    Args:
        alpha: share of the estimate.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def apply(self, data_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Replace the entries ``segmentation`` and ``regression_target``."""
        labels, estimate = data_dict["segmentation"], data_dict.pop("regression_target")
        labels = labels if isinstance(labels, list) else [labels]
        soft = self.blended(labels[0], estimate)
        levels = (soft if soft.shape[1:] == label.shape[1:] else _means(soft, label.shape[1:]) for label in labels)
        data_dict["segmentation"] = [*labels, *map(_in_16_bits, levels)]
        return data_dict

    def blended(self, label: Tensor, estimate: Tensor) -> Tensor:
        """Return the soft labels ``[C, *S]``."""
        onehot = label == torch.arange(len(estimate)).view(-1, *(1,) * (label.dim() - 1))
        rest = (1 - estimate.sum(0)).clamp(min=0)
        soft = self.alpha * estimate + (1 - self.alpha + self.alpha * rest) * onehot
        return soft * onehot.any(0)


def _means(soft: Tensor, size: torch.Size) -> Tensor:
    """Return the mean of the soft labels over each voxel of a grid of lower resolution, without voxels that are 0."""
    means = F.interpolate(soft[None], size, mode="area")[0]
    return means / means.sum(0).clamp(min=torch.finfo(means.dtype).tiny)


def _in_16_bits(soft: Tensor) -> Tensor:
    return (soft * 65535).round().to(torch.uint16)
