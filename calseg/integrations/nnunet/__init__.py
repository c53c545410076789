"""Training with nnU-Net: trainers that nnU-Net finds by their names, and soft labels for its preprocessed data.

nnU-Net looks for trainers in the folders that the environment variable ``nnUNet_extTrainer`` names.
:func:`plugin_folder` is the one for it, and ``calseg nnunet-path`` prints it:

.. code-block:: sh

    export nnUNet_extTrainer="$(calseg nnunet-path)"
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerCalseg

This module imports nothing of nnU-Net, so that the command line can give a message where it is missing or too old.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from calseg.errors import CalsegError

OLDEST = (2, 8)
"""The oldest nnU-Net that finds trainers outside of its own folder."""


def plugin_folder() -> Path:
    """Return the folder for the environment variable ``nnUNet_extTrainer``.

    Raises:
        CalsegError: nnU-Net is not installed, or too old.
    """
    check_version()
    return Path(__file__).parent / "plugin"


def check_version() -> None:
    """Raise a :class:`~calseg.errors.CalsegError` if nnU-Net is not installed, or too old."""
    wanted = ".".join(map(str, OLDEST))
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        raise CalsegError("nnU-Net is not installed: pip install 'calseg[nnunet]'") from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        raise CalsegError(
            f"nnU-Net {found} is installed, and {wanted} or newer is wanted: older ones find no trainers outside of"
            " their own folder"
        )
