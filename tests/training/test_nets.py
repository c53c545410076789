"""Tests of the networks: their initial state, and the estimate of the first stage against its formula."""

from __future__ import annotations

import doctest
import gc
import weakref
from typing import Any

import pytest
import torch

from calseg.training.nets import FEATURES, StageOneNet, build_net, build_stage_one
from calseg.volumes.datasets import IGNORE_INDEX


def batch(dims: int, *, classes: int = 3, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, channels, *(16,) * dims, generator=generator)
    label = torch.randint(0, classes, (2, *(16,) * dims), generator=generator, dtype=torch.int16)
    label[0, :3] = IGNORE_INDEX
    return image, label


def test_both_networks_start_alike_and_predict_their_logits() -> None:
    state = torch.get_rng_state()
    plain, dense = (build_net(2, 3, dense_head=dense, seed=4) for dense in (False, True))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, dense.state_dict()[name])
    image = torch.randn(1, 2, 16, 8, 24, generator=torch.Generator().manual_seed(0))
    output = dense(image)
    assert output.logits.shape == (1, 3, 16, 8, 24)
    assert torch.equal(output.logits, output.mu)
    torch.testing.assert_close((output.logvar / 2).exp(), torch.full_like(output.logvar, 0.5), atol=1e-3, rtol=0)
    assert plain(image).mu is None
    torch.testing.assert_close(dense.predict(image), output.logits)


@pytest.mark.parametrize("dims", [2, 3])
def test_estimate_is_the_mean_of_the_decoded_codes(dims: int) -> None:
    net = build_stage_one(2, 3, spatial_dims=dims, latent_size=5, seed=0).eval()
    image, label = batch(dims)
    soft = net.estimate_soft_labels(
        image, label, num_samples=6, temperature=1.7, alpha=0.3, generator=torch.Generator().manual_seed(7)
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        codes = [torch.randn(2, 5, generator=generator) for _ in range(3)]
        draws = [net(image, label, sign * code) for code in codes for sign in (1, -1)]
    estimate = torch.stack([torch.softmax(draw.logits.double() / 1.7, 1) for draw in draws]).mean(0)
    valid = (label != IGNORE_INDEX)[:, None]
    onehot = torch.zeros_like(estimate).scatter_(1, label.clamp(min=0).long()[:, None], 1.0)
    torch.testing.assert_close(soft.double(), (0.7 * onehot + 0.3 * estimate) * valid, atol=2e-6, rtol=0)
    # The code reaches the prediction, and the posterior depends on the label.
    assert float((draws[0].logits - draws[1].logits).abs().max()) > 1e-3
    assert draws[0].mu.shape == (2, 5)
    assert not torch.allclose(net.encode(image, label)[0], net.encode(image, label * 0)[0])
    assert draws[0].image.shape == image.shape


def test_codes_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes differ between ranks whose generators have the same state, and can be repeated."""
    net = build_stage_one(2, 3, spatial_dims=2, latent_size=4, seed=0).eval()
    image, label = batch(2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    soft = []
    for rank in (0, 1, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        soft.append(net.estimate_soft_labels(image, label, num_samples=2, temperature=1.0, alpha=0.5))
    assert not torch.equal(*soft[:2])
    assert torch.equal(*soft[1:])


def test_the_unet_runs_once_and_no_map_is_kept() -> None:
    net = build_stage_one(2, 3, latent_size=4, seed=0).eval()
    image, label = batch(3)
    calls = dict.fromkeys(("trunk", "encoder", "segment", "reconstruct"), 0)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def count(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            nonlocal most
            calls[name] += 1
            if name == "segment":
                gc.collect()
                most = max(most, sum(each() is not None for each in alive))
                alive.append(weakref.ref(output))

        return hook

    for name in calls:
        getattr(net, name).register_forward_hook(count(name))
    net.estimate_soft_labels(image, label, num_samples=9, temperature=1.0, alpha=0.5)
    assert calls == {"trunk": 1, "encoder": 1, "segment": 9, "reconstruct": 0}
    assert most <= 2  # the one before may live until the next is there; the first sets shape and dtype


def test_code_is_not_normalised_away() -> None:
    """The code alone changes the mean of a decoder's maps, which a norm per channel would prevent."""
    net = build_stage_one(1, 2, spatial_dims=2, latent_size=3, seed=0).eval()
    features = torch.randn(1, FEATURES[0], 8, 8)
    with torch.no_grad():
        low, high = (net.segment(net._with_code(features, torch.full((1, 3), z))) for z in (-3.0, 3.0))
    assert float((high - low).mean((0, 2, 3)).abs().max()) > 0.1


def test_stage_one_docstring() -> None:
    examples = doctest.DocTestFinder(recurse=False).find(StageOneNet, "StageOneNet", globs={})
    report: list[str] = []
    assert doctest.DocTestRunner().run(examples[0], out=report.append).failed == 0, "".join(report)
