"""The public names of calseg: what ``calseg.NAME`` finds."""

from calseg._version import __version__
from calseg.calibration import CalibrationBins, calibration_bins, calibration_error, calibration_error_from_bins
from calseg.environment import info
from calseg.functional import (
    accumulate_soft_labels,
    ace_loss,
    gaussian_kl,
    sample_soft_labels,
    soft_cross_entropy,
    vls_cross_entropy,
    vls_dice_cross_entropy,
    vls_elbo,
)
from calseg.modules import (
    ACELoss,
    GaussianKLLoss,
    SoftCrossEntropyLoss,
    VLSCrossEntropyLoss,
    VLSDiceCrossEntropyLoss,
    VLSElboLoss,
)
from calseg.native import empty_cache
from calseg.regions import near_foreground

__all__ = [
    "ACELoss",
    "CalibrationBins",
    "GaussianKLLoss",
    "SoftCrossEntropyLoss",
    "VLSCrossEntropyLoss",
    "VLSDiceCrossEntropyLoss",
    "VLSElboLoss",
    "__version__",
    "accumulate_soft_labels",
    "ace_loss",
    "calibration_bins",
    "calibration_error",
    "calibration_error_from_bins",
    "empty_cache",
    "gaussian_kl",
    "info",
    "near_foreground",
    "sample_soft_labels",
    "soft_cross_entropy",
    "vls_cross_entropy",
    "vls_dice_cross_entropy",
    "vls_elbo",
]
