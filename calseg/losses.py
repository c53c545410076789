"""The old name of :mod:`calseg.modules`, kept for one version."""

from calseg.modules import ACELoss, GaussianKLLoss, SoftCrossEntropyLoss, VLSCrossEntropyLoss, VLSElboLoss

__all__ = ["ACELoss", "GaussianKLLoss", "SoftCrossEntropyLoss", "VLSCrossEntropyLoss", "VLSElboLoss"]
