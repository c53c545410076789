"""The specs: one structure for each operation, which travels from the public function to the kernels.

A spec holds the options of a call and the tensors that get no gradient. The tensors that can get one are in a second
structure, and their gradients in a third of the same type. Every backend takes these structures as they are. A field is
named in this file only: the build makes the structures of the C++ engine from it (csrc/python/specs.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Scores = Tensor  # a number for every voxel and class: [C], [N, C] or [N, C, *S]
Indices = Tensor  # an integer for every voxel: [], [N] or [N, *S]
Classes = Tensor  # a number for every class: [C]
Seed = int | Tensor  # a 64-bit number, or a 0-d int64 tensor on the device of the scores
Factor = float | Tensor  # a number, or a 0-d tensor on the device of the scores
Reduction = str  # "none", "mean" or "sum"


class Labels(NamedTuple):
    """Class indices, or a mask of the voxels that are ignored.

    A voxel is ignored where ``tensor`` equals ``ignore_index``. With ``is_mask`` the other values are no classes.
    ``has_channel`` says that the caller gave the tensor with a channel axis, which messages about a place count.
    """

    tensor: Indices
    ignore_index: int
    is_mask: bool = False
    has_channel: bool = False

    def ignored(self) -> Tensor:
        """Return a mask of the voxels that are ignored. Labels are compared as numbers: one of 8 bits is never -100."""
        wide = self.tensor.long()
        same = wide == self.ignore_index
        return same & (self.tensor == wide) if self.tensor.is_floating_point() else same


class Sampling(NamedTuple):
    """Options of the sampling from the Gaussian over the logits, and of its KL term."""

    num_samples: int = 1
    temperature: float = 1.0
    beta: float = 0.0
    prior_mu: float = 0.0
    prior_logvar: float = 0.0
    seed: Seed = 0


class LossTensors(NamedTuple):
    """The tensors of a loss that can get a gradient, or their gradients. None where there is none."""

    logits: Scores | None = None
    soft_labels: Scores | None = None
    mu: Scores | None = None
    logvar: Scores | None = None

    def like(self) -> Tensor:
        """Return the tensor that gives a call its shape, dtype and device: the logits, or mu if there are none."""
        like = self.mu if self.logits is None else self.logits
        assert like is not None
        return like

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, of a loss that has them."""
        assert self.mu is not None
        assert self.logvar is not None
        return self.mu, self.logvar


class LossSpec(NamedTuple):
    """Options of a loss. ``operation`` is the name of the loss:

    - ``cross_entropy``: cross-entropy of the logits, with ``labels`` or with soft labels if they are among the tensors
    - ``vls_cross_entropy``: cross-entropy of the logits, with labels sampled from mu and logvar, plus the KL term
    - ``vls_elbo``: mean cross-entropy of the samples of mu and logvar, with ``labels``, plus the KL term
    - ``gaussian_kl``: the KL term alone

    ``scale`` multiplies the loss and so its gradients.
    """

    operation: str
    labels: Labels | None
    weight: Classes | None
    reduction: Reduction
    dtype: torch.dtype
    label_smoothing: float = 0.0
    alpha: float = 0.0
    sampling: Sampling = Sampling()
    scale: Factor = 1.0


class GaussianTensors(NamedTuple):
    """The Gaussian over the logits of every voxel, or the gradients of both. None where there is none."""

    mu: Scores | None = None
    logvar: Scores | None = None

    def both(self) -> tuple[Tensor, Tensor]:
        """Return mu and logvar, of a structure that has both."""
        assert self.mu is not None
        assert self.logvar is not None
        return self.mu, self.logvar


class SampleSpec(NamedTuple):
    """Options of soft labels sampled from a Gaussian. With ``labels``, ``alpha`` is the share of the samples."""

    labels: Labels | None
    alpha: float
    sampling: Sampling


class AccumulateSpec(NamedTuple):
    """Options of adding the softmax of a map of logits to a running total. Ignored voxels get no gradient."""

    labels: Labels | None
    temperature: float


class BlendSpec(NamedTuple):
    """Options of the blend ``(1 - alpha) * onehot(labels) + alpha * total / num_maps``."""

    labels: Labels | None
    alpha: float
    num_maps: int


UNIT = 2**24  # 1 in the fixed-point sums per bin


class BinsSpec(NamedTuple):
    """Options of sums per bin of confidence.

    ``mask`` is uint8, and 0 where a voxel does not count. With ``class_wise``, the classes from ``first_class`` on have
    bins of their own. ``tolerance`` is how far the sum of the probabilities of a voxel may be from 1.
    """

    labels: Labels
    mask: Indices | None
    n_bins: int
    first_class: int
    from_logits: bool
    class_wise: bool
    skip_background: bool
    per_item: bool
    right_closed: bool
    tolerance: float


class AceSpec(NamedTuple):
    """Options of the moments of the average calibration error. With ``soft``, neighbouring bins share a voxel."""

    labels: Labels
    n_bins: int
    first_class: int
    soft: bool


def num_kinds(spec: BinsSpec, num_classes: int) -> int:
    """Return how many confidences of a voxel have bins: 1 for the top label, or the classes from ``first_class`` on."""
    return num_classes - spec.first_class if spec.class_wise else 1
