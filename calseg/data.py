"""Moved to :mod:`calseg.volumes`."""

from calseg.volumes.datasets import *  # noqa: F403
from calseg.volumes.nifti import *  # noqa: F403
from calseg.volumes.patches import *  # noqa: F403
from calseg.volumes.probabilities import *  # noqa: F403
