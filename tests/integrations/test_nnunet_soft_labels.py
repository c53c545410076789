"""Tests of ``calseg nnunet-soft-labels``: its sources, its files, and what it says of wrong input."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

import nnunet_data as data

import calseg
from calseg.cli.main import main
from calseg.errors import CalsegError
from calseg.integrations.nnunet.config import SoftLabelConfig
from calseg.integrations.nnunet.soft_labels import make_soft_labels
from calseg.integrations.nnunet.store import STEPS, opened
from calseg.runs import CasesInterruptedError
from calseg.volumes.probabilities import soft_labels_file

pytestmark = pytest.mark.usefixtures("nnunet_folders")
RUN = f"results/{data.NAME}/nnUNetTrainer__nnUNetPlans__3d_fullres"
SOFT = "calseg_soft_labels_nnUNetPlans_3d_fullres"
SHARPENED = 1.8
"""The temperature that the predictions lack."""


def predict(number: int, transpose: tuple[int, int, int] = (0, 1, 2), *, ignore: bool = False) -> Any:
    """Over-confident probabilities of a case, ``[C, *S]`` as nnU-Net writes them.

    Every class has an observation, normal around 2 for the label and around 0 for others. The softmax of twice the
    observations is the probability of the label. It is sharpened, and more so where no temperature is fitted, far from
    the foreground.
    """
    rng = np.random.default_rng(number)
    label = data.make_case(number, ignore)[1]
    observed = 2 * data.onehot(label) + rng.standard_normal((len(data.LABELS), *label.shape))
    known = torch.from_numpy(np.where(label < len(data.LABELS), label, -100).astype(np.int64))
    far = ~calseg.near_foreground(known[None])[0].numpy()
    maps = torch.from_numpy(SHARPENED * (1 + far) * 2 * observed).softmax(0).float().numpy()
    back = np.argsort(transpose)
    return maps.transpose(0, *(1 + back))


def write_run(root: Path, transpose: tuple[int, int, int] = (0, 1, 2), *, ignore: bool = False) -> Path:
    """A finished run: the probabilities of the validation case of every fold."""
    for number, name in enumerate(data.CASES):
        folder = root / RUN / f"fold_{number}" / "validation"
        folder.mkdir(parents=True)
        np.savez_compressed(folder / f"{name}.npz", probabilities=predict(number, transpose, ignore=ignore))
    return root / RUN


def files_of(folder: Path) -> dict[Path, str]:
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and SOFT not in path.parts
    }


@pytest.mark.parametrize("ignore", [False, True])
def test_held_out_predictions(tmp_path: Path, ignore: bool) -> None:
    """The temperature is found, nnU-Net's files stay as they are, and the folder says what it holds."""
    folder = data.make_dataset(tmp_path, ignore=ignore)
    write_run(tmp_path, ignore=ignore)
    before = files_of(tmp_path)
    summary = make_soft_labels("1", "3d_fullres", SoftLabelConfig())
    assert files_of(tmp_path) == before
    assert summary["temperature"] == pytest.approx(SHARPENED, rel=0.05)
    assert summary["alpha"] == 0.4
    assert summary == json.loads((folder / SOFT / "soft_labels.json").read_text())
    for number, name in enumerate(data.CASES):
        soft = opened(folder / SOFT / f"{name}.b2nd")
        image = opened(folder / "nnUNetPlans_3d_fullres" / f"{name}.b2nd")
        assert soft.shape == (3, *image.shape[1:])
        assert soft.chunks[1:] == image.chunks[1:]
        assert soft.blocks[1:] == image.blocks[1:]
        wanted = predict(number, ignore=ignore).astype(np.float64) ** (1 / summary["temperature"])
        wanted = (wanted / wanted.sum(0))[:, 1:-2, 1:-2, 1:-2]
        np.testing.assert_allclose(soft[:] / STEPS, wanted, rtol=0, atol=1e-4)


def test_axes_in_another_order(tmp_path: Path) -> None:
    folder = data.make_dataset(tmp_path, transpose=(2, 0, 1))
    write_run(tmp_path, (2, 0, 1))
    make_soft_labels(data.NAME, "3d_fullres", SoftLabelConfig(temperature=1.0))
    for number, name in enumerate(data.CASES):
        np.testing.assert_allclose(
            opened(folder / SOFT / f"{name}.b2nd")[:] / STEPS, predict(number)[:, 1:-2, 1:-2, 1:-2], rtol=0, atol=1e-4
        )


def test_given_alpha_temperature_and_run(tmp_path: Path) -> None:
    data.make_dataset(tmp_path)
    other = write_run(tmp_path).rename(tmp_path / "elsewhere")
    summary = make_soft_labels("001", "3d_fullres", SoftLabelConfig(alpha=0.2, temperature=3.0), run=other)
    assert (summary["alpha"], summary["temperature"], summary["source"]) == (0.2, 3.0, str(other))


def test_two_dimensions(tmp_path: Path) -> None:
    """The predictions of one configuration serve another."""
    folder = data.make_dataset(tmp_path)
    make_soft_labels("1", "2d", SoftLabelConfig(), run=write_run(tmp_path))
    assert len(list((folder / "calseg_soft_labels_nnUNetPlans_2d").glob("*.b2nd"))) == len(data.CASES)


def test_maps_are_taken_as_they_are(tmp_path: Path) -> None:
    data.make_dataset(tmp_path)
    maps = tmp_path / "maps"
    maps.mkdir()
    for number, name in enumerate(data.CASES):
        data.save(predict(number), maps / f"{name}.nii.gz")
    summary = make_soft_labels("1", "3d_fullres", SoftLabelConfig(), maps=maps)
    assert (summary["alpha"], summary["temperature"]) == (1.0, 1.0)


def test_maps_of_the_command_soft_labels(tmp_path: Path) -> None:
    """Files of 16-bit integers with a slope, written in nibabel's order of axes; ignored voxels are zeros."""
    folder = data.make_dataset(tmp_path, ignore=True)
    maps = tmp_path / "maps"
    maps.mkdir()
    for number, name in enumerate(data.CASES):
        wanted = predict(number, ignore=True) * (data.make_case(number, True)[1] < len(data.LABELS))
        image = tmp_path / "raw" / data.NAME / "imagesTr" / f"{name}_0000.nii.gz"
        (maps / f"{name}.nii.gz").write_bytes(soft_labels_file(wanted.transpose(0, 3, 2, 1), image))
    make_soft_labels("1", "3d_fullres", SoftLabelConfig(), maps=maps)
    found = opened(folder / SOFT / f"{name}.b2nd")[:]
    np.testing.assert_allclose(found / STEPS, wanted[:, 1:-2, 1:-2, 1:-2], rtol=0, atol=1e-4)
    assert not found[:, :, :, :5].any()


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    folder = data.make_dataset(tmp_path)
    run = write_run(tmp_path)
    whole = make_soft_labels("1", "3d_fullres", SoftLabelConfig())
    contents = {path.name: path.read_bytes() for path in (folder / SOFT).glob("*.b2nd")}

    def stop(stage: str, done: int, total: int, loss: float | None) -> None:
        if (stage, done) == ("soft labels", 2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(CasesInterruptedError, match="after 2 of 5 cases"):
        make_soft_labels("1", "3d_fullres", SoftLabelConfig(), overwrite=True, progress=stop)
    stages = []
    again = make_soft_labels(
        "1", "3d_fullres", SoftLabelConfig(), resume=True, progress=lambda stage, *_: stages.append(stage)
    )
    assert again == whole
    assert "temperature" not in stages
    assert {path.name: path.read_bytes() for path in (folder / SOFT).glob("*.b2nd")} == contents
    with pytest.raises(CalsegError, match=r"other settings: alpha is 0\.1 but was 0\.4"):
        make_soft_labels("1", "3d_fullres", SoftLabelConfig(alpha=0.1), resume=True)
    with pytest.raises(CalsegError, match="not empty; give --resume"):
        make_soft_labels("1", "3d_fullres", SoftLabelConfig())
    np.savez(run / "fold_3/validation/case_3.npz", probabilities=predict(3)[::-1])
    with pytest.raises(CalsegError, match=r"case_3\.npz changed since"):
        make_soft_labels("1", "3d_fullres", SoftLabelConfig(), resume=True)


def no_run(root: Path) -> None:
    (root / RUN).rename(root / "gone")


def no_npz(root: Path) -> None:
    for fold in (2, 4):
        (root / RUN / f"fold_{fold}/validation/case_{fold}.npz").unlink()


def other_key(root: Path) -> None:
    np.savez(root / RUN / "fold_1/validation/case_1.npz", softmax=predict(1))


def other_classes(root: Path) -> None:
    np.savez(root / RUN / "fold_1/validation/case_1.npz", probabilities=np.full((2, 12, 20, 22), 0.5, np.float32))


def other_shape(root: Path) -> None:
    np.savez(root / RUN / "fold_1/validation/case_1.npz", probabilities=predict(2))


def no_probabilities(root: Path) -> None:
    np.savez(root / RUN / "fold_0/validation/case_0.npz", probabilities=2 * predict(0))


def broken(root: Path) -> None:
    (root / RUN / "fold_0/validation/case_0.npz").write_bytes(b"PK")


def no_splits(root: Path) -> None:
    (root / "preprocessed" / data.NAME / "splits_final.json").unlink()


def no_fold_of_a_case(root: Path) -> None:
    path = root / "preprocessed" / data.NAME / "splits_final.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:4]))


def no_plans(root: Path) -> None:
    (root / "preprocessed" / data.NAME / "nnUNetPlans.json").unlink()


def not_preprocessed(root: Path) -> None:
    (root / "preprocessed" / data.NAME / "nnUNetPlans_3d_fullres").rename(root / "gone")


def regions(root: Path) -> None:
    path = root / "preprocessed" / data.NAME / "dataset.json"
    content = json.loads(path.read_text())
    content.update(labels={"background": 0, "all": [1, 2], "core": 2}, regions_class_order=[1, 2])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_run, r"3d_fullres: no such folder; train all folds with nnUNetv2_train \.\.\. --npz, or give --run"),
        (no_npz, r"no probabilities of the validation cases of fold_2, fold_4, as case_2\.npz; run nnUNetv2_train"),
        (other_key, r"case_1\.npz: has no key 'probabilities', but softmax"),
        (
            other_classes,
            r"case_1\.npz: probabilities of shape \[2, 12, 20, 22\], but case_1 has 3 classes and an image",
        ),
        (other_shape, r"case_1\.npz: probabilities of shape \[3, 11, 20, 21\], .* image of \[12, 20, 22\]"),
        (no_probabilities, r"case_0\.npz: probabilities of all classes, which sum to 1"),
        (broken, r"case_0\.npz: not a readable NumPy \.npz file"),
        (no_splits, r"splits_final\.json: not found; nnU-Net writes it"),
        (no_fold_of_a_case, r"splits_final\.json: no fold holds out case_4"),
        (no_plans, r"nnUNetPlans\.json: not found; run nnUNetv2_plan_and_preprocess"),
        (not_preprocessed, r"holds no preprocessed case; run nnUNetv2_preprocess -c 3d_fullres"),
        (regions, "has regions, which may overlap"),
    ],
)
def test_wrong_input(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    """A sentence says what is wrong, and no soft labels are made."""
    folder = data.make_dataset(tmp_path)
    write_run(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CalsegError, match=message):
        make_soft_labels("1", "3d_fullres", SoftLabelConfig())
    assert not list((folder / SOFT).glob("*.b2nd"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1", "3d_lowres"], "no configuration '3d_lowres', but 3d_fullres, flat, 2d"),
        (["7", "3d_fullres"], "no data sets '7'; it holds Dataset001_Tiny"),
        (["Dataset002_Other", "3d_fullres"], "no data sets 'Dataset002_Other'"),
        (["1", "3d_fullres", "--alpha", "2"], "alpha must lie in [0, 1]; got 2.0"),
        (["1", "3d_fullres", "--maps", "nowhere"], "nowhere: has no case_0.nii.gz, case_1.nii.gz, case_2.nii.gz and 2"),
        (["1", "3d_fullres", "--maps", "a", "--run", "b"], "--run and --maps exclude each other"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    data.make_dataset(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["nnunet-soft-labels", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_variables_that_are_not_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value, message in ((None, "nnUNet_preprocessed is not set"), ("nowhere", "nowhere: no such folder")):
        if value is None:
            monkeypatch.delenv("nnUNet_preprocessed")
        else:
            monkeypatch.setenv("nnUNet_preprocessed", value)
        with pytest.raises(SystemExit):
            main(["nnunet-soft-labels", "1", "3d_fullres"])
        assert message in capsys.readouterr().err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.make_dataset(tmp_path)
    write_run(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["nnunet-soft-labels", "1", "3d_fullres"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("soft labels of 5 cases, alpha 0.4, temperature 1.")
    assert "nnUNetv2_train 1 3d_fullres FOLD -tr nnUNetTrainerSoftLabels" in out
    with pytest.raises(SystemExit) as caught:
        main(["nnunet-path"])
    assert caught.value.code == 0
    assert [path.name for path in Path(capsys.readouterr().out.strip()).glob("*.py")]
