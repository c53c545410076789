"""What the tests of operations take from inside of calseg, named here once; everything else is public."""

from __future__ import annotations

import pytest
import torch

from calseg import native as memory
from calseg.backends import choice

native = memory.extension
ISAS = [] if native is None else native.available_isas()
TRITON_ERROR = choice.TRITON_ERROR
MEMORY_OF_RESULTS = ((memory, "empty_like"), (memory, "empty_voxels"))  # (module, function): all that make it

needs_native = pytest.mark.skipif(native is None, reason="no native engine")


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a result: pooled where it is large."""
    return memory.empty_like(tensor)
