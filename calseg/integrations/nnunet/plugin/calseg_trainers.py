"""The trainers of calseg, where nnU-Net looks for them.

nnU-Net imports this module by its bare name, and forgets it and all others of this folder afterwards. The classes lie
in the package, so that data loading processes find them again.
"""

from calseg.integrations.nnunet.trainers import (
    nnUNetTrainerCalseg,
    nnUNetTrainerSoftLabels,
    nnUNetTrainerStageOne,
    nnUNetTrainerVLS,
)

__all__ = ["nnUNetTrainerCalseg", "nnUNetTrainerSoftLabels", "nnUNetTrainerStageOne", "nnUNetTrainerVLS"]
