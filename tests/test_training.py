"""The run folder, resumption bit for bit, the objective, the scores, and that both losses learn."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

from calseg import training  # noqa: E402
from calseg.data import IGNORE_INDEX, DataError, find_cases  # noqa: E402
from calseg.demo import DemoConfig, make_case, run_demo  # noqa: E402
from calseg.functional import vls_cross_entropy, vls_elbo  # noqa: E402
from calseg.nets import Output, build_net  # noqa: E402
from calseg.training import (  # noqa: E402
    METHODS,
    RunInterruptedError,
    Scores,
    TrainConfig,
    TrainingError,
    dice_per_class,
    learning_rate,
    load_checkpoint,
    noise_seed,
    objective,
    predict_volume,
    train,
)

TINY = TrainConfig(iterations=6, batch_size=2, patch_size=(16, 16, 8), val_fraction=0.4, num_samples=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five volumes with a bright box of class 1 or 2; class 3 never occurs."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    training_list = []
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    for index in range(5):
        shape = (14 + index, 18, 12)
        label = np.zeros(shape, np.uint8)
        label[3:10, 4:12, 3:9] = 1
        label[3:10, 12:15, 3:9] = 2
        image = (label * 2 + 0.3 * rng.standard_normal(shape)).astype(np.float32) * (index + 1) * 50
        for part, voxels in (("imagesTr", image), ("labelsTr", label)):
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / part / f"box_{index}.nii.gz")
        training_list.append({key: f"./{key}sTr/box_{index}.nii.gz" for key in ("image", "label")})
    labels = {"0": "background", "1": "low", "2": "high", "3": "absent"}
    (folder / "dataset.json").write_text(
        json.dumps({"name": "boxes", "modality": {"0": "MRI"}, "labels": labels, "training": training_list})
    )
    return folder


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY.__dict__, **changes})


def stop_after(iteration: int, number: int = signal.SIGINT) -> Any:
    def progress(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage == "train" and done == iteration:
            os.kill(os.getpid(), number)

    return progress


def assert_same(left: Any, right: Any) -> None:
    """Equal bit for bit, tensors included."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            if key != "seconds":
                assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


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
    assert sorted(path.name for path in broken.iterdir()) == sorted(training.RUN_FILES)


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
    if method in ("cross_entropy", "vls"):  # the others are drawn away from certainty, which is right here
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
    with pytest.raises(TrainingError, match=r"run: not empty; give --resume .* or --overwrite"):
        train(data, run, settings)
    with pytest.raises(TrainingError, match=r"checkpoint.pt: not found; there is no run to resume"):
        train(data, run, settings, resume=True)
    with pytest.raises(TrainingError, match="exclude each other"):
        train(data, run, settings, resume=True, overwrite=True)
    (run / "metrics.json").write_text("old")
    train(data, run, settings, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert json.loads((run / "metrics.json").read_text())["iterations"] == 1
    with pytest.raises(TrainingError, match=r"notes.txt: exists and is not a folder"):
        train(data, run / "notes.txt", settings)


def test_resume_refuses_what_differs(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, config(iterations=1))
    with pytest.raises(TrainingError, match=r"checkpoint.pt: .*other settings: iterations is 2 but was 1; alpha is"):
        train(data, tmp_path, config(iterations=2, alpha=0.5), resume=True)
    checkpoint = tmp_path / "checkpoint.pt"
    content = load_checkpoint(checkpoint)
    for changes, message in (
        ({"classes": ["background", "other"]}, "the classes of DATA changed"),
        ({"split": {}}, "the split of DATA changed"),
        ({"format": 1}, "checkpoint format 1, but this version reads 2"),
        ({"model": {}}, "does not fit this version"),
    ):
        torch.save({**content, **changes}, checkpoint)
        with pytest.raises(TrainingError, match=rf"checkpoint.pt: .*{message}"):
            train(data, tmp_path, config(iterations=1), resume=True)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dice"}, "method must be one of cross_entropy, .*, calseg; got 'dice'"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"val_fraction": 1.0}, "val_fraction must lie strictly"),
        ({"beta": -1.0}, "beta must be finite"),
        ({"gamma": 0.5}, "gamma must be 0 or at least 1"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"margin": math.nan}, "margin must be finite"),
        ({"folds": 0}, "folds must be at least 1"),
        ({"patch_size": (16, 12, 1)}, "two and 1 for slices"),
        ({"seed": -1}, "must not be negative"),
        ({"patch_size": (16, 16, 12)}, "multiples of 8"),
        ({"patch_size": (8, 8, 8)}, "enlarge a side"),
        ({"flip_axes": (3,)}, "flip_axes are among"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        config(**changes)


def test_unusable_device_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="device 'abacus' cannot be used"):
        train(data, tmp_path, TINY, device="abacus")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ objective


def random_output(classes: int = 3) -> tuple[Output, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, mu, logvar = torch.randn(3, 2, classes, 4, 5, 6, generator=generator).unbind()
    label = torch.randint(0, classes, (2, 4, 5, 6), generator=generator, dtype=torch.int16)
    label[0, :2] = IGNORE_INDEX
    return Output(logits.requires_grad_(), mu.requires_grad_(), logvar.requires_grad_()), label


def test_cross_entropy_objective_is_pytorchs() -> None:
    output, label = random_output()
    loss = objective(Output(output.logits, None, None), label, TINY, 0)
    expected = F.cross_entropy(output.logits, label.long(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, output.logits), torch.autograd.grad(expected, output.logits))


def test_vls_objective_is_elbo_plus_soft_cross_entropy() -> None:
    output, label = random_output()
    assert output.mu is not None
    assert output.logvar is not None
    settings = config(method="vls", alpha=0.3, beta=0.2, temperature=1.5, num_samples=3, seed=5)
    loss = objective(output, label, settings, 7)
    elbo = vls_elbo(
        output.mu,
        output.logvar,
        label,
        num_samples=3,
        beta=0.2,
        ignore_index=IGNORE_INDEX,
        seed=noise_seed(5, 7, 0),
    )
    soft = vls_cross_entropy(
        output.logits,
        label,
        mu=output.mu.detach(),
        logvar=output.logvar.detach(),
        alpha=0.3,
        temperature=1.5,
        num_samples=3,
        beta=0.0,
        ignore_index=IGNORE_INDEX,
        seed=noise_seed(5, 7, 1),
    )
    torch.testing.assert_close(loss, elbo + soft)
    # Each term has its own parameters: the soft labels are held fixed.
    gradients = torch.autograd.grad(loss, list(output))
    torch.testing.assert_close(gradients[:1], torch.autograd.grad(soft, [output.logits]))
    torch.testing.assert_close(gradients[1:], torch.autograd.grad(elbo, [output.mu, output.logvar]))


def test_objective_without_a_labelled_voxel_is_zero() -> None:
    output, label = random_output()
    label.fill_(IGNORE_INDEX)
    for each in (output, Output(output.logits, None, None)):
        loss = objective(each, label, config(method="vls"), 0)
        assert loss.item() == 0
        loss.backward()
    assert output.logits.grad is not None
    assert not output.logits.grad.any()


def test_noise_seeds_and_learning_rate() -> None:
    seeds = {noise_seed(s, i, k) for s in range(3) for i in range(20) for k in range(2)}
    assert len(seeds) == 120
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(1, 2, 0) == noise_seed(1, 2, 0)
    settings = config(iterations=100, learning_rate=1.0)
    rates = [learning_rate(settings, iteration) for iteration in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert int(np.argmax(rates)) == 4
    assert rates[50] == pytest.approx(0.5**0.9)
    assert 0 < rates[-1] < 0.02


# ------------------------------------------------------------------------------------------- network


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


# -------------------------------------------------------------------------------------------- scores


def test_scores_against_a_loop_over_voxels() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (4, 7, 8, 9)).astype(np.float32))
    label = torch.from_numpy(rng.integers(0, 4, (7, 8, 9)).astype(np.int16))
    label[rng.random((7, 8, 9)) < 0.2] = IGNORE_INDEX
    scores = Scores()
    scores.update(logits[:, :3], label[:3])  # in two parts
    scores.update(logits[:, 3:], label[3:])
    result = scores.compute()

    p = np.exp(logits.double().numpy().reshape(4, -1).T)
    p /= p.sum(1, keepdims=True)
    for region, wanted in (("all", lambda y: y >= 0), ("foreground", lambda y: y > 0)):
        nll, brier, gaps, count = 0.0, 0.0, np.zeros(15), 0
        for voxel, y in zip(p, label.numpy().ravel(), strict=True):
            if wanted(y):
                count += 1
                nll -= math.log(voxel[y])
                brier += sum((voxel[c] - (c == y)) ** 2 for c in range(4))
                gaps[min(int(voxel.max() * 15), 14)] += voxel.max() - (voxel.argmax() == y)
        assert scores.bins[region].num_voxels == count
        expected = {"nll": nll / count, "brier": brier / count, "ece": np.abs(gaps).sum() / count}
        assert result[region] == pytest.approx(expected, rel=1e-6)  # float32 probabilities


def test_scores_of_certain_and_of_no_predictions() -> None:
    scores = Scores(n_bins=10)
    assert scores.compute()["foreground"] == {"nll": None, "brier": None, "ece": None}
    scores.update(torch.tensor([[200.0, 200.0], [-200.0, -200.0]]), torch.tensor([0, 1]))  # confidence 1: last bin
    assert scores.compute()["all"] == {"nll": 200.0, "brier": 1.0, "ece": 0.5}
    assert scores.compute()["foreground"] == {"nll": 400.0, "brier": 2.0, "ece": 1.0}


def test_dice_per_class() -> None:
    label = torch.tensor([0, 1, 1, 1, IGNORE_INDEX, 0], dtype=torch.int16)
    prediction = torch.tensor([1, 1, 1, 0, 1, 2])
    assert dice_per_class(prediction, label, 4) == [2 * 2 / (3 + 3), 0.0, None]


# ---------------------------------------------------------------------------------------------- demo


def test_demo_truth_is_what_its_raters_draw() -> None:
    image, raters, truth = make_case(0, 1, DemoConfig(raters=200, side=20))
    assert image.dtype == np.float32
    assert truth.shape == (3, *image.shape)
    np.testing.assert_allclose(truth.sum(0), 1, atol=1e-6)
    assert truth.min() >= 0
    drawn = np.stack([(raters == number).mean(0) for number in range(3)])
    # The raters are independent: the standard error of a share of 200 is at most 0.036.
    assert np.abs(drawn - truth).mean() < 0.02
    assert np.abs(drawn - truth).max() < 0.2
    disputed = (truth.max(0) < 0.9).mean()
    assert 0.02 < disputed < 0.6


def test_demo_runs_resumes_and_refuses(tmp_path: Path) -> None:
    settings = DemoConfig(cases=4, raters=2, side=16, iterations=2)
    out = tmp_path / "demo"
    with pytest.raises(RunInterruptedError):
        run_demo(out, settings, progress=stop_after(1))
    results = run_demo(out, settings)
    assert list(results) == ["cross_entropy", "calseg"]
    for metrics in results.values():
        assert metrics["iterations"] == 2
        assert 0 < metrics["raters"]["all"]["ece"] < 1
        assert 0 < metrics["truth"]["brier"] < 2
    stored = json.loads((out / "demo.json").read_text())
    assert stored["results"]["calseg"]["all"] == results["calseg"]["all"]
    assert_same(run_demo(out, settings), results)  # a finished demo is shown again
    whole = run_demo(tmp_path / "whole", settings)
    assert_same(whole, results)
    dataset = find_cases(out / "data")
    assert len(dataset.cases) == 4
    assert dataset.class_names == ("background", "lesion", "core")
    with pytest.raises(TrainingError, match="holds a demo with other settings"):
        run_demo(out, DemoConfig(cases=5, raters=2, side=16, iterations=2))
    with pytest.raises(TrainingError, match="not empty and not made by calseg demo"):
        run_demo(tmp_path, settings)
    with pytest.raises(TrainingError, match="raters must be at least 2"):
        DemoConfig(raters=1)
