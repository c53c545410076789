"""The networks that ``calseg train`` trains, in 2-D and 3-D.

:class:`SegmentationNet` is the network that is deployed, ``f_cal`` in the paper. :class:`StageOneNet` holds the four
networks of the first stage of CALSeg, which estimate soft labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from calseg.backends.rng import draw_seed
from calseg.functional import accumulate_soft_labels
from calseg.methods import METHODS, Output
from calseg.training.config import TrainConfig

FEATURES = (8, 16, 32, 64, 64)
"""Number of channels at each level. The resolution is halved between levels, but not before the last one."""

Net = TypeVar("Net", bound=nn.Module)


class StageOneOutput(NamedTuple):
    """Output of :class:`StageOneNet`: ``logits[N, C, *S]``, reconstructed image, ``mu`` and ``logvar`` ``[N, L]``."""

    logits: Tensor
    image: Tensor
    mu: Tensor
    logvar: Tensor


class Trunk(nn.Sequential):
    """MONAI's U-Net and a norm, which give features ``[N, features[0], *S]``. Sides must be multiples of ``stride``."""

    def __init__(self, spatial_dims: int, in_channels: int, features: tuple[int, ...]) -> None:
        norm = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[spatial_dims]
        super().__init__(
            UNet(
                spatial_dims=spatial_dims,
                in_channels=in_channels,
                out_channels=features[0],
                channels=features,
                strides=(1,) + (2,) * (len(features) - 2),
            ),
            norm(features[0], affine=True),
            nn.LeakyReLU(0.1),
        )
        self.stride = 2 ** (len(features) - 2)


def _pointwise(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Return a convolution with a kernel of size 1."""
    conv: nn.Module = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims](in_channels, out_channels, 1)
    return conv


class SegmentationNet(nn.Module):
    """MONAI's U-Net, followed by heads that are convolutions with a kernel of size 1.

    With ``dense_head``, two more heads give a Gaussian over the logits of every voxel, from which variational label
    smoothing draws samples. They are used in training only. The prediction is ``softmax(logits)`` in both cases. For
    the same random state, networks with and without these heads start with the same trunk and the same head for the
    logits.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        spatial_dims: int = 3,
        features: tuple[int, ...] = FEATURES,
        dense_head: bool = False,
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.trunk = Trunk(spatial_dims, in_channels, features)
        self.logits = _pointwise(spatial_dims, features[0], num_classes)
        self.mu = _pointwise(spatial_dims, features[0], num_classes) if dense_head else None
        self.logvar = _pointwise(spatial_dims, features[0], num_classes) if dense_head else None
        if self.mu is not None:
            # Start the heads of logits and mu equal. Different ones pull the trunk in different directions at first,
            # which delays training.
            self.mu.load_state_dict(self.logits.state_dict())
        if isinstance(self.logvar, (nn.Conv2d, nn.Conv3d)) and self.logvar.bias is not None:
            # Start with sigma = exp(logvar / 2) = 0.5 everywhere, so that the noise is neither too large nor too small
            # compared with mu.
            nn.init.zeros_(self.logvar.weight)
            nn.init.constant_(self.logvar.bias, -1.386)

    def forward(self, image: Tensor) -> Output:
        """Return the output for ``image``, float ``[N, in_channels, *S]``."""
        features = self.trunk(image)
        return Output(
            self.logits(features),
            None if self.mu is None else self.mu(features),
            None if self.logvar is None else self.logvar(features),
        )

    def predict(self, image: Tensor) -> Tensor:
        """Return the logits ``[N, C, *S]`` alone, without running the dense head."""
        logits: Tensor = self.logits(self.trunk(image))
        return logits


class StageOneNet(nn.Module):
    """Networks of the first stage of CALSeg.

    An encoder gives the posterior of a latent code for an image and its label. Two decoders of the image and the code
    give logits and the image.

    ======== =========== ==============================================================================
    paper    attribute   network
    ======== =========== ==============================================================================
    f_theta  trunk       U-Net on the image: a feature map
    f_omega  encoder     convolutions on (image, one-hot label), pooled: ``mu, logvar`` of the code
    f_phi    segment     convolutions on (feature map, code at every voxel): segmentation logits
    f_psi    reconstruct convolutions on the same: the image
    ======== =========== ==============================================================================

    Args:
        in_channels: number of channels of the image.
        num_classes: number of classes ``C``.
        spatial_dims: 2 or 3.
        features: channels per resolution of the U-Net and, halved, of the encoder.
        latent_size: number of values ``L`` in the code.

    Example:
        >>> import torch
        >>> from calseg.training.nets import StageOneNet
        >>> net = StageOneNet(1, 3, spatial_dims=2)
        >>> image, label = torch.randn(1, 1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.uint8)
        >>> soft = net.estimate_soft_labels(image, label, num_samples=8, temperature=2.0, alpha=0.3)
        >>> soft.shape, bool(((soft.sum(1) - 1).abs() < 1e-5).all())
        (torch.Size([1, 3, 32, 32]), True)

    Source: Guo et al., *CALSeg*, ICASSP 2024, doi 10.1109/ICASSP48485.2024.10446030.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        spatial_dims: int = 3,
        features: tuple[int, ...] = FEATURES,
        latent_size: int = 4,
    ) -> None:
        super().__init__()
        self.spatial_dims, self.num_classes, self.latent_size = spatial_dims, num_classes, latent_size
        self.trunk = Trunk(spatial_dims, in_channels, features)
        sizes = (in_channels + num_classes, *features[:-1])
        # Use one group for all channels. A norm per channel would remove the mean, which the pooling needs.
        norm = ("group", {"num_groups": 1})
        self.encoder = nn.Sequential(*(_block(spatial_dims, a, b, strides=2, norm=norm) for a, b in pairwise(sizes)))
        self.code = nn.Linear(sizes[-1], 2 * latent_size)
        self.segment = self._decoder(features[0], num_classes)
        self.reconstruct = self._decoder(features[0], in_channels)

    def _decoder(self, width: int, out_channels: int) -> nn.Module:
        """Return a decoder of features and code."""
        # Use no norm. The code adds a constant to each channel, which a norm per channel would subtract again. With
        # kernels of size 1, as in the probabilistic U-Net, training took several times as many updates.
        return nn.Sequential(
            _block(self.spatial_dims, width + self.latent_size, width),
            _pointwise(self.spatial_dims, width, out_channels),
        )

    def encode(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``mu`` and ``logvar`` ``[N, L]`` of the posterior. Labels outside the classes count as unknown."""
        classes = torch.arange(self.num_classes, device=label.device).view(-1, *(1,) * self.spatial_dims)
        onehot = (label[:, None] == classes).to(image.dtype)
        pooled = self.encoder(torch.cat([image, onehot], 1)).flatten(2).mean(2)
        mu, logvar = self.code(pooled).chunk(2, 1)
        return mu, logvar

    def _with_code(self, features: Tensor, code: Tensor) -> Tensor:
        """Concatenate the code to the features of every voxel."""
        spread = code.view(*code.shape, *(1,) * self.spatial_dims).expand(-1, -1, *features.shape[2:])
        return torch.cat([features, spread], 1)

    def forward(self, image: Tensor, label: Tensor, noise: Tensor) -> StageOneOutput:
        """Return the output for one draw of the code.

        Args:
            image: float ``[N, in_channels, *S]``.
            label: class indices ``[N, *S]``.
            noise: standard normals ``[N, L]``.
        """
        mu, logvar = self.encode(image, label)
        joined = self._with_code(self.trunk(image), mu + (logvar / 2).exp() * noise)
        return StageOneOutput(self.segment(joined), self.reconstruct(joined), mu, logvar)

    @torch.no_grad()
    def estimate_soft_labels(
        self,
        image: Tensor,
        label: Tensor,
        *,
        num_samples: int,
        temperature: float,
        alpha: float,
        codes: str = "posterior",
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return soft labels, ``(1 - alpha) onehot(label) + alpha mean_k softmax(logits of code k / temperature)``.

        U-Net and encoder run once, and the decoder runs for every code. No more than one of its maps is in memory.

        Args:
            image: float ``[N, in_channels, *S]``.
            label: class indices ``[N, *S]``.
            num_samples: number of codes that are drawn. ``calseg train`` draws 8.
            temperature: temperature of the softmax, above 0. ``calseg train`` fits it (benchmarks/README.md).
            alpha: share of the estimate, in [0, 1]. ``calseg train`` uses 0.4 (benchmarks/README.md).
            codes: "posterior", which knows image and label, or "prior", the standard normal distribution, which knows
                neither. Default "posterior".
            ignore_index: label of voxels whose soft label is 0 in every class. Default -100.
            generator: random generator for the codes, on the CPU. Default: one with a seed that is drawn as the losses
                draw theirs.

        Returns:
            Soft labels ``[N, C, *S]`` in the dtype of the logits, at least float32.

        Raises:
            TypeError, ValueError, IndexError: as :func:`calseg.accumulate_soft_labels`, and for other ``codes``.
        """
        if codes not in ("posterior", "prior"):
            raise ValueError(f"codes: got {codes!r}, wanted 'posterior' or 'prior'")
        features = self.trunk(image)
        mu, logvar = self.encode(image, label)
        if codes == "prior":
            mu, logvar = torch.zeros_like(mu), torch.zeros_like(logvar)
        sigma = (logvar / 2).exp()
        if generator is None:
            generator = torch.Generator().manual_seed(int(draw_seed(torch.device("cpu"))))

        def maps() -> Iterator[Tensor]:
            for k in range(num_samples):
                if k % 2 == 0:  # codes come in antithetic pairs, as the samples of the losses do
                    noise = sigma * torch.randn(mu.shape, generator=generator, device="cpu").to(mu)
                yield self.segment(self._with_code(features, mu - noise if k % 2 else mu + noise))

        return accumulate_soft_labels(maps(), label, temperature=temperature, alpha=alpha, ignore_index=ignore_index)


def _block(spatial_dims: int, in_channels: int, out_channels: int, *, strides: int = 1, norm: Any = None) -> nn.Module:
    """Return a block of a convolution with a kernel of size 3, a norm if one is given, and LeakyReLU."""
    act = ("leakyrelu", {"negative_slope": 0.1})
    block: nn.Module = Convolution(spatial_dims, in_channels, out_channels, strides=strides, norm=norm, act=act)
    return block


def build_net(
    in_channels: int, num_classes: int, *, spatial_dims: int = 3, dense_head: bool = False, seed: int
) -> SegmentationNet:
    """Return the network to deploy, with weights drawn from ``seed``. PyTorch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _channels_last(
            SegmentationNet(in_channels, num_classes, spatial_dims=spatial_dims, dense_head=dense_head)
        )


def build_net_of_run(config: TrainConfig, in_channels: int, num_classes: int) -> SegmentationNet:
    """The network to deploy that the settings of a run ask for, as :func:`build_net` makes it."""
    dense_head = METHODS[config.method].dense_head
    dims = config.spatial_dims
    return build_net(in_channels, num_classes, spatial_dims=dims, dense_head=dense_head, seed=config.seed)


def build_stage_one(
    in_channels: int, num_classes: int, *, spatial_dims: int = 3, latent_size: int, seed: int
) -> StageOneNet:
    """Return the networks of the first stage, with weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _channels_last(StageOneNet(in_channels, num_classes, spatial_dims=spatial_dims, latent_size=latent_size))


def _channels_last(net: Net) -> Net:
    """Convert a network to channels-last, in which convolutions with few channels are faster on a CPU."""
    is_flat = getattr(net, "spatial_dims", 3) == 2
    layout = torch.channels_last if is_flat else torch.channels_last_3d
    return net.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]
