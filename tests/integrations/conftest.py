"""What the tests of nnU-Net need: its folders, and a timm that imports."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

STUBS = Path(__file__).parent / "stubs"


def timm_imports() -> bool:
    """Whether timm imports. It does not beside a torch without CUDA and the torchvision of PyPI."""
    if not find_spec("timm"):
        return False
    try:
        import timm  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        return False
    return True


if find_spec("nnunetv2") and not timm_imports():
    sys.path.insert(0, str(STUBS))

os.environ.update(nnUNet_def_n_proc="1")  # nnU-Net reads it when it is imported


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point nnU-Net's variables to ``tmp_path``, with the names that nnunet_data.py uses, and load data in process."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the processes that nnU-Net spawns
