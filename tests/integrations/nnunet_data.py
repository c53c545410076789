"""A tiny data set in nnU-Net's folders, planned by hand and preprocessed by nnU-Net, and trainers for it."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import SimpleITK
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

NAME = "Dataset001_Tiny"
CASES = [f"case_{number}" for number in range(5)]
LABELS = {"background": 0, "shell": 1, "core": 2}
SPACING = (3.0, 1.0, 1.2)  # of the slices first


def configuration(patch: list[int], spacing: list[float], identifier: str) -> dict[str, Any]:
    """A configuration with a network of three levels."""
    dims = len(patch)
    resampling = {"order": 1, "order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": [float(side) for side in patch],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, **resampling, "order": 3},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, **resampling},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, **resampling},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 3,
                "strides": [[1] * dims, [2] * dims, [2] * dims],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": dims == 2,
    }


def make_plans(transpose: tuple[int, int, int], spacing: list[float]) -> dict[str, Any]:
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [12, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": list(map(int, np.argsort(transpose))),
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
        },
        "configurations": {
            "3d_fullres": configuration([8, 16, 16], spacing, "nnUNetPlans_3d_fullres"),
            "flat": configuration([4, 16, 16], spacing, "nnUNetPlans_3d_fullres"),  # augmented in two dimensions
            "2d": configuration([16, 16], spacing[1:], "nnUNetPlans_2d"),
        },
    }


def make_case(number: int, ignore: bool) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An image with a border of zeros, which is cropped, and its label, ``[z, y, x]``."""
    rng = np.random.default_rng(number)
    shape = (11 + number % 2, 20, 23 - number)
    z, y, x = np.meshgrid(*(np.arange(side) - side / 2 for side in shape), indexing="ij")
    distance = np.sqrt((z / 4) ** 2 + ((y - 1) / 6) ** 2 + ((x + 2) / 7) ** 2)
    label = (distance < 1).astype(np.uint8) + (distance < 0.5)
    image = (1 + label + 0.3 * rng.standard_normal(shape)).astype(np.float32)
    for axis in range(3):
        image.swapaxes(0, axis)[:1] = 0
        image.swapaxes(0, axis)[-2:] = 0
    if ignore:
        label[:, :, :6] = len(LABELS)
    return image, label


def save(volume: NDArray[Any], path: Path, transpose: tuple[int, int, int] = (0, 1, 2)) -> None:
    """Write maps ``[*S]`` or ``[C, *S]`` as nnU-Net reads them. ``transpose`` is that of the plans."""
    back = np.argsort(transpose)
    volume = volume.transpose(back) if volume.ndim == 3 else volume.transpose(0, *(1 + back))
    image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(part) for part in volume]) if volume.ndim == 4 else None
    image = SimpleITK.GetImageFromArray(volume) if image is None else image
    spacing = [SPACING[axis] for axis in back][::-1]
    image.SetSpacing(spacing if volume.ndim == 3 else [*spacing, 1.0])
    SimpleITK.WriteImage(image, str(path))


def make_dataset(
    root: Path,
    *,
    transpose: tuple[int, int, int] = (0, 1, 2),
    spacing: tuple[float, float, float] = SPACING,
    ignore: bool = False,
) -> Path:
    """Write raw and preprocessed data to the folders ``raw`` and ``preprocessed`` of ``root``.

    In memory, before the axes are put into the order that ``transpose`` undoes, the slices come first.
    """
    for name, content in _files(transpose, spacing, ignore).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "results").mkdir()
    return root / "preprocessed" / NAME


@cache
def _files(transpose: tuple[int, int, int], spacing: tuple[float, float, float], ignore: bool) -> dict[str, bytes]:
    """The files of a data set. nnU-Net preprocesses it once, and each test gets its own copy."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        _preprocess(root, transpose, spacing, ignore)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _preprocess(root: Path, transpose: tuple[int, int, int], spacing: tuple[float, float, float], ignore: bool) -> None:
    raw, folder = root / "raw" / NAME, root / "preprocessed" / NAME
    labels = {**LABELS, **({"ignore": len(LABELS)} if ignore else {})}
    dataset_json = {
        "channel_names": {"0": "image"}, "labels": labels, "numTraining": len(CASES), "file_ending": ".nii.gz"
    }  # fmt: skip
    for part in (raw / "imagesTr", raw / "labelsTr", folder / "gt_segmentations"):
        part.mkdir(parents=True)
    plans = make_plans(transpose, list(spacing))
    splits = [{"train": [name for name in CASES if name != held], "val": [held]} for held in CASES]
    for name, content in (("dataset", dataset_json), ("nnUNetPlans", plans), ("splits_final", splits)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "dataset_fingerprint.json").write_text("{}")
    manager = PlansManager(copy.deepcopy(plans))
    preprocessor = DefaultPreprocessor(verbose=False)
    for number, name in enumerate(CASES):
        image, label = make_case(number, ignore)
        image_file = raw / "imagesTr" / f"{name}_0000.nii.gz"
        save(image, image_file, transpose)
        for label_file in (raw / "labelsTr" / f"{name}.nii.gz", folder / "gt_segmentations" / f"{name}.nii.gz"):
            save(label, label_file, transpose)
        for settings in ("3d_fullres", "2d"):
            configured = manager.get_configuration(settings)
            out = folder / configured.data_identifier
            out.mkdir(exist_ok=True)
            preprocessor.run_case_save(
                str(out / name), [str(image_file)], str(label_file), manager, configured, dataset_json
            )


def onehot(label: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    return np.stack([label == number for number in LABELS.values()]).astype(np.float32)


def make_trainer(kind: type, folder: Path, configuration: str = "3d_fullres") -> Any:
    """A trainer of fold 0 that trains for two epochs of two iterations, and draws no pictures of them."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    dataset_json = json.loads((folder / "dataset.json").read_text())
    trainer = kind(plans, configuration, 0, dataset_json, torch.device("cpu"))
    trainer.num_epochs = trainer.num_iterations_per_epoch = 2
    trainer.num_val_iterations_per_epoch = 1
    trainer.logger.plot_progress_png = lambda folder: None
    return trainer
