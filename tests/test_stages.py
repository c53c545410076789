"""CALSeg's two stages: the networks, the estimate by its formula, cross-fitting, soft labels on disk, resumption."""

from __future__ import annotations

import doctest
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

from calseg import nets, stages, training  # noqa: E402
from calseg.data import (  # noqa: E402
    IGNORE_INDEX,
    CaseCache,
    DataError,
    LoadedCase,
    PatchSampler,
    find_cases,
    read_soft_labels,
    soft_labels_file,
)
from calseg.demo import DemoConfig, make_dataset  # noqa: E402
from calseg.nets import StageOneNet, build_stage_one  # noqa: E402
from calseg.training import CasesInterruptedError, RunInterruptedError, TrainConfig, TrainingError, load_checkpoint  # noqa: E402

TINY = TrainConfig(
    method="calseg",
    iterations=4,
    patch_size=(16, 16, 8),
    val_fraction=0.34,
    num_samples=3,
    folds=2,
    alpha=0.4,
    temperature=1.0,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, DemoConfig(cases=6, raters=2, side=16))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    stages.train(data, folder, TINY)
    return folder


def batch(dims: int, *, classes: int = 3, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, channels, *(16,) * dims, generator=generator)
    label = torch.randint(0, classes, (2, *(16,) * dims), generator=generator, dtype=torch.int16)
    label[0, :3] = IGNORE_INDEX
    return image, label


# ------------------------------------------------------------------------------------------ the networks


@pytest.mark.parametrize("dims", [2, 3])
def test_estimate_is_the_mean_of_the_decoded_codes(dims: int) -> None:
    net = build_stage_one(2, 3, spatial_dims=dims, latent_size=5, seed=0).eval()
    image, label = batch(dims)
    soft = net.estimate_soft_labels(
        image, label, num_samples=6, temperature=1.7, alpha=0.3, generator=torch.Generator().manual_seed(7)
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        draws = [net(image, label, torch.randn(2, 5, generator=generator)) for _ in range(6)]
    estimate = torch.stack([torch.softmax(draw.logits.double() / 1.7, 1) for draw in draws]).mean(0)
    valid = (label != IGNORE_INDEX)[:, None]
    onehot = torch.zeros_like(estimate).scatter_(1, label.clamp(min=0).long()[:, None], 1.0)
    torch.testing.assert_close(soft.double(), (0.7 * onehot + 0.3 * estimate) * valid, atol=2e-6, rtol=0)
    # The code reaches the prediction, and the posterior depends on the label.
    assert float((draws[0].logits - draws[1].logits).abs().max()) > 1e-3
    assert draws[0].mu.shape == (2, 5)
    assert not torch.allclose(net.encode(image, label)[0], net.encode(image, label * 0)[0])
    assert draws[0].image.shape == image.shape


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
    """A code alone must move the mean of a decoder's maps: a norm per channel in it would undo that."""
    net = build_stage_one(1, 2, spatial_dims=2, latent_size=3, seed=0).eval()
    features = torch.randn(1, nets.FEATURES[0], 8, 8)
    with torch.no_grad():
        low, high = (net.segment(net._with_code(features, torch.full((1, 3), z))) for z in (-3.0, 3.0))
    assert float((high - low).mean((0, 2, 3)).abs().max()) > 0.1


def test_stage_one_loss_is_its_formula_and_ignores_padding() -> None:
    net = build_stage_one(2, 3, spatial_dims=2, latent_size=4, seed=0)
    image, label = batch(2)
    settings = replace(TINY, patch_size=(16, 16, 1), beta=0.3, reconstruction=0.7)
    loss = stages._loss_of(net, settings)(training.Patches(image, label, None), 5)
    generator = torch.Generator().manual_seed(training.noise_seed(settings.seed, 5, 0))
    logits, again, mu, logvar = net(image, label, torch.randn(2, 4, generator=generator))
    valid = label != IGNORE_INDEX
    nll = torch.nn.functional.cross_entropy(logits, label.long(), ignore_index=IGNORE_INDEX)
    error = (again - image).square().mean(1)[valid].mean()
    kl = 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(1).mean()
    torch.testing.assert_close(loss, nll + 0.7 * error + 0.3 * kl)
    loss.backward()
    assert all(weights.grad is not None for weights in net.parameters())


def test_stage_one_docstring() -> None:
    examples = doctest.DocTestFinder(recurse=False).find(StageOneNet, "StageOneNet", globs={})
    report: list[str] = []
    assert doctest.DocTestRunner().run(examples[0], out=report.append).failed == 0, "".join(report)


# ------------------------------------------------------------------------------------ estimates of volumes


class Local(StageOneNet):
    """A decoder that depends on its own voxel only and on no code, so that windows cannot matter."""

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
    soft = stages.estimate_case(Local(), LoadedCase("a", image, label, nothing, nothing), TINY)
    p = 1 / (1 + np.exp(-image[0]))
    expected = np.stack([p, 1 - p]) * (label != IGNORE_INDEX)
    torch.testing.assert_close(soft, torch.from_numpy(expected), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------- whole runs


def test_every_case_is_estimated_by_networks_that_did_not_see_it(data: Path, run: Path) -> None:
    names = training.read_json(run / "split.json")["training"]
    folds = stages.split_folds(names, 2, 0)
    assert sorted(name for members in folds for name in members) == names
    for number, members in enumerate(folds):
        split = training.read_json(run / "stage1" / f"fold_{number}" / "split.json")
        assert split["validation"] == members
        assert sorted(split["training"] + members) == names
    dataset = find_cases(data)
    cache = CaseCache(dataset)
    for number, members in enumerate(folds):
        net = build_stage_one(1, 3, latent_size=4, seed=0)
        net.load_state_dict(load_checkpoint(run / "stage1" / f"fold_{number}" / "checkpoint.pt")["model"])
        for name in members:
            case = cache.get(name)
            estimate = stages.estimate_case(net, case, TINY).numpy()
            expected = 0.6 * (case.label == np.arange(3)[:, None, None, None]) + 0.4 * estimate
            soft = read_soft_labels(run / "soft_labels" / f"{name}.nii.gz", case.label, 3)
            np.testing.assert_allclose(soft, expected, atol=2e-5)
    assert sorted(path.name for path in (run / "soft_labels").iterdir()) == [f"{name}.nii.gz" for name in names]


def test_a_single_fold_sees_every_case(data: Path, tmp_path: Path) -> None:
    summary = stages.estimate(data, tmp_path, replace(TINY, iterations=1, folds=1))
    split = training.read_json(tmp_path / "stage1" / "fold_0" / "split.json")
    assert split["training"] == split["validation"] == summary["names"]
    assert len(summary["names"]) == 6  # no validation split where soft labels are all that is wanted
    assert set(summary["cases"]) == set(summary["names"])
    assert stages.split_folds(["a", "b"], 4, 0) in ([["a"], ["b"]], [["b"], ["a"]])


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
            stages.train(data, broken, TINY, resume=broken.exists(), progress=stop_at(*where))
    torch.manual_seed(3)
    metrics = stages.train(data, broken, TINY, resume=True)
    whole = training.read_json(run / "metrics.json")
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
from calseg import cli

replace, maps = os.replace, 0

def stop_at_the_second_map(source, target):
    global maps
    maps += Path(target).parent.name == "soft_labels"
    if maps == 2:
        os.kill(os.getpid(), int(sys.argv[1]))  # 0 does nothing
    replace(source, target)

os.replace = stop_at_the_second_map
cli.main(sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_soft_labels_stopped_while_a_map_is_written(data: Path, tmp_path: Path, name: str) -> None:
    """Whole maps stay as they are, no partial file bears a map's name, and all ends as if nothing had happened."""
    number = int(getattr(signal, name))

    def soft_labels(number: int, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["soft-labels", str(data), "--out", str(tmp_path / "maps"), "--threads", "1", *words]
        return subprocess.run([sys.executable, "-c", STOPPED, str(number), *command], capture_output=True, text=True)

    config = replace(TINY, iterations=2, num_samples=2)
    sides = map(str, config.patch_size)
    stopped = soft_labels(
        number, "--patch-size", *sides, "--iterations", "2", "--folds", "2", "--num-samples", "2", "--alpha", "0.4",
        "--temperature", "1",
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
    stages.estimate(data, tmp_path / "whole", config)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "soft_labels").iterdir()}
    assert len(whole) == 6
    assert {path.name: path.read_bytes() for path in maps.iterdir()} == whole
    assert not list((tmp_path / "maps").rglob(".*"))


def test_finished_stage_is_not_run_again(data: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_step", lambda *arguments: pytest.fail("trained again"))
    before = (run / "soft_labels.json").read_bytes()
    stages.train(data, run, TINY, resume=True)
    assert (run / "soft_labels.json").read_bytes() == before


def test_networks_serve_other_estimates(data: Path, run: Path, tmp_path: Path) -> None:
    names = training.read_json(run / "split.json")["training"]
    settings = replace(TINY, alpha=1.0, temperature=3.0, num_samples=2)
    stages.estimate(data, tmp_path, settings, names=names, networks=run)
    assert not list(tmp_path.glob("stage1/**/checkpoint.pt"))
    label = CaseCache(find_cases(data)).get(names[0]).label
    sharp, soft = (read_soft_labels(f / "soft_labels" / f"{names[0]}.nii.gz", label, 3) for f in (run, tmp_path))
    assert soft.max(0).mean() < sharp.max(0).mean()
    for changes, message in (({"beta": 0.5}, "beta is 0.5 but was"), ({"folds": 3}, "folds is 3 but was 2")):
        with pytest.raises(TrainingError, match=message):
            stages.estimate(data, tmp_path / "a", replace(TINY, **changes), names=names, networks=run, overwrite=True)
    with pytest.raises(TrainingError, match="there is no first stage of these folds"):
        stages.estimate(data, tmp_path / "b", TINY, names=names, networks=data)


def test_temperature_is_fitted_to_cases_that_were_not_seen(data: Path, run: Path, tmp_path: Path) -> None:
    names = training.read_json(run / "split.json")["training"]
    settings = replace(TINY, alpha=1.0, temperature=None)
    summary = stages.estimate(data, tmp_path / "fitted", settings, names=names, networks=run)

    def nll(temperature: float, folder: str) -> float:
        """Over all labelled voxels, of the soft labels at a temperature."""
        fixed = replace(settings, temperature=temperature)
        stages.estimate(data, tmp_path / folder, fixed, names=names, networks=run)
        total, voxels = 0.0, 0
        cache = CaseCache(find_cases(data))
        for name in names:
            label = cache.get(name).label
            soft = read_soft_labels(tmp_path / folder / "soft_labels" / f"{name}.nii.gz", label, 3)
            own = np.take_along_axis(soft, label[None].astype(np.int64), 0)
            total, voxels = total - float(np.log(own).sum()), voxels + own.size
        return total / voxels

    best = summary["temperature"]
    assert 0.01 < best < 100
    assert nll(best, "same") < min(nll(best * 1.3, "above"), nll(best / 1.3, "below"))
    for name in names:
        ours, theirs = (tmp_path / folder / "soft_labels" / f"{name}.nii.gz" for folder in ("fitted", "same"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_soft_labels_from_elsewhere(data: Path, run: Path, tmp_path: Path) -> None:
    metrics = stages.train(data, tmp_path, TINY, soft_labels=run / "soft_labels")
    assert metrics["all"] == training.read_json(run / "metrics.json")["all"]
    assert not (tmp_path / "stage1").exists()
    with pytest.raises(TrainingError, match="soft labels go with the method calseg"):
        stages.train(data, tmp_path / "b", replace(TINY, method="svls"), soft_labels=run / "soft_labels")
    with pytest.raises(DataError, match=r"demo_00\d.nii.gz: not found"):
        stages.train(data, tmp_path / "c", TINY, soft_labels=tmp_path)


def test_runs_are_guarded(data: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not empty"):
        stages.train(data, run, TINY)
    with pytest.raises(TrainingError, match="there is no run to resume"):
        stages.train(data, tmp_path / "new", TINY, resume=True)
    with pytest.raises(TrainingError, match=r"temperature is 2\.0 but was 1\.0"):
        stages.train(data, run, replace(TINY, temperature=2.0), resume=True)


def test_slices_train_networks_of_two_dimensions(data: Path, tmp_path: Path) -> None:
    metrics = stages.train(data, tmp_path, replace(TINY, iterations=2, patch_size=(16, 16, 1)))
    weights = load_checkpoint(tmp_path / "checkpoint.pt")["model"]["logits.weight"]
    assert weights.shape == (3, 8, 1, 1)
    assert 0 < metrics["all"]["nll"] < 5
    assert len(list(tmp_path.glob("soft_labels/*.nii.gz"))) == 4


# ------------------------------------------------------------------------------------------- files


def test_soft_labels_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.ones(4), (5, 6, 7)).astype(np.float32)
    soft = np.moveaxis(soft, -1, 0)
    label = np.zeros((5, 6, 7), np.int16)
    label[0] = IGNORE_INDEX
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(label, affine), tmp_path / "label.nii.gz")
    path = tmp_path / "soft.nii.gz"
    path.write_bytes(soft_labels_file(soft, tmp_path / "label.nii.gz"))
    image = nibabel.load(path)
    assert image.shape == (5, 6, 7, 4)
    assert image.get_data_dtype() == np.uint16
    np.testing.assert_array_equal(image.affine, affine)
    np.testing.assert_allclose(np.moveaxis(image.get_fdata(), -1, 0), soft, atol=0.51 / 65535)
    read = read_soft_labels(path, label, 4)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[:, 1:].sum(0), 1, atol=1e-6)
    assert not read[:, 0].any()
    np.testing.assert_allclose(read[:, 1:], soft[:, 1:], atol=4 / 65535)

    for voxels, message in (
        (soft[:3], r"soft.nii.gz: soft labels of shape \(5, 6, 7, 3\)"),
        (soft * 0.5, "probabilities that sum to 1"),
        (soft - 0.3, "probabilities that sum to 1"),
        (np.where(soft > 0.5, np.nan, soft), "probabilities that sum to 1"),
    ):
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(voxels, 0, -1).astype(np.float32), affine), path)
        with pytest.raises(DataError, match=message):
            read_soft_labels(path, label, 4)


def test_patches_carry_their_soft_labels(data: Path, run: Path) -> None:
    names = training.read_json(run / "split.json")["training"]
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
