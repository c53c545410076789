"""A data set that nnU-Net has preprocessed for a configuration: its cases, its labels, and its grid."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from calseg.errors import CalsegError, listing
from calseg.files import read_json
from calseg.integrations.nnunet.store import file_of, folder_of, opened
from calseg.volumes.nifti import DataError, naming

Volume = NDArray[np.float32]


def folder_of_variable(name: str) -> Path:
    """Return the folder that one of nnU-Net's environment variables names."""
    value = os.environ.get(name)
    if not value:
        raise CalsegError(f"the environment variable {name} is not set; nnU-Net's documentation says to what")
    if not Path(value).is_dir():
        raise CalsegError(f"{value}: no such folder; the environment variable {name} names it")
    return Path(value)


def find_dataset(dataset: str) -> Path:
    """Return the folder in ``nnUNet_preprocessed`` of a data set that is given by its number or its name."""
    root = folder_of_variable("nnUNet_preprocessed")
    if dataset.isdecimal():
        found = sorted(root.glob(f"Dataset{int(dataset):03d}_*"))
    else:
        found = [root / dataset] if (root / dataset).is_dir() else []
    if len(found) != 1:
        names = listing(sorted(path.name for path in root.glob("Dataset*"))) or "none"
        raise CalsegError(f"{root}: {len(found) or 'no'} data sets {dataset!r}; it holds {names}")
    return found[0]


@dataclass(frozen=True)
class Preprocessed:
    """A data set in ``nnUNet_preprocessed``, and one configuration of its plans.

    Args:
        folder: the folder of the data set.
        plans: name of the plans.
        configuration: name of the configuration, as in "3d_fullres".

    Raises:
        CalsegError: files are missing, there is no such configuration, or the data set has regions.
    """

    folder: Path
    plans: str
    configuration: str

    def __post_init__(self) -> None:
        names = self._manager.available_configurations
        if self.configuration not in names:
            raise CalsegError(f"{self._plans_file}: no configuration {self.configuration!r}, but {', '.join(names)}")
        if self.labels.has_regions:
            raise CalsegError(f"{self.folder.name}: has regions, which may overlap; soft labels are for classes")
        if not self.cases:
            raise CalsegError(
                f"{self.data_folder}: holds no preprocessed case; run nnUNetv2_preprocess -c {self.configuration}"
            )

    @property
    def _plans_file(self) -> Path:
        return self.folder / f"{self.plans}.json"

    @cached_property
    def _manager(self) -> Any:
        if not self._plans_file.is_file():
            raise CalsegError(f"{self._plans_file}: not found; run nnUNetv2_plan_and_preprocess first")
        return PlansManager(read_json(self._plans_file))

    @cached_property
    def _settings(self) -> Any:
        return self._manager.get_configuration(self.configuration)

    @cached_property
    def _reader(self) -> Any:
        return self._manager.image_reader_writer_class()

    @cached_property
    def _dataset_json(self) -> dict[str, Any]:
        return dict(read_json(self.folder / "dataset.json"))

    @cached_property
    def labels(self) -> Any:
        """nnU-Net's manager of the labels."""
        return self._manager.get_label_manager(self._dataset_json)

    @property
    def classes(self) -> int:
        """The number of classes, background included."""
        return int(self.labels.num_segmentation_heads)

    @property
    def data_folder(self) -> Path:
        """The folder of the preprocessed cases."""
        return self.folder / str(self._settings.data_identifier)

    @property
    def soft_labels_folder(self) -> Path:
        """The folder of the soft labels."""
        return folder_of(self.folder, self._settings.data_identifier)

    @cached_property
    def cases(self) -> list[str]:
        """The names of the preprocessed cases, sorted."""
        return sorted(path.stem for path in self.data_folder.glob("*.pkl"))

    def folds(self) -> list[dict[str, list[str]]]:
        """Return the names of the cases ``train`` and ``val`` of every fold."""
        path = self.folder / "splits_final.json"
        if not path.is_file():
            raise CalsegError(f"{path}: not found; nnU-Net writes it when the first fold is trained")
        return [dict(fold) for fold in read_json(path)]

    def image_file(self, case: str) -> Path:
        """Return the file of a preprocessed image."""
        return self.data_folder / file_of(case)

    def read_label(self, case: str) -> NDArray[np.int64]:
        """Return the label of a case before preprocessing, ``[*S]`` as nnU-Net reads it."""
        path = self.folder / "gt_segmentations" / f"{case}{self._dataset_json['file_ending']}"
        with naming(path):
            return np.asarray(self._reader.read_seg(str(path))[0][0]).astype(np.int64)

    def read_maps(self, path: Path) -> Volume:
        """Return the channels of a 4-D file, ``[C, *S]`` as nnU-Net reads them."""
        if not path.is_file():
            raise DataError(f"{path}: not found")
        with naming(path):
            return np.asarray(self._reader.read_images((str(path),))[0], np.float32)

    def cropped(self, volume: NDArray[Any], case: str, source: Path) -> NDArray[Any]:
        """Return maps ``[C, *S]`` of a case as nnU-Net transposes and crops its image.

        Raises:
            CalsegError: ``volume``, read from the file ``source``, has not the size of the image.
        """
        properties = self._properties(case)
        forward = [int(axis) for axis in self._manager.transpose_forward]
        volume = volume.transpose(0, *(axis + 1 for axis in forward))
        wanted = tuple(int(side) for side in properties["shape_before_cropping"])
        if volume.shape[0] != self.classes or volume.shape[1:] != wanted:
            back = [forward.index(axis) for axis in range(len(forward))]
            found = [volume.shape[0], *(volume.shape[1 + axis] for axis in back)]
            raise DataError(
                f"{source}: probabilities of shape {found}, but {case} has {self.classes} classes and an image of"
                f" {[wanted[axis] for axis in back]}"
            )
        sides = (slice(int(start), int(stop)) for start, stop in properties["bbox_used_for_cropping"])
        box = (slice(None), *sides)
        return volume[box]

    def resampled(self, volume: Volume, case: str) -> Volume:
        """Return the maps of :meth:`cropped` on the grid of the preprocessed image, by nnU-Net's own resampling."""
        properties = self._properties(case)
        before = [properties["spacing"][axis] for axis in self._manager.transpose_forward]
        after = list(self._settings.spacing)
        after = [*before[: len(before) - len(after)], *after]  # "2d" keeps the distance of the slices
        shape = tuple(opened(self.image_file(case)).shape[1:])
        return np.asarray(self._settings.resampling_fn_probabilities(volume, shape, before, after), np.float32)

    def _properties(self, case: str) -> dict[str, Any]:
        path = self.data_folder / f"{case}.pkl"
        with naming(path):
            return dict(load_pickle(str(path)))
