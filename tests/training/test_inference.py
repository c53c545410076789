"""Sliding windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calseg.training.inference import predict_volume


class Pointwise(torch.nn.Module):
    """Logits that depend on their own voxel only, so that any window gives the same."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def predict(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([-image, self.scale * image], 1)


@pytest.mark.parametrize("shape", [(20, 33, 9), (5, 6, 7), (16, 16, 8)])
def test_volumes_of_any_shape_are_predicted_in_place(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    logits = predict_volume(Pointwise(), image, (16, 16, 8))  # type: ignore[arg-type]
    torch.testing.assert_close(logits, torch.from_numpy(np.concatenate([-image, 2 * image])), atol=1e-5, rtol=1e-5)
