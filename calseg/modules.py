"""``nn.Module`` forms of the losses of :mod:`calseg.functional`.

A module takes the keyword arguments of its function when it is made, and the tensors of a batch when it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from calseg import functional


class _Loss(nn.Module):
    """Base class of the losses. Class weights, if the function takes any, are a buffer."""

    function: ClassVar[Callable[..., Tensor]]
    of_a_batch: ClassVar[tuple[str, ...]]  # arguments of the function that ``forward`` takes

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        own = inspect.signature(self.function).parameters
        known = [name for name in own if name not in ("weight", *self.of_a_batch)]
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__}: unknown option {name!r}, wanted some of {', '.join(known)}")
        self.register_buffer("weight", weight, persistent=False)
        self.options = options

    def extra_repr(self) -> str:
        """Return the options that were given, for ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _VLSLoss(_Loss):
    """Base class of the losses on variational soft labels."""

    of_a_batch = ("input", "target", "mu", "logvar", "soft_labels")

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        soft_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch, by the function that the class names."""
        return self.function(input, target, self.weight, mu=mu, logvar=logvar, soft_labels=soft_labels, **self.options)


class VLSCrossEntropyLoss(_VLSLoss):
    """:func:`calseg.vls_cross_entropy` as a module, which can replace :class:`torch.nn.CrossEntropyLoss`.

    Args:
        weight: class weights ``[C]``, kept as a buffer. It moves with ``.to(device)`` and is not in the state
            dictionary.
        options: every other keyword argument of :func:`calseg.vls_cross_entropy` that is not a tensor of the batch.

    Raises:
        TypeError: the function does not have an option of that name.

    Example:
        >>> import torch, calseg
        >>> loss = calseg.VLSCrossEntropyLoss(alpha=0.2, temperature=2.0)
        >>> logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
        >>> mu, logvar = torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
        >>> loss(logits, target, mu=mu, logvar=logvar).shape
        torch.Size([])
    """

    function = staticmethod(functional.vls_cross_entropy)


class VLSDiceCrossEntropyLoss(_VLSLoss):
    """:func:`calseg.vls_dice_cross_entropy` as a module, which can replace nnU-Net's ``DC_and_CE_loss``.

    Args:
        weight: class weights of the cross-entropy ``[C]``, kept as a buffer.
        options: every other keyword argument of :func:`calseg.vls_dice_cross_entropy` that is not a tensor of the
            batch.

    Raises:
        TypeError: the function does not have an option of that name.

    Example:
        >>> import torch, calseg
        >>> loss = calseg.VLSDiceCrossEntropyLoss(batch_dice=True, alpha=0.2)
        >>> logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
        >>> loss(logits, target).shape
        torch.Size([])
    """

    function = staticmethod(functional.vls_dice_cross_entropy)


class SoftCrossEntropyLoss(_Loss):
    """:func:`calseg.soft_cross_entropy` as a module.

    Args:
        weight: class weights ``[C]``, kept as a buffer.
        options: ``label_smoothing``, ``reduction`` and ``backend`` of :func:`calseg.soft_cross_entropy`.

    Raises:
        TypeError: the function does not have an option of that name.

    Example:
        >>> import torch, calseg
        >>> loss = calseg.SoftCrossEntropyLoss()
        >>> loss(torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 0.5))
        tensor(0.6931)
    """

    function = staticmethod(functional.soft_cross_entropy)
    of_a_batch = ("input", "soft_target", "ignore_mask")

    def forward(self, input: Tensor, soft_target: Tensor, *, ignore_mask: Tensor | None = None) -> Tensor:
        """Return the loss of a batch; see :func:`calseg.soft_cross_entropy`."""
        return functional.soft_cross_entropy(input, soft_target, self.weight, ignore_mask=ignore_mask, **self.options)


class VLSElboLoss(_Loss):
    """:func:`calseg.vls_elbo` as a module.

    Args:
        weight: class weights ``[C]``, kept as a buffer.
        options: every other keyword argument of :func:`calseg.vls_elbo`.

    Raises:
        TypeError: the function does not have an option of that name.

    Example:
        >>> import torch, calseg
        >>> loss = calseg.VLSElboLoss(beta=0.01, num_samples=8)
        >>> mu, logvar = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
        >>> float(loss(mu, logvar, torch.zeros(1, 4, 4, dtype=torch.uint8))) > 0
        True
    """

    function = staticmethod(functional.vls_elbo)
    of_a_batch = ("mu", "logvar", "target")

    def forward(self, mu: Tensor, logvar: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch; see :func:`calseg.vls_elbo`."""
        return functional.vls_elbo(mu, logvar, target, self.weight, **self.options)


class GaussianKLLoss(_Loss):
    """:func:`calseg.gaussian_kl` as a module.

    Args:
        options: ``prior_mu``, ``prior_logvar``, ``reduction`` and ``backend`` of :func:`calseg.gaussian_kl`.

    Raises:
        TypeError: the function does not have an option of that name.

    Example:
        >>> import torch, calseg
        >>> calseg.GaussianKLLoss()(torch.ones(2, 3), torch.zeros(2, 3))
        tensor(1.5000)
    """

    function = staticmethod(functional.gaussian_kl)
    of_a_batch = ("mu", "logvar")

    def __init__(self, **options: Any) -> None:
        super().__init__(None, **options)

    def forward(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """Return the KL divergence of a batch; see :func:`calseg.gaussian_kl`."""
        return functional.gaussian_kl(mu, logvar, **self.options)


class ACELoss(_Loss):
    """:func:`calseg.ace_loss` as a module.

    Args:
        weight: factors of the errors of the classes ``[C]``, kept as a buffer.
        options: every other keyword argument of :func:`calseg.ace_loss`.

    Raises:
        TypeError: the function does not have an option of that name.

    Example:
        >>> import torch, calseg
        >>> loss = calseg.ACELoss(binning="soft", include_background=False)
        >>> loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))
        tensor(0.)
    """

    function = staticmethod(functional.ace_loss)
    of_a_batch = ("input", "target")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch; see :func:`calseg.ace_loss`."""
        return functional.ace_loss(input, target, self.weight, **self.options)
