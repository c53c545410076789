"""Names inside of calseg that the tests of operations use. They use nothing else that is not public."""

from __future__ import annotations

import pytest
import torch

from calseg import native as memory
from calseg.backends import choice

native = memory.extension
ISAS = [] if native is None else native.available_isas()
TRITON_ERROR = choice.TRITON_ERROR
MEMORY_OF_RESULTS = ((memory, "empty_like"), (memory, "empty_voxels"))  # functions that allocate results

needs_native = pytest.mark.skipif(native is None, reason="no native engine")


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Allocate a result, from the pool if it is large."""
    return memory.empty_like(tensor)
