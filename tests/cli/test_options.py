"""Tests of the origin of options and methods, and of the imports of commands."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "monai", "nibabel"):
    pytest.importorskip(package)

import typer  # noqa: E402
from command_line import run  # noqa: E402

from calseg import methods  # noqa: E402
from calseg.cli.commands import COMMANDS, build_app  # noqa: E402
from calseg.methods import METHODS, Method  # noqa: E402
from calseg.report import EvaluateConfig  # noqa: E402
from calseg.simulation import DemoConfig, make_dataset  # noqa: E402
from calseg.training.config import TrainConfig  # noqa: E402

OF_STAGE_ONE = {
    "iterations", "batch_size", "patch_size", "learning_rate", "seed", "split_seed", "foreground", "flip_axes",
    "dice_weight", "alpha", "temperature", "num_samples", "beta", "latent_size", "reconstruction", "folds",
    "first_stage_share", "estimator",
}  # fmt: skip


def options(command: str) -> dict[str, typer.models.OptionInfo]:
    """The options of a command, by the names of their parameters."""
    place: Any = typer.main.get_command(build_app(command))
    for word in command.split():
        place = place.commands[word]
    return {each.name: each for each in place.params}


@pytest.mark.parametrize(
    ("command", "config", "names"),
    [
        ("train", TrainConfig, None),
        ("soft-labels", TrainConfig, OF_STAGE_ONE),
        ("evaluate", EvaluateConfig, None),
        ("demo", DemoConfig, None),
    ],
)
def test_every_setting_is_an_option(command: str, config: type, names: set[str] | None) -> None:
    made = options(command)
    for item in fields(config):
        if names is not None and item.name not in names:
            assert item.name not in made
            continue
        option = made[item.name]
        assert option.help == item.metadata["help"]
        assert option.opts == list(item.metadata["option"] or (f"--{item.name.replace('_', '-')}",))
        assert option.default == (None if item.default == () else item.default)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_is_a_sentence(command: str) -> None:
    for option in options(command).values():
        assert re.match(r"[A-Z]", option.help), option.name
        assert option.help.endswith("."), option.name
    assert (COMMANDS[command].run.__doc__ or "").strip().endswith(".")


def test_options_of_old_still_work() -> None:
    """The option names of earlier versions."""
    names = {
        "info": "--json --runtime",
        "train": "--out --method --loss --iterations --batch-size --patch-size --learning-rate --seed --val-fraction"
        " --split-seed --foreground --flip-axis --dice-weight --alpha --sigma --gamma --margin"
        " --temperature --num-samples --beta --latent-size --reconstruction --folds --first-stage-share --estimator"
        " --dice-labels --soft-labels --resume --overwrite --checkpoint-every --device --threads",
        "soft-labels": "--out --networks --iterations --batch-size --patch-size --learning-rate --seed --split-seed"
        " --foreground --flip-axis --dice-weight --alpha --temperature --num-samples --beta --latent-size"
        " --reconstruction --folds --first-stage-share --estimator --resume --overwrite --checkpoint-every --device"
        " --threads",
        "predict": "--out --cases --calibrated --resume --overwrite --device --threads",
        "evaluate": "--out --n-bins --ignore-label --preset --dataset-json --num-resamples --seed --memory --resume"
        " --overwrite --threads --workers",
        "demo": "--out --cases --raters --side --iterations --seed --overwrite --device --threads",
    }
    for command, words in names.items():
        made = {word for option in options(command).values() for word in option.opts if word.startswith("--")}
        assert made == set(words.split())


def test_the_table_of_methods_drives_settings_and_options() -> None:
    names = {item.name for item in fields(TrainConfig)}
    made = options("train")
    for name, method in METHODS.items():
        assert TrainConfig(method=name).method == name
        assert f"{name} ({method.title})" in made["method"].help
        assert set(method.settings) <= names
        for setting, default in method.settings.items():
            assert name in made[setting].help
            assert made[setting].default is None
            words = default if isinstance(default, str) else "fitted" if default is None else f"{default:g}"
            assert f"(default: {words})" in made[setting].help
        assert made["dice_weight"].default is None
        assert method.dice_weight == 0 or f"{method.dice_weight:g} for {name}" in made["dice_weight"].help


def test_a_new_method_needs_an_entry_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new method needs an entry only. This one is half the cross-entropy, with its own default of a setting."""
    plain = METHODS["cross_entropy"].loss
    entry = Method("half", lambda *given, alpha: alpha * plain(*given), {"alpha": 0.5})
    monkeypatch.setitem(methods.METHODS, "half", entry)
    assert TrainConfig(method="half").alpha == 0.5
    make_dataset(tmp_path / "data", DemoConfig(cases=4, raters=2, side=16))
    quick = ["--iterations", 1, "--patch-size", 16, 16, 8, "--val-fraction", 0.5, "--threads", 1]
    code, _, err = run(capsys, "train", tmp_path / "data", "--out", tmp_path / "run", "--method", "half", *quick)
    assert code == 0, err


# ---------------------------------------------------------------------------------------------- imports


def modules_after(*arguments: str) -> set[str]:
    """The modules that are loaded when a command has ended."""
    code = "import sys; from calseg.cli.main import main"
    code += "\ntry: main(sys.argv[1:])\nfinally: print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    return set(result.stdout.splitlines())


def test_info_imports_little() -> None:
    extra = {"monai", "nibabel", "typer", "rich", "matplotlib", "torchmetrics"}
    for arguments in ((), ("--json",)):
        loaded = modules_after("info", *arguments)
        assert "calseg.cli.info" in loaded
        assert not loaded & {"torch", "numpy", "triton", *extra}
    loaded = modules_after("info", "--runtime")
    assert "torch" in loaded
    assert not loaded & extra
    assert not {name for name in loaded if name.startswith(("calseg.training", "calseg.volumes", "calseg.evaluate"))}


def test_help_imports_no_command() -> None:
    for arguments in (("--help",), ("train", "--help")):
        loaded = modules_after(*arguments)
        assert "calseg.cli.commands" in loaded
        assert not loaded & {"monai", "nibabel", "calseg.training.nets", "calseg.evaluate", "calseg.demo"}


def test_evaluate_imports_no_networks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_dataset(tmp_path / "data", DemoConfig(cases=4, raters=2, side=16))
    folders = (str(tmp_path / "data" / "truth"), str(tmp_path / "data" / "labelsTr"))
    loaded = modules_after("evaluate", *folders, "--out", str(tmp_path / "out"), "--num-resamples", "5")
    assert (tmp_path / "out" / "report.json").is_file()
    assert {"nibabel", "calseg.evaluate"} <= loaded
    assert not {name for name in loaded if name.startswith(("monai", "calseg.training"))}
