"""Prediction of whole volumes by sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor

from calseg.training.nets import SegmentationNet


def predict_volume(net: SegmentationNet, image: NDArray[np.float32], patch_size: Sequence[int]) -> Tensor:
    """Return the logits of a normalised image ``[channels, x, y, z]``, float32 ``[C, x, y, z]``.

    Sliding windows with the size of the training patches overlap by half. Their logits are averaged with Gaussian
    weights. A volume that is smaller than a window is padded with 0, as in training.
    """

    def predict(window: Tensor) -> Tensor:
        return net.predict(window[..., 0])[..., None] if patch_size[2] == 1 else net.predict(window)

    with torch.inference_mode():
        return in_windows(predict, torch.from_numpy(image).to(next(net.parameters()).device), patch_size)


def in_windows(function: Callable[[Tensor], Tensor], volume: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Apply a function of windows ``[N, channels, *patch_size]`` to ``volume[channels, x, y, z]``, with overlap."""
    whole = sliding_window_inference(
        volume[None], roi_size=tuple(patch_size), sw_batch_size=2, predictor=function, overlap=0.5, mode="gaussian"
    )
    assert isinstance(whole, Tensor)
    return whole[0]
