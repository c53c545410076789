"""The contenders of the calibration experiment: the methods that are compared, and the settings that each may try.

A comparison method is trained alone and with the Dice loss beside it, as its authors train. Its settings are chosen on
the tuning cases. The variants of CALSeg have one setting each, which is the same for all data sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]
"""Settings of :class:`calseg.training.TrainConfig` by name."""


@dataclass(frozen=True)
class Contender:
    """A method that takes part.

    Attributes:
        title: Name in tables and figures.
        method: Name in :data:`calseg.methods.METHODS`.
        settings: The settings that are tried. The first is the published one, or the default.
        first_stage: Settings in which the first stage of CALSeg differs from the second.
        scaled: Region of the tuning cases to which a temperature is fitted, by which the logits are divided. None if
            they are not.
    """

    title: str
    method: str
    settings: tuple[Settings, ...] = ({},)
    first_stage: Settings = field(default_factory=dict)
    scaled: str | None = None


REFERENCE = "dice_cross_entropy"
"""The contender that others are compared with: the loss that people use."""

OTHERS: dict[str, tuple[str, tuple[Settings, ...]]] = {
    "label_smoothing": ("label smoothing", ({"alpha": 0.1}, {"alpha": 0.05}, {"alpha": 0.2})),
    "svls": ("SVLS", ({"sigma": 1.0}, {"sigma": 2.0})),
    "focal": ("focal", ({"gamma": 3.0}, {"gamma": 2.0}, {"gamma": 1.0})),
    "mbls": ("MbLS", ({"margin": 5.0}, {"margin": 10.0}, {"margin": 2.5})),
    "nacl": ("NACL", ({"alpha": 0.1}, {"alpha": 0.05}, {"alpha": 0.2})),
    "ace_hard": ("ACE loss, hard bins", ({"alpha": 1.0}, {"alpha": 0.5}, {"alpha": 0.25})),
    "ace_soft": ("ACE loss, soft bins", ({"alpha": 1.0}, {"alpha": 0.5}, {"alpha": 0.25})),
    "vls": ("vls (one stage)", ({"alpha": 0.1}, {"alpha": 0.3}, {"alpha": 0.3, "temperature": 2.0})),
}
"""Title and settings of the comparison methods, and of the one-stage form of CALSeg.

SVLS has a kernel of 3 voxels, so a larger sigma would change little.
"""


def _others() -> Iterator[tuple[str, Contender]]:
    """Return each of :data:`OTHERS` alone, and with the Dice loss."""
    for method, (title, settings) in OTHERS.items():
        yield method, Contender(title, method, settings)
        with_dice = tuple({**each, "dice_weight": 1.0} for each in settings)
        yield f"{method}_dice", Contender(f"{title} + Dice", method, with_dice)


NO_DICE: Settings = {"dice_weight": 0.0}
CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender("Dice + CE", "dice_cross_entropy"),
    "dice_cross_entropy_scaled": Contender("Dice + CE, scaled", "dice_cross_entropy", scaled="all"),
    "dice_cross_entropy_near": Contender("Dice + CE, scaled near", "dice_cross_entropy", scaled="near"),
    "cross_entropy": Contender("CE", "cross_entropy"),
    "cross_entropy_scaled": Contender("CE, scaled", "cross_entropy", scaled="all"),
    **dict(_others()),
    "calseg": Contender("CALSeg", "calseg"),
    "calseg_near": Contender("CALSeg, scaled near", "calseg", scaled="near"),
    "calseg_no_dice": Contender("CALSeg without Dice", "calseg", (NO_DICE,)),
    "calseg_dice_second": Contender("CALSeg, Dice in stage 2 only", "calseg", first_stage=NO_DICE),
    "calseg_dice_hard": Contender("CALSeg, hard Dice", "calseg", ({"dice_labels": "hard"},)),
    "calseg_prior": Contender("CALSeg, codes of the prior", "calseg", ({"estimator": "prior"},)),
    "calseg_network": Contender("CALSeg, plain networks", "calseg", ({"estimator": "network"},)),
    "calseg_whole": Contender("CALSeg, whole stage 1", "calseg", ({"first_stage_share": 1.0},)),
    "calseg_four_folds": Contender("CALSeg, 4 folds", "calseg", ({"folds": 4},)),
}  # fmt: skip
"""All contenders by name. The reference is the first, because the choice of settings compares with it.

"Scaled" is temperature scaling on the tuning cases: of all of their voxels, or of those near the foreground.
"""


def words(settings: Settings) -> str:
    """Return settings as a part of the name of a folder."""
    parts = (f"{key}-{value}" if isinstance(value, str) else f"{key}{value:g}" for key, value in settings.items())
    return "-".join(parts)
