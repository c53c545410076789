"""Tests of CALSeg's first stage in nnU-Net: its network, its loss, and the way from it to soft labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

import nnunet_data as data
from test_nnunet_loss import CLASSES, IGNORE, batch, nnunet_loss

from calseg.integrations.nnunet.config import SoftLabelConfig
from calseg.integrations.nnunet.soft_labels import make_soft_labels
from calseg.integrations.nnunet.stage_one import StageOneLoss, StageOneNetwork, with_label
from calseg.integrations.nnunet.trainers import nnUNetTrainerStageOne

pytestmark = pytest.mark.usefixtures("nnunet_folders")


def network(folder: Path, configuration: str) -> StageOneNetwork:
    trainer = data.make_trainer(nnUNetTrainerStageOne, folder, configuration)
    trainer.initialize()
    return trainer.network


@pytest.mark.parametrize(("configuration", "shape"), [("3d_fullres", (8, 16, 16)), ("2d", (16, 16))])
def test_the_network(tmp_path: Path, configuration: str, shape: tuple[int, ...]) -> None:
    """Training: logits and two more channels; evaluation: probabilities, which depend on the label."""
    net = network(data.make_dataset(tmp_path), configuration)
    image, label = torch.randn(2, 1, *shape), torch.randint(0, CLASSES, (2, 1, *shape))
    joined = with_label(image, label, CLASSES)
    assert joined.shape == (2, 1 + CLASSES, *shape)
    assert torch.equal(joined[:, 1:].argmax(1), label[:, 0])
    highest, lower = net(joined)
    assert highest.shape == (2, CLASSES + 2, *shape)
    assert lower.shape == (2, CLASSES, *(side // 2 for side in shape))
    assert (highest[:, -2:] >= 0).all()
    assert all(parameter.grad is None for parameter in net.parameters())
    (highest.square().sum() + lower.square().sum()).backward()
    assert all(parameter.grad.any() for name, parameter in net.named_parameters() if "norm" not in name), "used"

    net.eval()
    with torch.no_grad():
        estimates = []
        for given in (joined, with_label(image, CLASSES - 1 - label, CLASSES)):
            torch.manual_seed(0)
            estimates.append(net(given)[0])
    assert estimates[0].shape == (2, CLASSES, *shape)
    torch.testing.assert_close(estimates[0].exp().sum(1), torch.ones(2, *shape))
    assert not torch.equal(*estimates)
    with pytest.raises(ValueError, match="estimates from image and label, 4 channels; got 1; it is not for prediction"):
        net(image)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
def test_codes_of_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes differ between ranks whose generators have the same state, eager and compiled, and can be repeated."""
    net = network(data.make_dataset(tmp_path), "2d")
    joined = with_label(torch.randn(2, 1, 16, 16), torch.randint(0, CLASSES, (2, 1, 16, 16)), CLASSES)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for run, mode in ((net, "train"), (net, "eval"), (compiled, "train")):
        getattr(net, mode)()
        outputs = []
        for rank in (0, 1, 1):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            torch.manual_seed(0)
            outputs.append(run(joined)[0])
        assert not torch.equal(*outputs[:2])
        assert torch.equal(*outputs[1:])


def test_the_loss() -> None:
    """Dice plus cross-entropy, and the two terms over the voxels that count."""
    logits, target = batch(3, ignore=True)
    shape = target[0].shape
    error, kl = torch.rand(shape), torch.rand(2, 1, 1, 1, 1).expand(shape)
    theirs = nnunet_loss(ignore=True)
    loss = StageOneLoss(theirs, classes=CLASSES, reconstruction=0.1, beta=0.01)
    value = loss([torch.cat([logits[0], error, kl], 1), *logits[1:]], target)
    terms = 0.1 * error[target[0] != IGNORE].mean() + 0.01 * kl.mean()
    torch.testing.assert_close(value, theirs(logits, target) + terms)
    torch.testing.assert_close(loss(logits, target), theirs(logits, target))


@pytest.mark.timeout(600)
def test_from_training_to_soft_labels(tmp_path: Path) -> None:
    """Validation with --npz estimates the held-out case from image and label, and these become soft labels."""
    folder = data.make_dataset(tmp_path)
    trainer = data.make_trainer(nnUNetTrainerStageOne, folder)
    trainer.run_training()
    assert all(np.isfinite(trainer.logger.get_value("train_losses", step=None)))
    base = trainer.dataset_class
    trainer.perform_actual_validation(save_probabilities=True)
    assert trainer.dataset_class is base
    run = Path(trainer.output_folder_base)
    estimate = np.load(run / "fold_0/validation/case_0.npz")["probabilities"]
    assert estimate.shape == (CLASSES, *data.make_case(0, False)[0].shape)
    for number, name in enumerate(data.CASES[1:], 1):
        (run / f"fold_{number}/validation").mkdir(parents=True)
        maps = 0.7 * data.onehot(data.make_case(number, False)[1]) + 0.1
        np.savez(run / f"fold_{number}/validation/{name}.npz", probabilities=maps)
    summary = make_soft_labels("1", "3d_fullres", SoftLabelConfig(), run=run)
    assert summary["source"] == str(run)


def test_cascades_are_refused(tmp_path: Path) -> None:
    folder = data.make_dataset(tmp_path)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_cascade"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    trainer = data.make_trainer(nnUNetTrainerStageOne, folder, "3d_cascade")
    with pytest.raises(NotImplementedError, match="not for cascades"):
        trainer.initialize()
