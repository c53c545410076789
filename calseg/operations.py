"""The specs: one structure for each operation, which travels from the public function to the kernels.

A spec holds the options of a call and the tensors that get no gradient. The tensors that do come beside it, in a
structure of their own. Their gradients have another one of the same kind. Every backend takes both as they are. A field
is named here and nowhere else: the build makes the structures of the C++ engine from this file (csrc/python/specs.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Scores = Tensor  # a number for every voxel and class: [C], [N, C] or [N, C, *S]
Indices = Tensor  # an integer for every voxel: [], [N] or [N, *S]
Classes = Tensor  # a number for every class: [C]
Seed = int | Tensor  # a 64-bit number, or a 0-d int64 tensor on the device of the scores
Reduction = str  # "none", "mean" or "sum"


class Labels(NamedTuple):
    """Class indices, or a mask that only says which voxels are ignored.

    A voxel is ignored where ``tensor`` equals ``ignore_index``. With ``is_mask`` the other values are no classes.
    """

    tensor: Indices
    ignore_index: int
    is_mask: bool = False

    def ignored(self) -> Tensor:
        """Where a voxel is ignored. Compared as numbers: a label of 8 bits is never -100."""
        return self.tensor.long() == self.ignore_index


class Sampling(NamedTuple):
    """How the Gaussian over the logits is sampled, and its KL term."""

    num_samples: int = 1
    temperature: float = 1.0
    beta: float = 0.0
    prior_mu: float = 0.0
    prior_logvar: float = 0.0
    seed: Seed = 0


class LossTensors(NamedTuple):
    """The tensors of a loss that can get a gradient, or these gradients; None where there is none."""

    logits: Scores | None = None
    soft_labels: Scores | None = None
    mu: Scores | None = None
    logvar: Scores | None = None

    def like(self) -> Tensor:
        """The tensor that gives a call its shape, dtype and device: the logits, else mu."""
        like = self.mu if self.logits is None else self.logits
        assert like is not None
        return like

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """mu and logvar, of a loss that has them."""
        assert self.mu is not None
        assert self.logvar is not None
        return self.mu, self.logvar


class LossSpec(NamedTuple):
    """A loss, by the name of its operation.

    - ``cross_entropy``: of the logits on ``labels``, or on soft labels where they are among the tensors
    - ``vls_cross_entropy``: of the logits on labels sampled from mu and logvar, plus the KL term
    - ``vls_elbo``: the expected cross-entropy of the samples of mu and logvar, plus the KL term
    - ``gaussian_kl``: the KL term alone
    """

    operation: str
    labels: Labels | None
    weight: Classes | None
    reduction: Reduction
    dtype: torch.dtype
    label_smoothing: float = 0.0
    alpha: float = 0.0
    sampling: Sampling = Sampling()


class GaussianTensors(NamedTuple):
    """The Gaussian over the logits of every voxel, or the gradients of both; None where there is none."""

    mu: Scores | None = None
    logvar: Scores | None = None

    def both(self) -> tuple[Tensor, Tensor]:
        """mu and logvar, where both are there."""
        assert self.mu is not None
        assert self.logvar is not None
        return self.mu, self.logvar


class SampleSpec(NamedTuple):
    """Soft labels sampled from a Gaussian; ``alpha`` is their share where there are ``labels``."""

    labels: Labels | None
    alpha: float
    sampling: Sampling


class AccumulateSpec(NamedTuple):
    """The softmax of one map of logits, added to a running total; ignored voxels get no gradient."""

    labels: Labels | None
    temperature: float


class BlendSpec(NamedTuple):
    """Soft labels from the total of ``num_maps`` maps: ``(1 - alpha) * onehot(labels) + alpha * total / num_maps``."""

    labels: Labels | None
    alpha: float
    num_maps: int


UNIT = 2**24  # 1 in the fixed-point sums per bin


class BinsSpec(NamedTuple):
    """Sums per bin of confidence.

    ``mask`` is uint8 and 0 where a voxel counts nowhere. ``first_class`` is the first class with bins of its own
    (class-wise). ``tolerance`` is by how much the probabilities of a voxel may miss 1 in sum.
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
    """The moments of the average calibration error, by cells of confidence; ``soft`` bins share a voxel."""

    labels: Labels
    n_bins: int
    first_class: int
    soft: bool


def num_kinds(spec: BinsSpec, num_classes: int) -> int:
    """The number of confidences of a voxel that have bins: 1 for the top label, else the classes from the first on."""
    return num_classes - spec.first_class if spec.class_wise else 1
