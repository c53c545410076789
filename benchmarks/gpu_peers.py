"""Peers on a GPU: the cross-entropy of Liger-Kernel and of flash-attn, which take one row of classes per voxel.

The channel-first logits are permuted for them, and autograd permutes the gradient back. Both are part of their time.
"""

from __future__ import annotations

import functools

import torch
from harness import Loss, reason
from torch import Tensor


def _rows(logits: Tensor) -> Tensor:
    """Return a copy ``[voxels, C]`` of the logits, because both peers write the gradient over their input."""
    return logits.movedim(1, -1).clone(memory_format=torch.contiguous_format).view(-1, logits.shape[1])


def liger(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of Liger-Kernel."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(_rows(logits), target.view(-1))


def flash(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of flash-attn."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    losses, _ = cross_entropy_loss(_rows(logits), target.view(-1), inplace_backward=True)
    return losses.mean()


PEERS: dict[str, Loss] = {"liger": liger, "flash": flash}


@functools.cache
def problem(name: str) -> str | None:
    """Return the reason why a peer cannot run, such as not being installed, or None."""
    try:
        PEERS[name](torch.zeros(1, 3, 8, requires_grad=True), torch.zeros(1, 8, dtype=torch.int64)).backward()
    except Exception as error:  # the peers raise many kinds of exceptions
        return reason(error)
    return None
