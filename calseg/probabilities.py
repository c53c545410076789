"""Moved to :mod:`calseg.volumes.probabilities`."""

from calseg.volumes.probabilities import *  # noqa: F403
