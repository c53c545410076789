"""The networks that ``calseg train`` trains. Needs the extra ``calseg[train]`` (MONAI)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from monai.networks.nets.unet import UNet
from torch import Tensor, nn


class Output(NamedTuple):
    """``logits``, and from a dense head ``mu`` and ``logvar``, all float ``[N, C, x, y, z]``."""

    logits: Tensor
    mu: Tensor | None
    logvar: Tensor | None


class SegmentationNet(nn.Module):
    """MONAI's 3-D U-Net with 1x1x1 heads on its last features.

    The trunk has ``features[0]`` channels at full resolution and halves the resolution once for every
    further entry but the last, so patch sides must be multiples of :attr:`stride`. With ``dense_head`` two
    more heads give a Gaussian over the logits of every voxel, which variational label smoothing samples; they
    are used in training only. The prediction is ``softmax(logits)`` either way, and both kinds of network
    start from the same trunk and logits for one random state.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        features: tuple[int, ...] = (8, 16, 32, 64, 64),
        dense_head: bool = False,
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(features) - 2)
        self.trunk = UNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=features[0],
            channels=features,
            strides=(1,) + (2,) * (len(features) - 2),
        )
        self.activation = nn.Sequential(nn.InstanceNorm3d(features[0], affine=True), nn.LeakyReLU(0.1))
        self.logits = nn.Conv3d(features[0], num_classes, 1)
        self.mu = nn.Conv3d(features[0], num_classes, 1) if dense_head else None
        self.logvar = nn.Conv3d(features[0], num_classes, 1) if dense_head else None
        if self.mu is not None:
            # Heads that start equal ask the same of the trunk; unequal ones delay each other.
            self.mu.load_state_dict(self.logits.state_dict())
        if self.logvar is not None and self.logvar.bias is not None:
            # sigma = exp(logvar / 2) = 0.5 everywhere at first: noise that neither drowns mu nor vanishes.
            nn.init.zeros_(self.logvar.weight)
            nn.init.constant_(self.logvar.bias, -1.386)

    def forward(self, image: Tensor) -> Output:
        """``image`` float ``[N, in_channels, x, y, z]``."""
        features = self.activation(self.trunk(image))
        return Output(
            self.logits(features),
            None if self.mu is None else self.mu(features),
            None if self.logvar is None else self.logvar(features),
        )

    def predict(self, image: Tensor) -> Tensor:
        """The deployed prediction's logits ``[N, C, x, y, z]``; the dense head is not run."""
        logits: Tensor = self.logits(self.activation(self.trunk(image)))
        return logits


def build_net(in_channels: int, num_classes: int, *, loss: str, seed: int) -> SegmentationNet:
    """The network for ``loss`` with weights drawn from ``seed``; PyTorch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SegmentationNet(in_channels, num_classes, dense_head=loss == "vls")
    # Convolutions with few channels run faster on a CPU with the channels innermost.
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]
