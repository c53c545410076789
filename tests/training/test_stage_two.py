"""Tests of whole runs: resumption with the same bits, run folder, interruption, and learning with every method."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from boxes import TINY, assert_same, config, stop_after

from calseg.methods import METHODS
from calseg.runs import STATE, RunInterruptedError
from calseg.training import TrainingError, train
from calseg.training.checkpoint import RUN_FILES, load_checkpoint, sealed
from calseg.volumes.nifti import DataError

# ------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("method", ["cross_entropy", "vls"])
def test_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(data: Path, tmp_path: Path, method: str) -> None:
    settings = config(method=method, flip_axes=(0, 1))
    whole = train(data, tmp_path / "whole", settings)
    broken = tmp_path / "broken"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RunInterruptedError, match="after iteration 2, which is saved") as caught:
        train(data, broken, settings, progress=stop_after(2))
    assert caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RunInterruptedError) as caught:
        train(data, broken, settings, resume=True, progress=stop_after(3, signal.SIGTERM))
    assert caught.value.code == 143
    torch.manual_seed(12345)  # no result may depend on the state of a global generator
    np.random.seed(1)
    resumed = train(data, broken, settings, resume=True)
    assert_same(load_checkpoint(tmp_path / "whole" / "checkpoint.pt"), load_checkpoint(broken / "checkpoint.pt"))
    assert_same(resumed, whole)
    stored = json.loads((broken / "metrics.json").read_text())
    assert_same(stored, json.loads(json.dumps(resumed)))
    assert stored["seconds"]["train"] > 0
    assert sorted(path.name for path in broken.iterdir()) == sorted((*RUN_FILES, STATE))


def test_crash_between_checkpoints_repeats_from_the_last(data: Path, tmp_path: Path) -> None:
    def crash(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage == "train" and done == 5:
            raise RuntimeError("power cut")

    whole = train(data, tmp_path / "whole", TINY)
    with pytest.raises(RuntimeError, match="power cut"):
        train(data, tmp_path / "broken", TINY, checkpoint_every=2, progress=crash)
    assert load_checkpoint(tmp_path / "broken" / "checkpoint.pt")["iteration"] == 4
    assert_same(train(data, tmp_path / "broken", TINY, resume=True), whole)


def test_seed_changes_the_run_and_not_the_split(data: Path, tmp_path: Path) -> None:
    runs = {}
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"split_seed": 4}}.items():
        train(data, tmp_path / name, config(iterations=2, **changes))
        runs[name] = load_checkpoint(tmp_path / name / "checkpoint.pt")
    assert_same(runs["a"], runs["b"])
    assert not torch.equal(runs["a"]["model"]["logits.weight"], runs["c"]["model"]["logits.weight"])
    assert runs["a"]["split"] == runs["c"]["split"]
    assert runs["a"]["split"] != runs["d"]["split"]
    assert json.loads((tmp_path / "a" / "split.json").read_text()) == runs["a"]["split"]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "calseg"])
def test_every_method_learns(data: Path, tmp_path: Path, method: str) -> None:
    metrics = train(data, tmp_path, config(method=method, iterations=60, patch_size=(16, 16, 16)))
    assert metrics["dice"]["low"] > 0.9
    assert metrics["dice"]["high"] > 0.9
    assert metrics["dice"]["absent"] is None
    if method in ("cross_entropy", "vls"):  # other methods avoid certainty, which is right here
        assert metrics["all"]["nll"] < 0.15
        assert metrics["all"]["ece"] < 0.1
    assert len(metrics["cases"]) == 2
    sizes = {"box_0": 14, "box_1": 15, "box_2": 16, "box_3": 17, "box_4": 18}
    assert metrics["voxels"]["all"] == sum(sizes[name] * 18 * 12 for name in metrics["cases"])
    assert metrics["voxels"]["foreground"] == 2 * 7 * 11 * 6


# ---------------------------------------------------------------------------------------- run folder


def test_folder_in_use_is_refused_and_foreign_files_survive(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    settings = config(iterations=1)
    with pytest.raises(TrainingError, match=r"run: not empty and without a run; give --overwrite to add"):
        train(data, run, settings)
    with pytest.raises(TrainingError, match=r"calseg.json: not found; there is no run to resume"):
        train(data, run, settings, resume=True)
    with pytest.raises(TrainingError, match="exclude each other"):
        train(data, run, settings, resume=True, overwrite=True)
    (run / "metrics.json").write_text("mine")
    with pytest.raises(TrainingError, match=r"metrics.json: was not written by this run, and is not replaced"):
        train(data, run, settings, overwrite=True)
    assert (run / "metrics.json").read_text() == "mine"
    (run / "metrics.json").unlink()
    train(data, run, settings, overwrite=True)
    with pytest.raises(TrainingError, match=r"run: not empty; give --resume .* or --overwrite"):
        train(data, run, settings)
    train(data, run, config(iterations=2), overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert json.loads((run / "metrics.json").read_text())["iterations"] == 2
    with pytest.raises(TrainingError, match=r"notes.txt: exists and is not a folder"):
        train(data, run / "notes.txt", settings)


def test_resume_refuses_what_differs(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, config(iterations=1))
    with pytest.raises(TrainingError, match=r"resumed with other settings: iterations is 2 but was 1; alpha is"):
        train(data, tmp_path, config(iterations=2, alpha=0.5), resume=True)
    checkpoint = tmp_path / "checkpoint.pt"
    content = load_checkpoint(checkpoint)
    for changes, message in (
        ({"classes": ["background", "other"]}, "the classes of DATA changed"),
        ({"split": {"training": [], "validation": []}}, "the split of DATA changed"),
        ({"format": 1}, "checkpoint format 1, but this version reads 3"),
        ({"model": {}}, "does not fit this version"),
    ):
        checkpoint.write_bytes(sealed({**content, **changes}))
        with pytest.raises(TrainingError, match=rf"checkpoint.pt: .*{message}"):
            train(data, tmp_path, config(iterations=1), resume=True)


def copied(data: Path, folder: Path) -> Path:
    """The data set in files that may be changed."""
    shutil.copytree(data, folder)
    return folder


def other_label(folder: Path) -> None:
    for number in (1, 4):
        path = folder / "labelsTr" / f"box_{number}.nii.gz"
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), path)


def other_image(folder: Path) -> None:
    path = folder / "imagesTr" / "box_3.nii.gz"
    image = nibabel.load(path)
    status = path.stat()
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32)[::-1], image.affine), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time alone says nothing


def other_ignore_label(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "labels": {**content["labels"], "4": "ignore"}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_image, r"cannot be resumed; \S*imagesTr.box_3.nii.gz changed since$"),
        (other_label, r"cannot be resumed; \S*labelsTr.box_\d.nii.gz, \S*labelsTr.box_\d.nii.gz changed since$"),
        (other_ignore_label, "cannot be resumed on other data: the ignore label of DATA changed since$"),
    ],
)
def test_resume_refuses_files_that_changed(data: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder, run = copied(data, tmp_path / "data"), tmp_path / "run"
    with pytest.raises(RunInterruptedError):
        train(folder, run, TINY, progress=stop_after(2))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    change(folder)
    with pytest.raises(TrainingError, match=message):
        train(folder, run, TINY, resume=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_resume_takes_data_that_moved(data: Path, tmp_path: Path) -> None:
    """A cluster copies the data to another place for every job, and their times are new ones."""
    with pytest.raises(RunInterruptedError):
        train(copied(data, tmp_path / "first"), tmp_path / "run", TINY, progress=stop_after(2))
    second = copied(tmp_path / "first", tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    for path in second.rglob("*.nii.gz"):
        os.utime(path)
    assert_same(train(second, tmp_path / "run", TINY, resume=True), train(data, tmp_path / "whole", TINY))


def test_results_do_not_go_where_inputs_are(data: Path, tmp_path: Path) -> None:
    folder = copied(data, tmp_path / "data")
    before = {path: path.read_bytes() for path in folder.rglob("*.nii.gz")}
    (tmp_path / "link").symlink_to(folder)
    for out, relation in (
        (folder, "is"),
        (folder / "imagesTr", "lies in"),
        (tmp_path / "link" / "labelsTr", "lies in"),
        (tmp_path, "contains"),
    ):
        with pytest.raises(TrainingError, match=f"the folder of the results {relation} the input"):
            train(folder, out, TINY, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*.nii.gz")} == before


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(data: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, loss: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", TINY, progress=stop)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with pytest.raises(TrainingError, match="give --resume to continue the run in it"):
        train(data, tmp_path / "run", TINY)
    assert_same(train(data, tmp_path / "run", TINY, resume=True), train(data, tmp_path / "whole", TINY))


def test_a_second_run_in_the_folder_is_refused(data: Path, tmp_path: Path) -> None:
    def second(stage: str, done: int, total: int, loss: float | None) -> None:
        if (stage, done) == ("train", 2):
            with pytest.raises(TrainingError, match=rf"process {os.getpid()} on \S+ is at work in this folder"):
                train(data, tmp_path, TINY, resume=True)

    train(data, tmp_path, TINY, progress=second)


@pytest.mark.parametrize("damage", ["truncated", "text", "foreign"])
def test_corrupt_checkpoint_is_named(data: Path, tmp_path: Path, damage: str) -> None:
    train(data, tmp_path, config(iterations=1))
    checkpoint = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    elif damage == "text":
        checkpoint.write_text("hello")
    else:
        torch.save({"state": torch.zeros(1)}, checkpoint)
    with pytest.raises(TrainingError, match=r"checkpoint.pt: .*not a checkpoint of calseg"):
        train(data, tmp_path, config(iterations=1), resume=True)


def test_full_disk_keeps_the_previous_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(data, tmp_path / "whole", TINY)
    run = tmp_path / "run"
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if (run / "checkpoint.pt").exists() and load_checkpoint(run / "checkpoint.pt")["iteration"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"checkpoint.pt: .*No space left on device.*previous one is kept"):
        train(data, run, TINY, checkpoint_every=2)
    monkeypatch.undo()
    assert load_checkpoint(run / "checkpoint.pt")["iteration"] == 2
    assert not list(run.glob(".*"))
    assert_same(train(data, run, TINY, resume=True), whole)


def test_bad_case_stops_the_run_before_training(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "labelsTr").unlink()
    (folder / "labelsTr").mkdir()
    for path in (data / "labelsTr").iterdir():
        (folder / "labelsTr" / path.name).write_bytes(path.read_bytes()[: -10 if "3" in path.name else None])
    with pytest.raises(DataError, match=r"labelsTr/box_3.nii.gz: cannot be read"):
        train(
            folder,
            tmp_path / "run",
            TINY,
            progress=lambda stage, *rest: pytest.fail("trained") if stage == "train" else None,
        )


def test_unbounded_loss_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at iteration \d+"):
        train(data, tmp_path, config(learning_rate=1e30, iterations=20))


def test_unusable_device_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="device 'abacus' cannot be used"):
        train(data, tmp_path, TINY, device="abacus")
    assert not list(tmp_path.iterdir())
