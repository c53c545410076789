"""The trainers, which nnU-Net finds by their names (see :mod:`calseg.integrations.nnunet`).

All use nnU-Net's plans, folds, augmentation and schedule. Those whose models predict train nnU-Net's own network, and
only the loss and what it needs differ. Their checkpoints hold the weights of that network alone, and name the trainer
of nnU-Net that builds it. So ``nnUNetv2_predict`` and ``nnUNetv2_export_model_to_zip`` work as ever, also where calseg
is not installed. The networks of CALSeg's first stage are not for prediction.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from calseg.integrations.nnunet.data import BlendSoftLabels, SoftLabelDataset, SplitSoftLabels
from calseg.integrations.nnunet.dense_head import add_dense_heads, split_weights
from calseg.integrations.nnunet.loss import DiceCrossEntropy, VLSDiceCrossEntropy
from calseg.integrations.nnunet.stage_one import StageOneLoss, StageOneNetwork, with_label
from calseg.integrations.nnunet.store import check_files, folder_of, read_alpha
from calseg.methods import METHODS

SETTINGS: Mapping[str, Any] = METHODS["calseg"].settings
DENSE_HEAD = "calseg_dense_head"
"""The entry of a checkpoint with the weights of the dense head."""


class nnUNetTrainerCalseg(nnUNetTrainer):  # noqa: N801  # nnU-Net's way of naming
    """nnU-Net's trainer with nnU-Net's loss, Dice plus cross-entropy, in calseg's fused operation.

    The values and gradients are those of nnU-Net. It is faster and needs less memory.

    Raises:
        NotImplementedError: the data set has regions.
    """

    def initialize(self) -> None:
        """Build network, optimizer and loss, as nnU-Net does."""
        if self.label_manager.has_regions:
            raise NotImplementedError(
                f"{type(self).__name__} is for classes that exclude each other; the data set"
                f" {self.plans_manager.dataset_name} has regions, which may overlap; train it with nnUNetTrainer"
            )
        super().initialize()

    def _build_loss(self) -> nn.Module:
        return DiceCrossEntropy(super()._build_loss())

    @property
    def plain_network(self) -> nn.Module:
        """The network without what DDP and ``torch.compile`` wrap it in."""
        network: Any = self.network
        network = network.module if self.is_ddp else network
        return getattr(network, "_orig_mod", network)  # type: ignore[no-any-return]

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint that nnU-Net reads without calseg."""
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)
        if not buffer.tell():  # another rank writes it, or nobody does
            return
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)
        torch.save(self._for_nnunet(checkpoint), filename)

    def _for_nnunet(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint in which a class of nnU-Net's builds the network, if it does."""
        builder = next(kind for kind in type(self).__mro__ if "build_network_architecture" in vars(kind))
        return {**checkpoint, "trainer_name": builder.__name__}


class nnUNetTrainerVLS(nnUNetTrainerCalseg):  # noqa: N801
    """Variational label smoothing in one stage: the network learns the soft labels that it is trained on.

    In training, a dense head gives a Gaussian over the logits of every voxel. It is trained by the evidence lower bound
    of the labels, and soft labels sampled from it are the targets of Dice plus cross-entropy. In validation and
    prediction the head is not there.

    Attributes:
        smoothing: alpha, temperature, num_samples and beta of :func:`calseg.vls_cross_entropy`. A class that derives
            from this one may give others.

    Raises:
        NotImplementedError: the data set has regions, or the network is none of nnU-Net's U-Nets.
    """

    smoothing: ClassVar[Mapping[str, Any]] = METHODS["vls"].settings

    def configure_optimizers(self) -> Any:
        """Add the dense heads, and make the optimizer of all parameters.

        nnU-Net calls this when the network is built and compiled, and not yet distributed.
        """
        network: Any = self.network
        add_dense_heads(getattr(network, "_orig_mod", network))
        return super().configure_optimizers()

    def _build_loss(self) -> nn.Module:
        loss = nnUNetTrainer._build_loss(self)
        return VLSDiceCrossEntropy(loss, classes=self.label_manager.num_segmentation_heads, **self.smoothing)

    def _for_nnunet(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        plain, dense = split_weights(checkpoint["network_weights"])
        return super()._for_nnunet({**checkpoint, "network_weights": plain, DENSE_HEAD: dense})

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue from a checkpoint, with the weights of the dense head."""
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False)
        self.plain_network.load_state_dict(checkpoint[DENSE_HEAD], strict=False)


class nnUNetTrainerSoftLabels(nnUNetTrainerCalseg):  # noqa: N801
    """CALSeg's second stage: Dice plus cross-entropy on the soft labels that ``calseg nnunet-soft-labels`` made.

    The Dice term is the semimetric loss of :func:`calseg.vls_dice_cross_entropy`, which is least where the prediction
    equals the soft label. Validation and online evaluation use the labels, as ever.

    Raises:
        NotImplementedError: the data set has regions.
        CalsegError: soft labels of a training case are missing or do not fit.
    """

    @property
    def soft_labels_folder(self) -> Path:
        """The folder of the soft labels."""
        return folder_of(Path(self.preprocessed_dataset_folder_base), self.configuration_manager.data_identifier)

    def get_tr_and_val_datasets(self) -> tuple[SoftLabelDataset, Any]:
        """Return nnU-Net's data sets; that for training has soft labels."""
        training, validation = super().get_tr_and_val_datasets()
        shapes = {case: tuple(training.load_case(case)[0].shape[1:]) for case in training.identifiers}
        check_files(self.soft_labels_folder, shapes, self.label_manager.num_segmentation_heads)
        return SoftLabelDataset(training, self.soft_labels_folder), validation

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """Return nnU-Net's transforms between the two that carry soft labels through them."""
        alpha = read_alpha(self.soft_labels_folder)
        transforms = super().get_training_transforms(*args, **kwargs)
        split = SplitSoftLabels(self.label_manager.num_segmentation_heads)
        return ComposeTransforms([split, transforms, BlendSoftLabels(alpha)])


class nnUNetTrainerStageOne(nnUNetTrainerCalseg):  # noqa: N801
    """CALSeg's first stage, with nnU-Net's plans and folds, for soft labels from ``--npz``.

    It estimates the label of a case from its image *and* its label, by drawing from a distribution that it has learnt
    on other cases. So it cannot predict cases without a label. Its held-out estimates are made into soft labels by
    ``calseg nnunet-soft-labels --run``, as the predictions of any run are.

    Raises:
        NotImplementedError: the data set has regions, the configuration is the second stage of a cascade, or the
            network is none of nnU-Net's U-Nets.
    """

    dataset_class: Any

    def initialize(self) -> None:
        """Build network, optimizer and loss, as nnU-Net does."""
        if self.is_cascaded:
            raise NotImplementedError(f"{type(self).__name__}: the first stage of CALSeg is not for cascades")
        super().initialize()

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return nnU-Net's network with CALSeg's around it."""
        unet = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        sizes = {name: SETTINGS[name] for name in ("latent_size", "num_samples")}
        return StageOneNetwork(unet, num_input_channels, **sizes)

    def _build_loss(self) -> nn.Module:
        weights = {name: SETTINGS[name] for name in ("reconstruction", "beta")}
        return StageOneLoss(
            nnUNetTrainer._build_loss(self), classes=self.label_manager.num_segmentation_heads, **weights
        )

    def train_step(self, batch: dict[str, Any]) -> Any:
        """Train on a batch of images and labels."""
        return super().train_step(self._with_label(batch))

    def validation_step(self, batch: dict[str, Any]) -> Any:
        """Score the estimate of a batch."""
        return super().validation_step(self._with_label(batch))

    def _with_label(self, batch: dict[str, Any]) -> dict[str, Any]:
        label = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        return {**batch, "data": with_label(batch["data"], label, self.label_manager.num_segmentation_heads)}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Estimate the label of every validation case, from its image and its label."""
        classes, dataset_class = self.label_manager.num_segmentation_heads, self.dataset_class

        class CasesWithLabels(dataset_class):  # type: ignore[misc, valid-type]
            def load_case(self, identifier: str) -> tuple[Any, Any, Any, Any]:
                image, label, before, properties = super().load_case(identifier)
                joined = with_label(torch.from_numpy(image[:])[None], torch.from_numpy(label[:])[None], classes)
                return joined[0].numpy(), label, before, properties

        self.dataset_class = CasesWithLabels
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = dataset_class
