"""Tests of the noise in two processes of ``torch.distributed`` whose generators have the same state."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import labels, scores

import calseg
from calseg.backends import rng

SHAPE = (2, 3, 9, 8)
WORLD = 2


def draws() -> dict[str, torch.Tensor]:
    """Results of everything that draws its own noise, from the same arguments, eager and compiled."""
    mu, logvar, target = scores(*SHAPE), torch.zeros(SHAPE), labels(SHAPE, ignore_index=None)

    def sample() -> torch.Tensor:
        return calseg.sample_soft_labels(mu, logvar, target, alpha=1.0)

    gaussian: dict[str, Any] = {"mu": mu, "logvar": logvar, "alpha": 0.5}
    calls = {
        "sample": sample,
        "compiled": torch.compile(sample, fullgraph=True, backend="aot_eager"),
        "elbo": lambda: calseg.vls_elbo(mu, logvar, target),
        "loss": lambda: calseg.vls_cross_entropy(mu, target, **gaussian),
        "dice": lambda: calseg.vls_dice_cross_entropy(mu, target, **gaussian),
        "module": lambda: calseg.VLSCrossEntropyLoss(alpha=0.5)(mu, target, mu=mu, logvar=logvar),
        "reference": lambda: calseg.sample_soft_labels(mu, logvar, target, alpha=1.0, backend="reference"),
    }
    return {name: call() for name, call in calls.items()}


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)  # as Lightning's seed_everything does, and nnU-Net
    result = {"first": draws(), "second": draws()}
    torch.manual_seed(0)
    result["again"] = draws()
    mu = scores(*SHAPE)
    result["given"] = {"seed": calseg.sample_soft_labels(mu, torch.zeros(SHAPE), alpha=1.0, seed=3)}
    torch.manual_seed(0)
    result["drawn"] = {"seed": rng.draw_seed(torch.device("cpu"))}
    torch.save(result, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of the processes has computed."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / str(rank)) for rank in range(WORLD)]


def test_noise_differs_between_processes(ranks) -> None:
    for name, value in ranks[0]["first"].items():
        assert not torch.equal(value, ranks[1]["first"][name]), name
        assert not torch.equal(value, ranks[0]["second"][name]), name


def test_noise_is_repeated_by_the_same_seed(ranks) -> None:
    for rank in ranks:
        for name, value in rank["first"].items():
            assert torch.equal(value, rank["again"][name]), name


def test_a_given_seed_is_that_of_all_processes(ranks) -> None:
    assert torch.equal(ranks[0]["given"]["seed"], ranks[1]["given"]["seed"])


def test_seed_of_rank_and_generator(ranks) -> None:
    """The seed is the draw plus a multiple of the rank. Rank 0 has that of a process without others."""
    torch.manual_seed(0)
    alone = int(rng.draw_seed(torch.device("cpu")))
    for rank, result in enumerate(ranks):
        assert int(result["drawn"]["seed"]) % 2**64 == (alone + rank * 0x9E3779B97F4A7C15) % 2**64
    torch.manual_seed(0)
    for name, value in draws().items():
        assert torch.equal(value, ranks[0]["first"][name]), name
