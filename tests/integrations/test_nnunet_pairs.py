"""Tests of benchmarks/nnunet_pairs.py: its pairs differ in the targets alone, and it runs, continues and reports."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("nnunetv2")
pytest.importorskip("nibabel")

import nibabel
import numpy as np
import short_nnunet

from calseg.simulation import DemoConfig, make_dataset
from calseg.volumes.datasets import find_cases

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the checkout's benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import nnunet_pairs as benchmark  # noqa: E402

sys.path.remove(str(BENCHMARKS))
CASES = 8
SCORES = {"dice": "Dice", "ece near": "ECE near", "nll near": "NLL near", "ece all": "ECE all"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folders of data and of a finished quick call. nnU-Net's processes are forks, which import nothing anew."""
    root = tmp_path_factory.mktemp("pairs")
    make_dataset(root / "data", DemoConfig(cases=CASES, raters=2, side=16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(multiprocessing.context._concrete_contexts, "spawn", multiprocessing.get_context("fork"))
        short_nnunet.plan_small(patch.setattr)
        keep_environment(patch)
        call(root)
        yield root


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_environment(monkeypatch)


def keep_environment(patch: pytest.MonkeyPatch) -> None:
    """Restore later what a call sets."""
    patch.setattr(torch, "set_num_threads", lambda count: None)
    for name in ("raw", "preprocessed", "results", "n_proc_DA"):
        patch.setenv(f"nnUNet_{name}", "")


def call(root: Path, *more: str) -> None:
    benchmark.main(["--data", str(root / "data"), "--out", str(root / "out"), "--quick", "--seeds", "2", *more])


def test_the_result(finished: Path) -> None:
    content = json.loads((finished / "out" / "nnunet_pairs.json").read_text())
    assert content["scores"] == SCORES
    assert content["plan"]["updates"] == 2
    assert content["soft_labels"]["alpha"] == 0.4
    assert list(content["starts"]) == ["random", "pretrained"]
    for group in content["starts"].values():
        pairs = group["pairs"]
        assert [pair["seed"] for pair in pairs] == [0, 1]
        assert all(set(pair[targets]) == set(SCORES) for pair in pairs for targets in content["targets"])
        assert all(
            pair["labels"] != pair["soft labels"] for pair in pairs
        )  # nearest: this small network has no such level
        for difference in group["differences"]:
            for name in SCORES:
                values = [pair[difference["of"]][name] - pair[difference["from"]][name] for pair in pairs]
                assert difference[name]["mean"] == pytest.approx(sum(values) / 2)
                assert difference[name]["sd"] == pytest.approx(np.std(values, ddof=1))
                assert difference[name]["better"] == sum(v > 0 if name == "dice" else v < 0 for v in values)


def test_a_finished_call_trains_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished / "out" / "nnunet_pairs.json"
    before = json.loads(path.read_text())
    monkeypatch.setattr(benchmark.Pairs, "trained", None)
    monkeypatch.setattr(benchmark, "prepare", None)
    call(finished)
    assert {**json.loads(path.read_text()), "date": before["date"]} == before


def test_another_plan_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="of other data or of another plan"):
        benchmark.main(["--data", str(tmp_path), "--out", str(finished / "out"), "--quick"])


def test_wrong_arguments(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(finished, "--seeds", "1")
    assert "--seeds: at least 2 are wanted, for the spread; got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=f"{CASES} cases, but 40 are wanted"):
        benchmark.main(["--data", str(finished / "data"), "--out", str(tmp_path)])


def test_pairs_differ_in_the_targets_alone(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, images and labels are the same, and soft labels at the first level. The next have means or nearest."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(finished / "out" / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    pairs = benchmark.Pairs(finished / "out", benchmark.Plan().quick())
    for weights in (None, pairs.pretrained):
        networks, batches = [], []
        for kind in benchmark.TARGETS.values():
            trainer = pairs.started(kind, "all", 3, 2, weights)
            networks.append(trainer.network.state_dict())
            batches.append(next(trainer.dataloader_train))  # before another trainer seeds the generators
        for network in networks[1:]:
            assert all(torch.equal(value, network[name]) for name, value in networks[0].items())
        labels, soft, nearest = batches
        count = len(labels["target"])
        assert len(soft["target"]) == len(nearest["target"]) == 2 * count > 2
        for batch in (soft, nearest):
            torch.testing.assert_close(batch["data"], labels["data"], rtol=1e-4, atol=1e-4)
            for mine, theirs in zip(batch["target"], labels["target"], strict=False):
                assert torch.equal(mine, theirs)
        first = soft["target"][count]
        assert torch.equal(first, nearest["target"][count])
        for mean, taken in zip(soft["target"][count + 1 :], nearest["target"][count + 1 :], strict=True):
            averages, voxels = (
                F.interpolate(first.float(), mean.shape[2:], mode=mode) for mode in ("area", "nearest-exact")
            )
            torch.testing.assert_close(mean.float(), averages, rtol=0, atol=2)
            assert torch.equal(taken.float(), voxels)
            assert not torch.equal(mean, taken)


def test_raw_data_of_several_channels(tmp_path: Path) -> None:
    """One file of the Decathlon's becomes a file for each channel, and the ignore label stays."""
    data = tmp_path / "data"
    data.mkdir()
    image = np.random.default_rng(0).standard_normal((4, 5, 6, 2)).astype(np.float32)
    label = np.arange(120).reshape(4, 5, 6).astype(np.uint8) % 3
    for number in range(7):
        nibabel.save(nibabel.Nifti1Image(image + number, np.eye(4)), data / f"image{number}.nii")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), data / f"case{number}.nii")
    content = {
        "modality": {"0": "one", "1": "two"},
        "labels": {"0": "nothing", "1": "organ", "2": "ignore"},
        "training": [{"image": f"image{number}.nii", "label": f"case{number}.nii"} for number in range(7)],
    }
    (data / "dataset.json").write_text(json.dumps(content))
    benchmark.write_raw(find_cases(data), benchmark.Plan().quick(), tmp_path / "raw")
    found = find_cases(tmp_path / "raw")
    assert (found.class_names, found.ignore_label, found.channel_names) == (("background", "organ"), 2, ("one", "two"))
    assert len(found.cases) == 5
    case = found.cases[0]
    number = int(case.name.removeprefix("case"))
    for channel, file in enumerate(case.images):
        np.testing.assert_array_equal(nibabel.load(file).get_fdata(), image[..., channel] + number)
    np.testing.assert_array_equal(nibabel.load(case.label).get_fdata(), label)
    tests = sorted(path.name for path in (tmp_path / "raw" / "imagesTs").iterdir())
    assert len(tests) == 4
    assert len(list((tmp_path / "raw" / "labelsTs").iterdir())) == 2
