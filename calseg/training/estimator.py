"""The networks of the first stage: what they are, their loss, and the estimates that they make.

The setting ``estimator`` chooses among three sources of estimates:

- "posterior", as in the paper: codes are drawn from the posterior of image and label.
- "prior": the networks are the same, and codes are drawn from a standard normal distribution.
- "network": a plain network, as the one to deploy. Its prediction is the estimate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from calseg.functional import gaussian_kl
from calseg.methods import cross_entropy_and_dice, mean_over_voxels
from calseg.training.config import TrainConfig
from calseg.training.inference import in_windows, predict_volume
from calseg.training.loop import Patches, noise_seed
from calseg.training.nets import SegmentationNet, StageOneNet, build_net, build_stage_one
from calseg.volumes.datasets import IGNORE_INDEX, Dataset
from calseg.volumes.patches import LoadedCase

Estimator = StageOneNet | SegmentationNet
"""A network of the first stage. A plain one is a :class:`SegmentationNet`."""


def build_estimator(dataset: Dataset, config: TrainConfig) -> Estimator:
    """Return the networks of the first stage, before training."""
    channels, classes = len(dataset.channel_names), len(dataset.class_names)
    if config.estimator == "network":
        return build_net(channels, classes, spatial_dims=config.spatial_dims, seed=config.seed)
    return build_stage_one(
        channels, classes, spatial_dims=config.spatial_dims, latent_size=config.latent_size, seed=config.seed
    )


def training_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings with which the networks of the first stage are trained.

    They have the number of updates of these networks. Settings that the networks do not depend on have fixed values, so
    that the networks can serve other estimates.
    """
    return replace(
        config,
        iterations=max(1, round(config.first_stage_share * config.iterations)),
        first_stage_share=1.0,
        alpha=1.0,
        temperature=1.0,
        num_samples=1,
        estimator="network" if config.estimator == "network" else "posterior",
        dice_labels="soft",
    )


def estimator_loss(net: Estimator, config: TrainConfig) -> Callable[[Patches, int], Tensor]:
    """Return the function that computes the loss of the first stage.

    It is the sum of the cross-entropy of the label, with the Dice loss beside it, the squared error of the image, and
    the KL divergence of the posterior from its prior. Cross-entropy and error are means over the labelled voxels. The
    KL divergence is summed over the code, and is a mean over the patches. A plain network has the first part only.
    """

    def of_label(logits: Tensor, patches: Patches) -> Tensor:
        return cross_entropy_and_dice(logits, patches.label, config.dice_weight)

    def loss_of(patches: Patches, iteration: int) -> Tensor:
        if isinstance(net, SegmentationNet):
            return of_label(net.predict(patches.image), patches)
        generator = torch.Generator().manual_seed(noise_seed(config.seed, iteration, 0))
        noise = torch.randn(len(patches.image), net.latent_size, generator=generator, device="cpu").to(patches.image)
        logits, image, mu, logvar = net(patches.image, patches.label, noise)
        squares = (image - patches.image).square().mean(1) * (patches.label != IGNORE_INDEX)
        error = mean_over_voxels(squares.sum(), patches.label)
        return of_label(logits, patches) + config.reconstruction * error + config.beta * gaussian_kl(mu, logvar)

    return loss_of


def estimate_case(net: Estimator, case: LoadedCase, config: TrainConfig) -> Tensor:
    """Return the estimate of a case before it is blended with the label, float32 ``[classes, x, y, z]``.

    An ignored voxel is 0 in every class.
    """
    net.eval()
    with torch.inference_mode():
        if isinstance(net, StageOneNet):
            return _estimate_with_codes(net, case, config)
        logits = predict_volume(net, case.image, config.patch_size)
        counted = torch.from_numpy(case.label != IGNORE_INDEX).to(logits.device)
        return torch.softmax(logits / config.temperature, 0) * counted


def _estimate_with_codes(net: StageOneNet, case: LoadedCase, config: TrainConfig) -> Tensor:
    """Return the mean over codes.

    Sliding windows with the size of the training patches overlap by half. Each window draws codes of its own. The
    results are averaged with Gaussian weights.
    """
    device = next(net.parameters()).device
    seed = int.from_bytes(hashlib.sha256(case.name.encode(errors="surrogateescape")).digest()[:4], "big")
    # Number the classes from 1, because windows are padded with 0, which must not mean background.
    label = np.where(case.label == IGNORE_INDEX, 0, case.label + 1).astype(np.float32)
    volume = torch.from_numpy(np.concatenate([case.image, label[None]])).to(device)
    is_flat = config.spatial_dims == 2

    def estimate(window: Tensor) -> Tensor:
        if is_flat:
            window = window[..., 0]
        classes = window[:, -1].long() - 1
        soft = net.estimate_soft_labels(
            window[:, :-1],
            torch.where(classes < 0, IGNORE_INDEX, classes),
            num_samples=config.num_samples,
            temperature=config.temperature,
            alpha=1.0,
            codes=config.estimator,
            ignore_index=IGNORE_INDEX,
            generator=torch.Generator().manual_seed(noise_seed(config.seed, seed, 3)),
        )
        maps: Tensor = soft[..., None] if is_flat else soft
        return maps

    return in_windows(estimate, volume, config.patch_size)
