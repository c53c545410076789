"""Tests of nnU-Net's trainers: they are found, train, continue, and leave checkpoints that nnU-Net reads alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

import nnunet_data as data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from calseg.errors import CalsegError
from calseg.integrations.nnunet import check_version, plugin_folder
from calseg.integrations.nnunet.config import SoftLabelConfig
from calseg.integrations.nnunet.dense_head import add_dense_heads
from calseg.integrations.nnunet.soft_labels import make_soft_labels
from calseg.integrations.nnunet.trainers import (
    nnUNetTrainerCalseg,
    nnUNetTrainerSoftLabels,
    nnUNetTrainerStageOne,
    nnUNetTrainerVLS,
)

pytestmark = pytest.mark.usefixtures("nnunet_folders")
TRAINERS = [nnUNetTrainerCalseg, nnUNetTrainerVLS, nnUNetTrainerSoftLabels]


def write_soft_labels(folder: Path, configuration: str) -> None:
    maps = folder.parents[1] / "maps"
    maps.mkdir()
    for number, name in enumerate(data.CASES):
        data.save(data.onehot(data.make_case(number, False)[1]), maps / f"{name}.nii.gz")
    make_soft_labels("1", configuration, SoftLabelConfig(), maps=maps)


def train(kind: type, folder: Path, configuration: str = "3d_fullres") -> Any:
    if issubclass(kind, nnUNetTrainerSoftLabels):
        write_soft_labels(folder, configuration)
    trainer = data.make_trainer(kind, folder, configuration)
    trainer.run_training()
    return trainer


@pytest.mark.parametrize("kind", [*TRAINERS, nnUNetTrainerStageOne])
def test_nnunet_finds_the_trainers(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(plugin_folder()))
    assert recursive_find_trainer_class_by_name(kind.__name__) is kind


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_trains_and_predicts_without_calseg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, configuration: str
) -> None:
    """The checkpoint has the names of nnU-Net's weights, and nnU-Net predicts with it where no trainer is to be had."""
    trainer = train(kind, data.make_dataset(tmp_path), configuration)
    assert all(np.isfinite(trainer.logger.get_value("train_losses", step=None)))
    assert trainer.logger.get_value("train_losses", step=-1) < 3
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    plain = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, len(data.LABELS), False
    )
    assert checkpoint["network_weights"].keys() == plain.state_dict().keys()
    assert checkpoint["trainer_name"] == "nnUNetTrainer"

    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    image = torch.from_numpy(data.make_case(0, False)[0])[None]
    logits = predictor.predict_sliding_window_return_logits(image)
    assert logits.shape == (len(data.LABELS), *image.shape[1:])
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor.network = trainer.network
    torch.testing.assert_close(predictor.predict_sliding_window_return_logits(image), logits)


def test_continues_with_the_weights_of_the_dense_head(tmp_path: Path) -> None:
    folder = data.make_dataset(tmp_path)
    trainer = train(nnUNetTrainerVLS, folder)
    other = data.make_trainer(nnUNetTrainerVLS, folder)
    other.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    weights, again = trainer.network.state_dict(), other.network.state_dict()
    assert weights.keys() == again.keys()
    assert sum("moments" in name for name in weights) == 4
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name
    assert other.current_epoch == 2
    other.num_epochs = 3
    other.run_training()
    assert other.current_epoch == 3


def test_pretrained_weights(tmp_path: Path) -> None:
    """A network with dense heads takes all weights of nnU-Net's own, but those of the heads, as nnU-Net does."""
    folder = data.make_dataset(tmp_path)
    theirs, ours = (data.make_trainer(kind, folder) for kind in (nnUNetTrainer, nnUNetTrainerVLS))
    theirs.initialize()
    ours.initialize()
    weights = theirs.network.state_dict()
    torch.save({"network_weights": weights}, tmp_path / "weights.pth")
    load_pretrained_weights(ours.network, str(tmp_path / "weights.pth"))
    taken = {name: value for name, value in ours.network.state_dict().items() if ".seg_layers." not in name}
    assert len(taken) > 10
    assert all(torch.equal(value, weights[name]) for name, value in taken.items())


def test_loads_soft_labels_in_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nnU-Net does where it is not told otherwise."""
    folder = data.make_dataset(tmp_path)
    write_soft_labels(folder, "3d_fullres")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = data.make_trainer(nnUNetTrainerSoftLabels, folder)
    trainer.initialize()
    loaders = trainer.get_dataloaders()
    target = next(loaders[0])["target"]
    assert [level.dtype for level in target] == [torch.int16] * 2 + [torch.uint16] * 2
    assert [level.shape[1] for level in target] == [1, 1, 3, 3]
    assert len(next(loaders[1])["target"]) == 2
    for loader in loaders:
        loader._finish()


def test_a_label_that_is_ignored(tmp_path: Path) -> None:
    folder = data.make_dataset(tmp_path, ignore=True)
    for kind in TRAINERS:
        trainer = train(kind, folder)
        assert all(np.isfinite(trainer.logger.get_value("train_losses", step=None)))
        assert all(np.isfinite(trainer.logger.get_value("val_losses", step=None)))


def test_without_deep_supervision(tmp_path: Path) -> None:
    folder = data.make_dataset(tmp_path)
    for kind in TRAINERS:
        if kind is nnUNetTrainerSoftLabels:
            write_soft_labels(folder, "3d_fullres")
        trainer = data.make_trainer(kind, folder)
        trainer.enable_deep_supervision = False
        trainer.run_training()
        assert all(np.isfinite(trainer.logger.get_value("train_losses", step=None)))


def test_a_cascade(tmp_path: Path) -> None:
    """The label of the stage before goes to the image, and soft labels stay with the label."""
    folder = data.make_dataset(tmp_path)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_cascade"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    write_soft_labels(folder, "3d_fullres")
    for kind in TRAINERS:
        trainer = data.make_trainer(kind, folder, "3d_cascade")
        before = Path(trainer.folder_with_segs_from_previous_stage)
        before.mkdir(parents=True)
        trainer.initialize()
        for name in data.CASES:
            label = trainer.dataset_class(trainer.preprocessed_dataset_folder, [name]).load_case(name)[1][0]
            trainer.dataset_class.save_seg(label.clip(0).astype(np.uint8), str(before / name))
        trainer.run_training()
        assert all(np.isfinite(trainer.logger.get_value("train_losses", step=None)))


@pytest.mark.parametrize("kind", [*TRAINERS, nnUNetTrainerStageOne])
def test_regions_are_refused(tmp_path: Path, kind: type) -> None:
    folder = data.make_dataset(tmp_path)
    content = json.loads((folder / "dataset.json").read_text())
    content.update(labels={"background": 0, "all": [1, 2], "core": 2}, regions_class_order=[1, 2])
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} is for classes .* {data.NAME} has regions"):
        data.make_trainer(kind, folder).initialize()


def test_compiled_networks_get_their_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net compiles on a GPU alone; here the compiler is one that runs the graph as it is."""
    monkeypatch.setattr(nnUNetTrainerVLS, "_do_i_compile", lambda self: True)
    monkeypatch.setattr(torch, "compile", lambda module, compile=torch.compile: compile(module, backend="eager"))
    trainer = data.make_trainer(nnUNetTrainerVLS, data.make_dataset(tmp_path))
    trainer.initialize()
    assert trainer.network is not trainer.plain_network
    image = torch.randn(2, 1, 8, 16, 16)
    assert [output.shape[1] for output in trainer.network(image)] == [9, 9]
    trainer.network.eval()
    assert [output.shape[1] for output in trainer.network(image)] == [3, 3]


def test_the_loss_replaces_that_of_nnunet(tmp_path: Path) -> None:
    """The settings are those of nnU-Net for the configuration."""
    folder = data.make_dataset(tmp_path)
    for configuration, batch_dice in (("3d_fullres", False), ("2d", True)):
        theirs = data.make_trainer(nnUNetTrainer, folder, configuration)
        ours = data.make_trainer(nnUNetTrainerCalseg, folder, configuration)
        theirs.initialize()
        ours.initialize()
        assert isinstance(theirs.loss, DeepSupervisionWrapper)
        assert ours.loss.weights == theirs.loss.weight_factors == (1.0, 0.0)
        assert ours.loss.options["batch_dice"] is batch_dice


def test_a_residual_encoder(tmp_path: Path) -> None:
    """The network of nnU-Net's larger plans has the same heads."""
    folder = data.make_dataset(tmp_path)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    trainer = data.make_trainer(nnUNetTrainerVLS, folder)
    trainer.initialize()
    assert [output.shape[1] for output in trainer.network(torch.randn(1, 1, 8, 16, 16))] == [9, 9]


def test_networks_without_heads_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"the heads decoder\.seg_layers .* Linear has none"):
        add_dense_heads(torch.nn.Linear(1, 1))


def test_missing_soft_labels(tmp_path: Path) -> None:
    folder = data.make_dataset(tmp_path)
    with pytest.raises(CalsegError, match="not found; make soft labels with: calseg nnunet-soft-labels"):
        data.make_trainer(nnUNetTrainerSoftLabels, folder).run_training()
    write_soft_labels(folder, "3d_fullres")
    soft = folder / "calseg_soft_labels_nnUNetPlans_3d_fullres"
    (soft / "case_2.b2nd").rename(soft / "other.b2nd")
    with pytest.raises(CalsegError, match="no soft labels of case_2;"):
        data.make_trainer(nnUNetTrainerSoftLabels, folder).run_training()
    (soft / "case_1.b2nd").rename(soft / "case_2.b2nd")
    (soft / "other.b2nd").rename(soft / "case_1.b2nd")
    with pytest.raises(CalsegError, match=r"case_1\.b2nd: soft labels of shape \(3, .* needs"):
        data.make_trainer(nnUNetTrainerSoftLabels, folder).run_training()


@pytest.mark.parametrize(("found", "message"), [("2.6.4", "nnU-Net 2.6.4 is installed, and 2.8 or newer is wanted")])
def test_an_nnunet_that_is_too_old(monkeypatch: pytest.MonkeyPatch, found: str, message: str) -> None:
    monkeypatch.setattr("calseg.integrations.nnunet.version", lambda name: found)
    with pytest.raises(CalsegError, match=message):
        check_version()


def test_calseg_does_not_import_nnunet() -> None:
    code = "import sys, calseg, calseg.integrations.nnunet; sys.exit('nnunetv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
