"""CALSeg's first stage around a U-Net that nnU-Net planned: its network, and its loss.

============ ============== ==========================================================================================
paper        attribute      network
============ ============== ==========================================================================================
f_theta      unet           nnU-Net's network without its heads: feature maps of the image
f_omega      encoder, code  convolutions on (image, one-hot label), pooled: ``mu, logvar`` of the latent code
f_phi        heads          convolutions on (feature map, code at every voxel): logits, for every level
f_psi        reconstruct    convolutions on the same, at full resolution: the image
============ ============== ==========================================================================================

Source: Guo et al., *CALSeg*, ICASSP 2024, doi 10.1109/ICASSP48485.2024.10446030.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from calseg.autograd import draw_seed
from calseg.backends.rng import standard_normal
from calseg.functional import accumulate_soft_labels, gaussian_kl
from calseg.integrations.nnunet.dense_head import heads_of
from calseg.integrations.nnunet.loss import DiceCrossEntropy

ENCODER_FEATURES = (8, 16, 32, 64)
"""Channels of the encoder of image and label, which halves the resolution in every step."""


class StageOneNetwork(nn.Module):
    """The networks of the first stage, of which nnU-Net sees one with the channels (image, one-hot label) as input.

    In training, one code is drawn. The output of the highest resolution then has two channels behind the logits: the
    squared error of the reconstructed image, and the KL divergence of the code. In evaluation, the output is the
    logarithm of the estimate: of the mean softmax over ``num_samples`` codes from the posterior.

    Args:
        unet: a network of nnU-Net's with the heads of its U-Nets.
        channels: number of channels of the image.
        latent_size: number of values in the code.
        num_samples: number of codes for an estimate.

    Raises:
        NotImplementedError: ``unet`` has no such heads.
    """

    def __init__(self, unet: Any, channels: int, *, latent_size: int, num_samples: int) -> None:
        super().__init__()
        heads = heads_of(unet)[::-1]  # the highest resolution first, as in the output
        conv = type(heads[0])
        self.channels, self.classes, self.num_samples = channels, heads[0].out_channels, num_samples
        unet.decoder.seg_layers = nn.ModuleList(nn.Identity() for _ in heads)
        self.unet = unet
        sizes = (channels + self.classes, *ENCODER_FEATURES)
        # One group for all channels: a norm per channel would remove the mean, which the pooling needs.
        blocks = (nn.Sequential(conv(a, b, 3, 2, 1), nn.GroupNorm(1, b), nn.LeakyReLU(0.1)) for a, b in pairwise(sizes))
        self.encoder = nn.Sequential(*blocks)
        self.code = nn.Linear(sizes[-1], 2 * latent_size)
        self.heads = nn.ModuleList(_decoder(conv, head.in_channels, latent_size, self.classes) for head in heads)
        self.reconstruct = _decoder(conv, heads[0].in_channels, latent_size, channels)

    @property
    def decoder(self) -> nn.Module:
        """The decoder, whose deep supervision nnU-Net switches."""
        decoder: nn.Module = self.unet.decoder
        return decoder

    def forward(self, image_and_label: Tensor) -> Tensor | list[Tensor]:
        """Return the output of every level, or that of the highest resolution without deep supervision.

        Args:
            image_and_label: float ``[B, channels + C, *S]``; a voxel without a label has zeros for all classes.
        """
        if image_and_label.shape[1] != self.channels + self.classes:
            raise ValueError(
                f"the first stage of CALSeg estimates from image and label, {self.channels + self.classes} channels;"
                f" got {image_and_label.shape[1]}; it is not for prediction"
            )
        image = image_and_label[:, : self.channels]
        mu, logvar = self.code(self.encoder(image_and_label).flatten(2).mean(2)).float().chunk(2, 1)
        features = self.unet(image)
        levels = list(features) if isinstance(features, (list, tuple)) else [features]
        if self.training:
            code = mu + (logvar / 2).exp() * _noise(draw_seed(mu.device), mu, 0)
            outputs = [head(_joined(level, code)) for head, level in zip(self.heads, levels, strict=False)]
            outputs[0] = self._with_terms(outputs[0], levels[0], image, code, gaussian_kl(mu, logvar, reduction="none"))
        else:
            outputs = [self._estimate(head, level, mu, logvar) for head, level in zip(self.heads, levels, strict=False)]
        return outputs if isinstance(features, (list, tuple)) else outputs[0]

    def _with_terms(self, logits: Tensor, features: Tensor, image: Tensor, code: Tensor, kl: Tensor) -> Tensor:
        """Append the squared error of the reconstruction and the KL divergence to the logits, in float32."""
        error = (self.reconstruct(_joined(features, code)).float() - image).square().mean(1, keepdim=True)
        spread = kl.view(-1, 1, *(1,) * (image.dim() - 2)).expand_as(error)
        return torch.cat([logits.float(), error, spread], 1)

    def _estimate(self, head: nn.Module, features: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """Return the logarithm of the mean softmax over codes, with the noise of the losses, in antithetic pairs."""
        sigma, seed = (logvar / 2).exp(), draw_seed(mu.device)

        def maps() -> Iterator[Tensor]:
            for k in range(self.num_samples):
                yield head(_joined(features, mu + sigma * _noise(seed, mu, k)))

        return accumulate_soft_labels(maps()).clamp(min=1e-7).log()


def _decoder(conv: Any, width: int, latent_size: int, out_channels: int) -> nn.Module:
    """Return a decoder of features and code. It has no norm, which would remove the code."""
    return nn.Sequential(conv(width + latent_size, width, 3, 1, 1), nn.LeakyReLU(0.1), conv(width, out_channels, 1))


def _noise(seed: Tensor, mu: Tensor, sample: int) -> Tensor:
    """Return the noise of one sample of the codes, in the shape ``[B, L]`` of ``mu``."""
    return standard_normal(seed, len(mu), mu.shape[1], sample, device=seed.device).T.to(mu)


def _joined(features: Tensor, code: Tensor) -> Tensor:
    """Concatenate the code to the features of every voxel."""
    spread = code.to(features.dtype).view(*code.shape, *(1,) * (features.dim() - 2))
    return torch.cat([features, spread.expand(-1, -1, *features.shape[2:])], 1)


def with_label(image: Tensor, label: Tensor, classes: int) -> Tensor:
    """Return the input of :class:`StageOneNetwork` from an image ``[B, c, *S]`` and its label ``[B, 1, *S]``."""
    numbers = torch.arange(classes, device=label.device).view(-1, *(1,) * (label.dim() - 2))
    return torch.cat([image, (label == numbers).to(image)], 1)


class StageOneLoss(DiceCrossEntropy):
    """The loss of the first stage: Dice plus cross-entropy, the error of the image, and the KL divergence of the code.

    Args:
        loss: the loss that nnU-Net built.
        classes: number of classes.
        reconstruction: factor of the squared error.
        beta: factor of the KL divergence.
    """

    def __init__(self, loss: Any, *, classes: int, reconstruction: float, beta: float) -> None:
        super().__init__(loss)
        self.classes, self.reconstruction, self.beta = classes, reconstruction, beta

    def of_level(self, logits: Tensor, label: Tensor, soft_labels: Tensor | None, *, weight: float) -> Tensor:
        """Return ``weight`` times the loss of one level, and at the highest resolution the other two terms."""
        if logits.shape[1] == self.classes:
            return super().of_level(logits, label, soft_labels, weight=weight)
        logits, error, kl = logits.split([self.classes, 1, 1], 1)
        counts = label != self.ignore_index
        squares = (error * counts).sum() / counts.sum().clamp(min=1)
        terms: Tensor = self.reconstruction * squares + self.beta * kl.mean()
        return self.fused(logits, label, scale=weight) + terms
