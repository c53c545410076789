"""Tests of the first stage: loss, cross-fitting, estimates of volumes, interruption, and reuse of networks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from test_nets import batch

import calseg
from calseg.files import read_json
from calseg.runs import CasesInterruptedError, RunInterruptedError
from calseg.simulation import DemoConfig, make_dataset
from calseg.training import TrainConfig, TrainingError, estimator, loop, stage_one, train
from calseg.training.checkpoint import load_checkpoint
from calseg.training.inference import predict_volume
from calseg.training.nets import StageOneNet, build_net, build_stage_one
from calseg.volumes.datasets import IGNORE_INDEX, find_cases
from calseg.volumes.nifti import DataError
from calseg.volumes.patches import CaseCache, LoadedCase, PatchSampler
from calseg.volumes.probabilities import read_soft_labels

TINY = TrainConfig(
    method="calseg",
    iterations=4,
    patch_size=(16, 16, 8),
    val_fraction=0.34,
    num_samples=3,
    folds=2,
    first_stage_share=1.0,
    alpha=0.4,
    temperature=1.0,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, DemoConfig(cases=6, raters=2, side=16))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stage_one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(data, folder, TINY)
    return folder


# ---------------------------------------------------------------------------------------------- the loss


def test_stage_one_loss_is_its_formula_and_ignores_padding() -> None:
    net = build_stage_one(2, 3, spatial_dims=2, latent_size=4, seed=0)
    image, label = batch(2)
    settings = replace(TINY, patch_size=(16, 16, 1), beta=0.3, reconstruction=0.7)
    loss = estimator.estimator_loss(net, settings)(loop.Patches(image, label, None), 5)
    generator = torch.Generator().manual_seed(loop.noise_seed(settings.seed, 5, 0))
    logits, again, mu, logvar = net(image, label, torch.randn(2, 4, generator=generator))
    valid = label != IGNORE_INDEX
    nll = torch.nn.functional.cross_entropy(logits, label.long(), ignore_index=IGNORE_INDEX)
    error = (again - image).square().mean(1)[valid].mean()
    kl = 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(1).mean()
    p, onehot = logits.softmax(1).movedim(1, -1)[valid], torch.nn.functional.one_hot(label[valid].long(), 3)
    both, apart = (p + onehot).sum(0), (p - onehot).abs().sum(0)
    dice = 1 - ((both - apart + 1e-5) / (both + 1e-5))[1:].mean()
    torch.testing.assert_close(loss, nll + settings.dice_weight * dice + 0.7 * error + 0.3 * kl)
    loss.backward()
    assert all(weights.grad is not None for weights in net.parameters())


# ------------------------------------------------------------------------------------ estimates of volumes


class Local(StageOneNet):
    """A decoder that depends only on its own voxel and not on the code, so that windows have no influence."""

    def __init__(self) -> None:
        super().__init__(1, 2, latent_size=2)

    def estimate_soft_labels(self, image: torch.Tensor, label: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["alpha"] == 1.0
        known = (label != IGNORE_INDEX)[:, None]
        return torch.cat([torch.sigmoid(image), torch.sigmoid(-image)], 1) * known


@pytest.mark.parametrize("shape", [(20, 33, 9), (5, 6, 7)])
def test_volumes_of_any_shape_are_estimated_in_place(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, *shape)).astype(np.float32)
    label = rng.integers(0, 2, shape).astype(np.int16)
    label[:2] = IGNORE_INDEX
    nothing = np.empty(0, np.int64)
    soft = estimator.estimate_case(Local(), LoadedCase("a", image, label, nothing, nothing), TINY)
    p = 1 / (1 + np.exp(-image[0]))
    expected = np.stack([p, 1 - p]) * (label != IGNORE_INDEX)
    torch.testing.assert_close(soft, torch.from_numpy(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["posterior", "prior", "network"])
def test_estimates_of_every_source(source: str) -> None:
    """Each by its formula, for a volume of the size of one window."""
    settings = replace(TINY, estimator=source, temperature=1.7)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, *TINY.patch_size)).astype(np.float32)
    label = rng.integers(0, 3, TINY.patch_size).astype(np.int16)
    label[:2] = IGNORE_INDEX
    nothing = np.empty(0, np.int64)
    case = LoadedCase("a", image, label, nothing, nothing)
    x, y = torch.from_numpy(image)[None], torch.from_numpy(label)[None]
    counted = (y != IGNORE_INDEX)[:, None]
    if source == "network":
        net = build_net(1, 3, seed=0).eval()
        with torch.no_grad():
            expected = torch.softmax(net(x).logits / 1.7, 1) * counted
        other = replace(case, label=2 - np.clip(case.label, 0, 2))
        again = estimator.estimate_case(net, other, settings)
        torch.testing.assert_close(again[:, 2:], expected[0, :, 2:])  # the label has no influence
    else:
        net = build_stage_one(1, 3, latent_size=4, seed=0).eval()
        seed = int.from_bytes(hashlib.sha256(b"a").digest()[:4], "big")
        generator = torch.Generator().manual_seed(loop.noise_seed(settings.seed, seed, 3))
        first, second = torch.randn(1, 4, generator=generator), torch.randn(1, 4, generator=generator)
        with torch.no_grad():
            mu, logvar = net.encode(x, y)
            if source == "prior":
                mu, logvar = torch.zeros(1, 4), torch.zeros(1, 4)
            codes = [mu + sign * (logvar / 2).exp() * noise for sign, noise in ((1, first), (-1, first), (1, second))]
            maps = [
                net.segment(torch.cat([net.trunk(x), code.view(1, 4, 1, 1, 1).expand(-1, -1, *TINY.patch_size)], 1))
                for code in codes
            ]
        expected = torch.stack([torch.softmax(each / 1.7, 1) for each in maps]).mean(0) * counted
    torch.testing.assert_close(estimator.estimate_case(net, case, settings), expected[0], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- whole runs


def test_every_case_is_estimated_by_networks_that_did_not_see_it(data: Path, run: Path) -> None:
    names = read_json(run / "split.json")["training"]
    folds = stage_one.split_folds(names, 2, 0)
    assert sorted(name for members in folds for name in members) == names
    for number, members in enumerate(folds):
        split = read_json(run / "stage1" / f"fold_{number}" / "split.json")
        assert split["validation"] == members
        assert sorted(split["training"] + members) == names
    dataset = find_cases(data)
    cache = CaseCache(dataset)
    for number, members in enumerate(folds):
        net = build_stage_one(1, 3, latent_size=4, seed=0)
        net.load_state_dict(load_checkpoint(run / "stage1" / f"fold_{number}" / "checkpoint.pt")["model"])
        for name in members:
            case = cache.get(name)
            estimate = estimator.estimate_case(net, case, TINY).numpy()
            expected = 0.6 * (case.label == np.arange(3)[:, None, None, None]) + 0.4 * estimate
            soft = read_soft_labels(run / "soft_labels" / f"{name}.nii.gz", case.label, 3)
            np.testing.assert_allclose(soft, expected, atol=2e-5)
    assert sorted(path.name for path in (run / "soft_labels").iterdir()) == [f"{name}.nii.gz" for name in names]


def test_a_single_fold_sees_every_case(data: Path, tmp_path: Path) -> None:
    summary = stage_one.estimate(data, tmp_path, replace(TINY, iterations=1, folds=1))
    split = read_json(tmp_path / "stage1" / "fold_0" / "split.json")
    assert split["training"] == split["validation"] == summary["names"]
    assert len(summary["names"]) == 6  # no validation split where soft labels are all that is wanted
    assert set(summary["cases"]) == set(summary["names"])
    assert stage_one.split_folds(["a", "b"], 4, 0) in ([["a"], ["b"]], [["b"], ["a"]])


def test_networks_of_the_first_stage_get_their_share_of_the_updates(data: Path, tmp_path: Path) -> None:
    """A quarter of 8 updates gives the same networks as 2 updates, and the network to deploy still gets all."""
    settings = replace(TINY, folds=1, num_samples=1)
    train(data, tmp_path / "quarter", replace(settings, iterations=8, first_stage_share=0.25))
    train(data, tmp_path / "two", replace(settings, iterations=2))
    quarter, two = (load_checkpoint(tmp_path / run / "stage1/fold_0/checkpoint.pt") for run in ("quarter", "two"))
    assert quarter["iteration"] == two["iteration"] == 2
    assert quarter["model"].keys() == two["model"].keys()
    assert all(torch.equal(weight, two["model"][name]) for name, weight in quarter["model"].items())
    assert load_checkpoint(tmp_path / "quarter/checkpoint.pt")["iteration"] == 8


def test_interrupted_run_ends_bit_for_bit_like_a_whole_one(data: Path, run: Path, tmp_path: Path) -> None:
    def stop_at(stage: str, done: int, time: int = 1) -> Any:
        left = time

        def progress(now: str, count: int, total: int, loss: float | None) -> None:
            nonlocal left
            left -= (now, count) == (stage, done)
            if left == 0:
                left = -1
                os.kill(os.getpid(), signal.SIGINT)

        return progress

    broken = tmp_path / "broken"
    for error, *where in (
        (CasesInterruptedError, "read", 1),
        (RunInterruptedError, "fold 1/2", 2),
        (RunInterruptedError, "fold 1/2", 4),  # after the last update of the fold
        (CasesInterruptedError, "read", 2, 2),  # between the folds, before the second has a checkpoint
        (RunInterruptedError, "fold 2/2", 3),
        (CasesInterruptedError, "soft labels", 1),
        (RunInterruptedError, "train", 2),
    ):
        with pytest.raises(error):
            train(data, broken, TINY, resume=broken.exists(), progress=stop_at(*where))
    torch.manual_seed(3)
    metrics = train(data, broken, TINY, resume=True)
    whole = read_json(run / "metrics.json")
    for key in ("all", "foreground", "dice", "cases", "soft_labels"):
        assert metrics[key] == whole[key]
    for path in sorted(run.glob("soft_labels/*")):
        assert path.read_bytes() == (broken / "soft_labels" / path.name).read_bytes()
    for name in ("checkpoint.pt", "stage1/fold_0/checkpoint.pt", "stage1/fold_1/checkpoint.pt"):
        ours, theirs = (load_checkpoint(folder / name)["model"] for folder in (broken, run))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(broken.glob("**/.*"))


STOPPED = """
import os, sys
from pathlib import Path
from calseg.cli.main import main

replace, maps = os.replace, 0

def stop_at_the_second_map(source, target):
    global maps
    maps += Path(target).parent.name == "soft_labels"
    if maps == 2:
        os.kill(os.getpid(), int(sys.argv[1]))  # 0 does nothing
    replace(source, target)

os.replace = stop_at_the_second_map
main(sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_soft_labels_stopped_while_a_map_is_written(data: Path, tmp_path: Path, name: str) -> None:
    """After an interruption, complete maps stay, no incomplete map exists, and the end result is the same."""
    number = int(getattr(signal, name))

    def soft_labels(number: int, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["soft-labels", str(data), "--out", str(tmp_path / "maps"), "--threads", "1", *words]
        return subprocess.run([sys.executable, "-c", STOPPED, str(number), *command], capture_output=True, text=True)

    config = replace(TINY, iterations=2, num_samples=2)
    sides = map(str, config.patch_size)
    stopped = soft_labels(
        number, "--patch-size", *sides, "--iterations", "2", "--first-stage-share", "1", "--folds", "2",
        "--num-samples", "2", "--alpha", "0.4", "--temperature", "1",
    )  # fmt: skip
    assert stopped.returncode == (130 if name == "SIGINT" else -number), stopped.stderr
    if name == "SIGINT":
        assert "interrupted after 1 of 6 cases" in stopped.stderr
        assert stopped.stderr.rstrip().endswith("--resume")
    maps = tmp_path / "maps" / "soft_labels"
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in maps.glob("*.nii.gz")}
    assert len(kept) == 1
    resumed = soft_labels(0, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == before for path, before in kept.items())
    stage_one.estimate(data, tmp_path / "whole", config)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "soft_labels").iterdir()}
    assert len(whole) == 6
    assert {path.name: path.read_bytes() for path in maps.iterdir()} == whole
    assert not list((tmp_path / "maps").rglob(".*"))


def test_finished_stage_is_not_run_again(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_step", lambda *arguments: pytest.fail("trained again"))
    before = (run / "soft_labels.json").read_bytes()
    train(data, run, TINY, resume=True)
    assert (run / "soft_labels.json").read_bytes() == before


def test_networks_serve_other_estimates(data: Path, run: Path, tmp_path: Path) -> None:
    names = read_json(run / "split.json")["training"]
    settings = replace(TINY, alpha=1.0, temperature=3.0, num_samples=2)
    stage_one.estimate(data, tmp_path, settings, names=names, networks=run)
    assert not list(tmp_path.glob("stage1/**/checkpoint.pt"))
    label = CaseCache(find_cases(data)).get(names[0]).label
    sharp, soft = (read_soft_labels(f / "soft_labels" / f"{names[0]}.nii.gz", label, 3) for f in (run, tmp_path))
    assert soft.max(0).mean() < sharp.max(0).mean()
    for changes, message in (({"beta": 0.5}, "beta is 0.5 but was"), ({"folds": 3}, "folds is 3 but was 2")):
        with pytest.raises(TrainingError, match=message):
            stage_one.estimate(
                data, tmp_path / "a", replace(TINY, **changes), names=names, networks=run, overwrite=True
            )
    with pytest.raises(TrainingError, match="there is no first stage of these folds"):
        stage_one.estimate(data, tmp_path / "b", TINY, names=names, networks=data)


def test_networks_of_the_posterior_serve_codes_of_the_prior(data: Path, run: Path, tmp_path: Path) -> None:
    names = read_json(run / "split.json")["training"]
    stage_one.estimate(data, tmp_path / "a", replace(TINY, estimator="prior"), names=names, networks=run)
    ours, theirs = ((f / "soft_labels" / f"{names[0]}.nii.gz").read_bytes() for f in (tmp_path / "a", run))
    assert ours != theirs
    with pytest.raises(TrainingError, match="estimator is 'network' but was 'posterior'"):
        stage_one.estimate(data, tmp_path / "b", replace(TINY, estimator="network"), names=names, networks=run)


def test_plain_networks_make_soft_labels(data: Path, tmp_path: Path) -> None:
    """They come from networks that did not see the case, and a run resumes with them."""
    settings = replace(TINY, estimator="network", dice_weight=1.0, temperature=None)

    def stop(stage: str, done: int, total: int, loss: float | None) -> None:
        if (stage, done) == ("fold 2/2", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunInterruptedError):
        train(data, tmp_path, settings, progress=stop)
    metrics = train(data, tmp_path, settings, resume=True)
    assert 0 < metrics["soft_labels"]["nll"] < 5
    summary = read_json(tmp_path / "soft_labels.json")
    cache = CaseCache(find_cases(data))
    for number, members in enumerate(stage_one.split_folds(summary["names"], 2, 0)):
        net = build_net(1, 3, seed=0)
        net.load_state_dict(load_checkpoint(tmp_path / "stage1" / f"fold_{number}" / "checkpoint.pt")["model"])
        for name in members:
            case = cache.get(name)
            logits = predict_volume(net.eval(), case.image, TINY.patch_size)
            estimate = torch.softmax(logits / summary["temperature"], 0).numpy()
            expected = 0.6 * (case.label == np.arange(3)[:, None, None, None]) + 0.4 * estimate
            soft = read_soft_labels(tmp_path / "soft_labels" / f"{name}.nii.gz", case.label, 3)
            np.testing.assert_allclose(soft, expected, atol=2e-5)


def test_networks_of_other_files_or_unfinished_ones_do_not_serve(data: Path, run: Path, tmp_path: Path) -> None:
    """And nothing is written into the folder of the other run."""
    names = read_json(run / "split.json")["training"]
    other, part = tmp_path / "other", tmp_path / "part"
    shutil.copytree(data, other)
    image = nibabel.load(other / "imagesTr" / f"{names[0]}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32)[::-1], image.affine), image.get_filename())
    message = rf"its networks do not serve; \S*imagesTr.{names[0]}.nii.gz changed since their training"
    with pytest.raises(TrainingError, match=message):
        stage_one.estimate(other, tmp_path / "a", TINY, names=names, networks=run)

    def stop(stage: str, done: int, total: int, loss: float | None) -> None:
        if (stage, done) == ("fold 2/2", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunInterruptedError):
        stage_one.estimate(data, part, TINY, names=names, progress=stop)
    before = {path: path.read_bytes() for path in part.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match=r"fold_1.checkpoint.pt: its training has not ended \(iteration 2 of 4\)"):
        stage_one.estimate(data, tmp_path / "b", TINY, names=names, networks=part)
    assert {path: path.read_bytes() for path in part.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_resume_refuses_soft_labels_that_changed(data: Path, run: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    shutil.copytree(run / "soft_labels", maps)

    def stop(stage: str, done: int, total: int, loss: float | None) -> None:
        if (stage, done) == ("train", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunInterruptedError):
        train(data, tmp_path / "run", TINY, soft_labels=maps, progress=stop)
    changed = sorted(maps.iterdir())[1]
    image = nibabel.load(changed)
    flipped = nibabel.Nifti1Image(np.asarray(image.dataobj.get_unscaled())[::-1], image.affine)
    flipped.header.set_slope_inter(1 / 65535, 0)
    nibabel.save(flipped, changed)
    with pytest.raises(TrainingError, match=rf"cannot be resumed; \S*maps.{changed.name} changed since$"):
        train(data, tmp_path / "run", TINY, soft_labels=maps, resume=True)


def test_soft_labels_that_a_user_added_stay(data: Path, tmp_path: Path) -> None:
    settings = replace(TINY, iterations=1, folds=1, num_samples=1)
    stage_one.estimate(data, tmp_path, settings, names=["demo_000", "demo_001"])
    added = ("soft_labels/mine.nii.gz", "stage1/fold_0/mine.json", "stage1/fold_9/checkpoint.pt", "checkpoint.pt")
    for name in added:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    stage_one.estimate(data, tmp_path, settings, names=["demo_002"], overwrite=True)
    assert [(tmp_path / name).read_text() for name in added] == ["mine"] * 4
    assert sorted(path.name for path in (tmp_path / "soft_labels").iterdir()) == ["demo_002.nii.gz", "mine.nii.gz"]
    with pytest.raises(TrainingError, match=r"holds a run of calseg soft-labels; move it, or give another"):
        train(data, tmp_path, TINY, overwrite=True)


def test_cases_that_the_data_lack_are_named(data: Path, tmp_path: Path) -> None:
    for names in (["demo_000", "nobody"], []):
        with pytest.raises(TrainingError, match=rf"names must be cases of .*; got {'nobody' if names else 'none'}"):
            stage_one.estimate(data, tmp_path / "a", TINY, names=names)
    assert not (tmp_path / "a").exists()


def test_temperature_is_fitted_to_cases_that_were_not_seen(data: Path, run: Path, tmp_path: Path) -> None:
    names = read_json(run / "split.json")["training"]
    settings = replace(TINY, alpha=1.0, temperature=None)
    summary = stage_one.estimate(data, tmp_path / "fitted", settings, names=names, networks=run)

    def nll(temperature: float, folder: str) -> float:
        """Return the NLL of the soft labels at a temperature, over the voxels near the foreground."""
        fixed = replace(settings, temperature=temperature)
        stage_one.estimate(data, tmp_path / folder, fixed, names=names, networks=run)
        total, voxels = 0.0, 0
        cache = CaseCache(find_cases(data))
        for name in names:
            label = cache.get(name).label
            soft = read_soft_labels(tmp_path / folder / "soft_labels" / f"{name}.nii.gz", label, 3)
            near = calseg.near_foreground(torch.from_numpy(label)[None])[0].numpy()
            own = np.take_along_axis(soft, label[None].astype(np.int64), 0)[0][near]
            total, voxels = total - float(np.log(own).sum()), voxels + own.size
        return total / voxels

    best = summary["temperature"]
    assert 0.01 < best < 100
    assert nll(best, "same") < min(nll(best * 1.3, "above"), nll(best / 1.3, "below"))
    for name in names:
        ours, theirs = (tmp_path / folder / "soft_labels" / f"{name}.nii.gz" for folder in ("fitted", "same"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_soft_labels_from_elsewhere(data: Path, run: Path, tmp_path: Path) -> None:
    metrics = train(data, tmp_path, TINY, soft_labels=run / "soft_labels")
    assert metrics["all"] == read_json(run / "metrics.json")["all"]
    assert not (tmp_path / "stage1").exists()
    with pytest.raises(TrainingError, match="soft labels go with the method calseg"):
        train(data, tmp_path / "b", replace(TINY, method="svls"), soft_labels=run / "soft_labels")
    with pytest.raises(DataError, match=r"demo_00\d.nii.gz: not found"):
        train(data, tmp_path / "c", TINY, soft_labels=run)


def test_runs_are_guarded(data: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not empty"):
        train(data, run, TINY)
    with pytest.raises(TrainingError, match="there is no run to resume"):
        train(data, tmp_path / "new", TINY, resume=True)
    with pytest.raises(TrainingError, match=r"temperature is 2\.0 but was 1\.0"):
        train(data, run, replace(TINY, temperature=2.0), resume=True)


def test_slices_train_networks_of_two_dimensions(data: Path, tmp_path: Path) -> None:
    metrics = train(data, tmp_path, replace(TINY, iterations=2, patch_size=(16, 16, 1)))
    weights = load_checkpoint(tmp_path / "checkpoint.pt")["model"]["logits.weight"]
    assert weights.shape == (3, 8, 1, 1)
    assert 0 < metrics["all"]["nll"] < 5
    assert len(list(tmp_path.glob("soft_labels/*.nii.gz"))) == 4


# ------------------------------------------------------------------------------------------- files


def test_patches_carry_their_soft_labels(data: Path, run: Path) -> None:
    names = read_json(run / "split.json")["training"]
    cache = CaseCache(find_cases(data), soft_labels={n: run / "soft_labels" / f"{n}.nii.gz" for n in names})
    sampler = PatchSampler(tuple(names), (24, 16, 8), 2, seed=0, flip_axes=(0, 1, 2))
    for iteration in range(5):
        _, label, soft = sampler.batch(cache, iteration)
        assert soft is not None
        assert soft.shape == (2, 3, 24, 16, 8)
        # With alpha 0.4 the label has at least 0.6 wherever there is one, and padding has nothing.
        own = np.take_along_axis(soft, np.maximum(label, 0)[:, None].astype(np.int64), 1)[:, 0]
        assert (own[label != IGNORE_INDEX] > 0.599).all()
        assert not soft.sum(1)[label == IGNORE_INDEX].any()
        assert (label == IGNORE_INDEX).any()


def test_summary_is_json(run: Path) -> None:
    summary = json.loads((run / "soft_labels.json").read_text())
    assert set(summary["estimate"]) == {"dice", "nll", "confidence", "accuracy"}
    for key, value in summary["estimate"].items():
        assert value == pytest.approx(np.mean([case[key] for case in summary["cases"].values()]))
    assert summary["config"]["alpha"] == 0.4
    assert json.loads((run / "metrics.json").read_text())["soft_labels"] == summary["estimate"]
