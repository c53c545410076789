"""Checkpoints: what is damaged, not finite or foreign is refused, and no code from a file is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import config

from calseg.errors import RunError
from calseg.training import train
from calseg.training.checkpoint import load_checkpoint, sealed
from calseg.training.predict import predict_folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(data, folder, config(iterations=1))
    return folder


def written(folder: Path, content: dict[str, Any]) -> Path:
    """A folder with a checkpoint of that content, its digest right."""
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(sealed(content))
    return folder


def test_one_flipped_bit_is_noticed_wherever_it_is(run: Path, tmp_path: Path) -> None:
    content = (run / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    rng = np.random.default_rng(0)
    places = {*rng.integers(0, len(content), 100).tolist(), *range(len(content) - 75, len(content)), 0, 1}
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"checkpoint.pt: corrupt, or not a checkpoint of calseg \(its digest"):
            load_checkpoint(path)
    for damaged in (content[:-1], content + b"x", content[: len(content) // 2], b"", content * 2):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="its digest is not that of its content"):
            load_checkpoint(path)
    path.write_bytes(content)
    load_checkpoint(path)


def test_pytorch_reads_a_checkpoint(run: Path) -> None:
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    assert content["iteration"] == 1
    assert torch.equal(
        content["model"]["logits.weight"], load_checkpoint(run / "checkpoint.pt")["model"]["logits.weight"]
    )


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(
    data: Path, run: Path, tmp_path: Path, part: str, value: float
) -> None:
    content = load_checkpoint(run / "checkpoint.pt")
    tensor = content["model"]["logits.weight"] if part == "model" else content["optimizer"]["state"][0]["exp_avg"]
    tensor.view(-1)[-1] = value
    with pytest.raises(RunError, match=r"checkpoint.pt: not all numbers are finite; the network cannot be used"):
        predict_folder(written(tmp_path / "run", content), data, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_weights_that_are_not_finite_are_not_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the last update is finite, and the update is not: the checkpoint before it is kept."""
    from calseg.training import loop

    step = loop._step

    def spoil(net: torch.nn.Module, *rest: Any) -> float:
        loss = step(net, *rest)
        if rest[-1] == 3:
            next(net.parameters()).data.view(-1)[0] = torch.inf
        return loss

    monkeypatch.setattr(loop, "_step", spoil)
    with pytest.raises(RunError, match="the weights after iteration 4: not all numbers are finite; a smaller"):
        train(data, tmp_path, config(iterations=4), checkpoint_every=2)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 2


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_no_code_from_a_file_is_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is no signature: whoever can write a file can make one."""
    monkeypatch.chdir(tmp_path)
    content = load_checkpoint(run / "checkpoint.pt")
    path = tmp_path / "checkpoint.pt"
    for data in (sealed({**content, "classes": Evil()}), pickle.dumps(Evil())):
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"checkpoint.pt: corrupt, or not a checkpoint of calseg") as caught:
            load_checkpoint(path)
        assert len(str(caught.value)) < 500
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "checkpoint format 2, but this version reads 3"),
        ({"config": None}, "its entry 'config' is missing or no dict"),
        ({"model": [torch.zeros(1)]}, "its entry 'model' is missing or no dict"),
        ({"iteration": "1"}, "its entry 'iteration' is missing or no int"),
        ({"split": {"training": []}}, "its entry 'split' lacks a part"),
        ({"config": {"width": 3}}, "not the settings of a run"),
        ({"model": {}}, "does not fit this version of calseg"),
        ({"model": {"a" * 50 + str(i): torch.zeros(1) for i in range(500)}}, "does not fit this version of calseg"),
    ],
)
def test_what_is_missing_is_named(data: Path, run: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = load_checkpoint(run / "checkpoint.pt")
    with pytest.raises(RunError, match=message) as caught:
        predict_folder(written(tmp_path / "run", {**content, **changes}), data, tmp_path / "maps")
    assert len(str(caught.value)) < 500
