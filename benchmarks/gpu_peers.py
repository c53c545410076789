"""Cross-entropy as Liger-Kernel and flash-attn have it on a GPU: over rows of classes, one a voxel.

Channel-first logits are permuted for them, and their gradient back (by autograd): both are part of their time.
"""

from __future__ import annotations

import functools

import torch
from harness import Loss, reason
from torch import Tensor


def _rows(logits: Tensor) -> Tensor:
    """A copy ``[voxels, C]``: both write the gradient over what they are given."""
    return logits.movedim(1, -1).clone(memory_format=torch.contiguous_format).view(-1, logits.shape[1])


def liger(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(_rows(logits), target.view(-1))


def flash(logits: Tensor, target: Tensor) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    losses, _ = cross_entropy_loss(_rows(logits), target.view(-1), inplace_backward=True)
    return losses.mean()


PEERS: dict[str, Loss] = {"liger": liger, "flash": flash}


@functools.cache
def problem(name: str) -> str | None:
    """Why there is no such peer, if there is none: not installed, built for another PyTorch, no such GPU."""
    try:
        PEERS[name](torch.zeros(1, 3, 8, requires_grad=True), torch.zeros(1, 8, dtype=torch.int64)).backward()
    except Exception as error:  # whatever they raise
        return reason(error)
    return None
