"""Soft labels beside nnU-Net's preprocessed data: their folder, their files, and what ``soft_labels.json`` says.

The folder of a configuration has a file ``CASE.b2nd`` for every case, in blosc2's format, as nnU-Net stores its own. It
is an array int16 ``[C, *S]`` with the estimate of the probability of every class, in steps of ``1 / STEPS``, on the
grid of the preprocessed case. The label is not in it: it is blended with the estimate when a patch is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from calseg.errors import CalsegError, listing
from calseg.files import read_json
from calseg.volumes.nifti import naming

STEPS = 32767
"""Number of steps from 0 to 1. int16 is the type in which nnU-Net draws patches of labels."""
SUMMARY = "soft_labels.json"


def folder_of(dataset: Path, data_identifier: str) -> Path:
    """Return the folder of soft labels for preprocessed data, in the preprocessed folder ``dataset``."""
    return dataset / f"calseg_soft_labels_{data_identifier}"


def file_of(case: str) -> str:
    """Return the name of the file of a case."""
    return f"{case}.b2nd"


def packed(probabilities: NDArray[np.floating[Any]], like: Path) -> bytes:
    """Return the content of a file, from probabilities ``[C, *S]``.

    It is cut into chunks and blocks as the preprocessed image in the file ``like`` is, so that a patch is read fast.
    """
    image = _open(like)
    steps = np.rint(np.clip(probabilities, 0, 1) * np.float32(STEPS)).astype(np.int16)
    array = blosc2.asarray(
        np.ascontiguousarray(steps),
        chunks=(1, *image.chunks[1:]),
        blocks=(1, *image.blocks[1:]),
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1},
    )
    return bytes(array.to_cframe())


def opened(path: Path) -> Any:
    """Return the array int16 ``[C, *S]`` of a file, of which a part is read when it is sliced."""
    return _open(path)


def _open(path: Path) -> Any:
    with naming(path):
        return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1})


def read_alpha(folder: Path) -> float:
    """Return the share of the estimate in the soft labels of a folder.

    Raises:
        CalsegError: there are no soft labels, or not all were made.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise CalsegError(f"{path}: not found; make soft labels with: calseg nnunet-soft-labels")
    content = read_json(path)
    alpha = content.get("alpha") if isinstance(content, dict) else None
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise CalsegError(f"{path}: not what calseg nnunet-soft-labels writes")
    return float(alpha)


def check_files(folder: Path, shapes: dict[str, tuple[int, ...]], classes: int) -> None:
    """Check that a folder has soft labels for cases of ``shapes``, and of ``classes`` classes.

    Raises:
        CalsegError: a file is missing, or has another shape.
    """
    missing = [case for case in shapes if not (folder / file_of(case)).is_file()]
    if missing:
        raise CalsegError(
            f"{folder}: no soft labels of {listing(missing)}; make them with: calseg nnunet-soft-labels --overwrite"
        )
    for case, shape in shapes.items():
        found, wanted = opened(folder / file_of(case)).shape, (classes, *shape)
        if tuple(found) != wanted:
            raise CalsegError(
                f"{folder / file_of(case)}: soft labels of shape {tuple(found)}, but the preprocessed case needs"
                f" {wanted}; make them anew with: calseg nnunet-soft-labels --overwrite"
            )
