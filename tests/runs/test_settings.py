"""Settings of the configuration dataclasses: a help sentence and a bound each, declared once."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from calseg.errors import RunError
from calseg.report import EvaluateConfig
from calseg.settings import FRACTION, at_least, check_settings, one_of, setting, whole
from calseg.training.config import TrainConfig

pytest.importorskip("nibabel")  # of the simulation

from calseg.simulation import DemoConfig

CONFIGS = (TrainConfig, EvaluateConfig, DemoConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_has_a_help_sentence(config: type) -> None:
    for item in fields(config):
        sentence = item.metadata["help"]
        assert sentence[0].isupper(), item.name
        assert sentence.endswith("."), item.name
        assert len(sentence.split()) > 3, item.name


@dataclass(frozen=True)
class Example:
    sides: int = setting(8, "Number of sides of the example.", at_least(3))
    share: float | None = setting(None, "Share of something, or none at all.", FRACTION)
    kind: str = setting("a", "Kind of the example in a word.", one_of(("a", "b")))
    bins: int = setting(15, "Number of bins in the example.", whole(1, 20))

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": 2}, "^sides must be at least 3; got 2$"),
        ({"share": float("nan")}, r"^share must lie in \[0, 1\]; got nan$"),
        ({"kind": "c"}, "^kind must be one of a, b; got 'c'$"),
        ({"bins": 21}, "^bins must lie in 1 to 20; got 21$"),
        ({"bins": "15"}, "^bins must be a whole number; got '15'$"),
    ],
)
def test_the_setting_out_of_bounds_is_named(changes: dict[str, object], message: str) -> None:
    assert Example().share is None
    with pytest.raises(RunError, match=message):
        Example(**changes)  # type: ignore[arg-type]
