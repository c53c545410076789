"""The settings of ``calseg nnunet-soft-labels``."""

from __future__ import annotations

from dataclasses import dataclass

from calseg.methods import METHODS
from calseg.settings import FRACTION, POSITIVE, check_settings, setting

ALPHA = METHODS["calseg"].settings["alpha"]
"""The share of held-out predictions in the soft labels, where none is given."""


@dataclass(frozen=True)
class SoftLabelConfig:
    """How estimates become soft labels. ``calseg nnunet-soft-labels --help`` explains each setting."""

    plans: str = setting("nnUNetPlans", "Name of the plans, as nnU-Net's option -p takes it.")
    alpha: float | None = setting(
        None,
        "Share of the estimate in the soft labels; the rest is the label. Default:"
        f" {ALPHA:g} for held-out predictions, and 1 for --maps, which are taken as they are.",
        FRACTION,
    )
    temperature: float | None = setting(
        None,
        "Temperature of the estimate; above 1 it is softer. Default: the one under which held-out predictions fit the"
        " labels near the foreground best, and 1 for --maps.",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        check_settings(self)
