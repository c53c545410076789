"""Peers in plain PyTorch: variational label smoothing with noise from torch.randn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def estimate(mu: Tensor, logvar: Tensor, num_samples: int) -> Tensor:
    """Return the mean softmax of independent samples, drawn one at a time, which needs the least memory and time."""
    sigma = (logvar / 2).exp()
    total = torch.zeros_like(mu)
    for _ in range(num_samples):
        total = total + torch.softmax(mu + sigma * torch.randn_like(mu), 1)
    return total / num_samples


def sample_soft_labels(mu: Tensor, logvar: Tensor, target: Tensor, num_samples: int, alpha: float) -> Tensor:
    """Sample soft labels, and blend them with one-hot labels."""
    onehot = torch.zeros_like(mu).scatter_(1, target.unsqueeze(1), 1.0)
    return torch.lerp(onehot, estimate(mu, logvar, num_samples), alpha)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL divergence from the standard normal, summed over classes, mean over voxels."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1).mean()


def vls_cross_entropy(
    logits: Tensor, mu: Tensor, logvar: Tensor, target: Tensor, num_samples: int, alpha: float
) -> Tensor:
    """Return F.cross_entropy with sampled class probabilities, plus the KL divergence."""
    soft_labels = sample_soft_labels(mu, logvar, target, num_samples, alpha)
    return F.cross_entropy(logits, soft_labels) + gaussian_kl(mu, logvar)


def vls_elbo(mu: Tensor, logvar: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """Return the mean of F.cross_entropy over noise samples, in float32 as under autocast, plus the KL divergence."""
    sigma = (logvar / 2).exp()
    likelihood = sum(F.cross_entropy((mu + sigma * torch.randn_like(mu)).float(), target) for _ in range(num_samples))
    return likelihood / num_samples + gaussian_kl(mu, logvar)


def dice_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return cross-entropy plus 1 plus nnU-Net's ``MemoryEfficientSoftDiceLoss`` of the foreground classes."""
    axes = tuple(range(2, logits.dim()))
    with torch.no_grad():
        onehot = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        onehot = onehot.scatter_(1, target.unsqueeze(1), 1)[:, 1:]
        sum_of_labels = onehot.sum(axes)
    p = torch.softmax(logits, 1)[:, 1:]
    intersection, sum_of_p = (p * onehot).sum(axes), p.sum(axes)
    dice = (2 * intersection + 1e-5) / torch.clip(sum_of_labels + sum_of_p + 1e-5, 1e-8)
    return F.cross_entropy(logits, target) + 1 - dice.mean()


def soft_dice_cross_entropy(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Return soft cross-entropy plus the Dice semimetric loss of the foreground classes."""
    axes = tuple(range(2, logits.dim()))
    p, y = torch.softmax(logits, 1)[:, 1:], soft_labels[:, 1:]
    mass, difference = (p + y).sum(axes), (p - y).abs().sum(axes)
    dice = (mass - difference + 1e-5) / (mass + 1e-5)
    return F.cross_entropy(logits, soft_labels) + 1 - dice.mean()
