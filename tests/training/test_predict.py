"""Tests of the probability maps of a run: content, interruption, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

nibabel = pytest.importorskip("nibabel")
matplotlib = pytest.importorskip("matplotlib")

from interruption import stop_after  # noqa: E402

from calseg.evaluate import EvaluateConfig, evaluate_folders  # noqa: E402
from calseg.methods import fit_temperature  # noqa: E402
from calseg.runs import CasesInterruptedError  # noqa: E402
from calseg.training import TrainConfig, TrainingError, train  # noqa: E402
from calseg.training.predict import predict_folder  # noqa: E402
from calseg.volumes.nifti import DataError  # noqa: E402

matplotlib.use("agg")


def test_predict_then_evaluate_gives_the_scores_of_training(trained: Path, tmp_path: Path) -> None:
    content = predict_folder(trained / "run", trained / "data", tmp_path / "maps")
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    assert content["cases"] == list(metrics["cases"])
    assert sorted(path.name for path in (tmp_path / "maps").glob("*.nii.gz")) == [
        f"{n}.nii.gz" for n in content["cases"]
    ]
    for name in content["cases"]:
        image = nibabel.load(tmp_path / "maps" / f"{name}.nii.gz")
        label = nibabel.load(trained / "data" / "labelsTr" / f"{name}.nii.gz")
        assert image.shape == (*label.shape, 3)
        assert image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.affine, label.affine)
    report = evaluate_folders(
        tmp_path / "maps", trained / "data" / "labelsTr", tmp_path / "out", EvaluateConfig(num_resamples=50)
    )
    assert report["classes"] == metrics["classes"]
    for name, value in metrics["dice"].items():
        assert report["dice"][name]["mean"]["value"] == pytest.approx(value, abs=1e-12)
    for region in ("all", "foreground"):
        assert report["voxels"][region] == metrics["voxels"][region]
        for score in ("nll", "brier", "ece"):
            assert report[region][score]["pooled"]["value"] == pytest.approx(metrics[region][score], abs=1e-6)


def test_calibrated_maps_have_the_temperature_of_the_run(trained: Path, tmp_path: Path) -> None:
    """It is the one that fits the validation cases near the foreground best, and the maps are divided by it."""
    temperature = json.loads((trained / "run" / "metrics.json").read_text())["temperature"]
    predict_folder(trained / "run", trained / "data", tmp_path / "plain")
    content = predict_folder(trained / "run", trained / "data", tmp_path / "maps", calibrated=True)
    assert content["temperature"] == temperature != 1
    logits, labels = [], []
    for name in content["cases"]:
        plain, maps = (
            torch.from_numpy(nibabel.load(tmp_path / kind / f"{name}.nii.gz").get_fdata()).movedim(-1, 0)
            for kind in ("plain", "maps")
        )
        torch.testing.assert_close(torch.softmax(plain.log() / temperature, 0), maps, rtol=0, atol=1e-6)
        logits.append(plain.log())
        label = nibabel.load(trained / "data" / "labelsTr" / f"{name}.nii.gz")
        labels.append(torch.from_numpy(np.asarray(label.dataobj).astype(np.int64)))
    assert fit_temperature(logits, labels, region="near") == pytest.approx(temperature, rel=1e-5)


def test_calibrated_maps_need_a_finished_run(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    for content in (None, "[]", '{"temperature": "1"}', '{"temperature": -1}', '{"temperature": NaN}'):
        (run / "metrics.json").unlink()
        if content is not None:
            (run / "metrics.json").write_text(content)
        with pytest.raises(TrainingError, match=r"metrics.json: has no temperature; train to the end"):
            predict_folder(run, trained / "data", tmp_path / "maps", calibrated=True)
        assert not (tmp_path / "maps").exists()
        (run / "metrics.json").touch()


def test_predict_resumes(trained: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cases": "all"}
    whole, part = tmp_path / "whole", tmp_path / "part"
    predict_folder(trained / "run", trained / "data", whole, **options)
    with pytest.raises(CasesInterruptedError, match="interrupted after 2 of 6 cases, which are kept in"):
        predict_folder(trained / "run", trained / "data", part, progress=stop_after(2), **options)
    first = {path: path.stat().st_mtime_ns for path in part.glob("*.nii.gz")}
    assert len(first) == 2
    with pytest.raises(TrainingError, match="cannot be resumed on other data: the cases to predict changed since"):
        predict_folder(trained / "run", trained / "data", part, resume=True, cases="training")
    with pytest.raises(TrainingError, match="cannot be resumed on other data: the temperature changed since"):
        predict_folder(trained / "run", trained / "data", part, resume=True, calibrated=True, **options)
    predict_folder(trained / "run", trained / "data", part, resume=True, **options)
    assert first == {path: path.stat().st_mtime_ns for path in first}
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in part.iterdir())
    assert all((whole / name).read_bytes() == (part / name).read_bytes() for name in names)


def test_predict_refuses_images_and_labels_that_changed(trained: Path, tmp_path: Path) -> None:
    """Of a case that was predicted; the others are read as they are now."""
    data, maps, options = tmp_path / "data", tmp_path / "maps", {"cases": "all"}
    shutil.copytree(trained / "data", data)
    with pytest.raises(CasesInterruptedError):
        predict_folder(trained / "run", data, maps, progress=stop_after(2), **options)
    before = {path.name: path.read_bytes() for path in maps.iterdir()}
    for part in ("imagesTr", "labelsTr"):
        path = data / part / "demo_001.nii.gz"
        content = path.read_bytes()
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), path)
        with pytest.raises(TrainingError, match=rf"cannot be resumed; \S*{part}.demo_001.nii.gz changed since$"):
            predict_folder(trained / "run", data, maps, resume=True, **options)
        assert {path.name: path.read_bytes() for path in maps.iterdir()} == before
        path.write_bytes(content)
    last = data / "imagesTr" / "demo_005.nii.gz"
    image = nibabel.load(last)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32)[::-1], image.affine), last)
    predict_folder(trained / "run", data, maps, resume=True, **options)
    assert {name: (maps / name).read_bytes() for name in before if name != "calseg.json"}.items() <= before.items()


def test_predict_refuses_a_network_that_changed(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    with pytest.raises(CasesInterruptedError):
        predict_folder(run, trained / "data", tmp_path / "maps", progress=stop_after(1))
    train(trained / "data", run, TrainConfig(iterations=2, patch_size=(16, 16, 8), val_fraction=0.5), overwrite=True)
    with pytest.raises(TrainingError, match="cannot be resumed on other data: the network in RUN changed since"):
        predict_folder(run, trained / "data", tmp_path / "maps", resume=True)


def test_predict_errors(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cases must be one of validation, training, all; got 'some'"):
        predict_folder(trained / "run", trained / "data", tmp_path / "out", cases="some")
    with pytest.raises(TrainingError, match=r"checkpoint.pt: not found"):
        predict_folder(trained, trained / "data", tmp_path / "out")
    other = tmp_path / "data"
    shutil.copytree(trained / "data", other)
    meta = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**meta, "labels": {"background": 0, "cyst": 1, "core": 2}}))
    with pytest.raises(
        DataError, match=r"the classes are background, cyst, core, but .* was trained on background, lesion"
    ):
        predict_folder(trained / "run", other, tmp_path / "out")
    gone = json.loads((trained / "run" / "split.json").read_text())["validation"][0]
    meta["training"] = [entry for entry in meta["training"] if gone not in entry["label"]]
    (other / "dataset.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=f"the validation case '{gone}' of .* is not in it"):
        predict_folder(trained / "run", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
