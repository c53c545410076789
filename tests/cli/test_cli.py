"""The command line: exit codes, one-line errors, resumption, and what works without the extra."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "monai", "nibabel"):
    pytest.importorskip(package)

from command_line import run  # noqa: E402

import calseg  # noqa: E402
from calseg import installation  # noqa: E402
from calseg.simulation import DemoConfig, make_dataset  # noqa: E402
from calseg.training import loop  # noqa: E402

QUICK = ["--iterations", "3", "--patch-size", "16", "16", "8", "--val-fraction", "0.5", "--threads", "1"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert re.search(rf"^calseg +{re.escape(calseg.info()['calseg'])}$", out, re.MULTILINE)
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    assert json.loads(out) == installation.installed()
    code, out, _ = run(capsys, "info", "--json", "--runtime")
    assert code == 0
    everything = calseg.info()
    assert json.loads(out) == everything
    assert everything.items() >= installation.installed().items()


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert all(command in out for command in ("info", "demo", "train"))


def test_train_resume_and_table(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "run"
    code, out, err = run(capsys, "train", data, "--out", out_folder, "--loss", "vls", "--alpha", "0.2", *QUICK)
    assert code == 0, err
    metrics = json.loads((out_folder / "metrics.json").read_text())
    assert metrics["config"]["alpha"] == 0.2
    assert metrics["config"]["patch_size"] == [16, 16, 8]
    for row in (
        f"Dice lesion.*{metrics['dice']['lesion']:.4f}",
        f"ECE.*near.*{metrics['near']['ece']:.4f}",
        f"NLL.*all.*{metrics['all']['nll']:.4f}",
        f"Brier.*foreground.*{metrics['foreground']['brier']:.4f}",
        f"ECE.*foreground.*{metrics['foreground']['ece']:.4f}",
    ):
        assert re.search(row, out)
    regions = re.findall(r"│ (?:ECE|NLL|Brier) +│ (\w+)", out)
    assert regions == ["near"] * 3 + ["all"] * 3 + ["foreground"] * 3
    assert "the outcome itself chooses this region" in out
    # Resuming takes the settings from the run; what is typed and differs is refused.
    code, _, _ = run(capsys, "train", data, "--out", out_folder, "--resume")
    assert code == 0
    assert json.loads((out_folder / "metrics.json").read_text())["all"] == metrics["all"]
    code, _, err = run(capsys, "train", data, "--out", out_folder, "--resume", "--alpha", "0.3", "--flip-axis", "1")
    assert code == 2
    assert "flip_axes is [1] but was []; alpha is 0.3 but was 0.2" in err
    code, _, err = run(capsys, "train", data, "--out", out_folder)
    assert code == 2
    assert "not empty" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing argument"),
        (["train", "{data}"], "Missing option"),
        (["train", "{data}", "--out", "{tmp}/run", "--iterations", "few"], "Invalid value"),
        (
            ["train", "{data}", "--out", "{tmp}/run", "--method", "dice"],
            "method must be one of cross_entropy, dice_cross_entropy",
        ),
        (["train", "{tmp}/nowhere", "--out", "{tmp}/run"], "nowhere: no such folder"),
        (["train", "{data}", "--out", "{tmp}/run", "--resume"], "no run to resume"),
        (["train", "{data}", "--out", "{tmp}/run", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["demo", "--out", "{data}"], "not made by calseg demo"),
        (["demo", "--raters", "1"], "raters must be at least 2"),
        (["dance"], "No such command"),
        (["--loud"], "No such option"),
    ],
)
def test_mistakes_give_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = run(capsys, *(word.format(data=data, tmp=tmp_path) for word in arguments))
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("calseg")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_corrupt_label_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", DemoConfig(cases=4, raters=2, side=16))
    path = tmp_path / "data" / "labelsTr" / "demo_002.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    code, _, err = run(capsys, "train", tmp_path / "data", "--out", tmp_path / "run", *QUICK)
    assert code == 2
    assert f"{path}: cannot be read" in err.splitlines()[-1]
    assert "Traceback" not in err


def interrupt_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT before every update."""
    step = loop._step

    def interrupted(*arguments: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", interrupted)


def test_ctrl_c_says_how_to_continue(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_training(monkeypatch)
    folder = tmp_path / "a run"
    code, _, err = run(capsys, "train", data, "--out", folder, "--overwrite", *QUICK)
    assert code == 130
    assert f"calseg train {data} --out '{folder}'" in err
    assert "--overwrite" not in err
    assert err.rstrip().endswith("--resume")
    monkeypatch.undo()
    code, _, err = run(capsys, "train", data, "--out", folder, "--resume")
    assert code == 0, err


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--cases", "4", "--raters", "2", "--side", "16", "--iterations", "2", "--threads", "1"]
    code, out, err = run(capsys, "demo", "--out", tmp_path / "demo", *small)
    assert code == 0, err
    results = json.loads((tmp_path / "demo" / "demo.json").read_text())["results"]
    row = [f"{results[method]['raters']['all']['ece']:.4f}" for method in ("dice_cross_entropy", "calseg")]
    assert re.search(rf"ECE.*other raters.*{row[0]}.*{row[1]}", out)
    plain, both = (results[method]["seconds"] for method in ("dice_cross_entropy", "calseg"))
    seconds = [f"{plain['train']:.0f}", f"{both['stage1'] + both['train']:.0f}"]
    assert re.search(rf"training.*all stages.* {seconds[0]} .* {seconds[1]} ", out)
    assert (tmp_path / "demo" / "data" / "truth" / "demo_000.nii.gz").is_file()


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from calseg.cli.main import main
main(sys.argv[1:])
"""


def without(missing: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCK.format(missing=missing)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_without_the_extra() -> None:
    everything = {"typer", "rich", "monai", "nibabel", "click"}
    info = without(everything, "info", "--json")
    assert info.returncode == 0, info.stderr
    assert json.loads(info.stdout)["calseg"] == calseg.info()["calseg"]
    train = without(everything, "train", "x", "--out", "y")
    assert (train.returncode, train.stdout) == (2, "")
    assert train.stderr == "calseg train: needs typer: pip install 'calseg[train]'\n"
    demo = without({"monai"}, "demo")
    assert demo.returncode == 2
    assert demo.stderr == "calseg demo: needs monai: pip install 'calseg[train]'\n"


def test_importing_calseg_imports_nothing_of_the_extra() -> None:
    code = "import sys, calseg; print([n for n in ('typer', 'rich', 'monai', 'nibabel') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_soft_labels_and_training_on_them(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    quick = ["--iterations", "2", "--patch-size", "16", "16", "8", "--num-samples", "2", "--threads", "1"]
    first, again, second = tmp_path / "first", tmp_path / "again", tmp_path / "second"
    code, out, err = run(capsys, "soft-labels", data, "--out", first, "--folds", "2", "--alpha", "0.3", *quick)
    assert code == 0, err
    summary = json.loads((first / "soft_labels.json").read_text())
    assert summary["config"]["alpha"] == 0.3
    assert f"confidence {summary['estimate']['confidence']:.4f}" in out
    assert len(list((first / "soft_labels").glob("*.nii.gz"))) == 4
    code, _, err = run(capsys, "soft-labels", data, "--out", first, "--resume")  # the settings are the run's
    assert code == 0, err
    code, _, err = run(
        capsys, "soft-labels", data, "--out", again, "--networks", first, "--folds", "2", "--temperature", "2", *quick
    )
    assert code == 0, err
    assert not list(again.glob("stage1/*/checkpoint.pt"))
    on_them = ["--method", "calseg", "--soft-labels", again / "soft_labels", *quick]
    code, out, err = run(capsys, "train", data, "--out", second, *on_them)
    assert code == 0, err
    assert "calseg" in out
    code, _, err = run(capsys, "train", data, "--out", tmp_path / "x", "--soft-labels", again / "soft_labels")
    assert code == 2
    assert "soft labels go with the method calseg" in err


def test_ctrl_c_in_the_first_stage_says_how_to_continue(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_training(monkeypatch)
    words = ["train", data, "--out", tmp_path / "run", "--method", "calseg", "--alpha", "0.3", "--folds", "2", *QUICK]
    code, _, err = run(capsys, *words)
    assert code == 130
    assert "fold_0" in err
    assert err.rstrip().endswith("--resume")
    monkeypatch.undo()
    code, _, err = run(capsys, "train", data, "--out", tmp_path / "run", "--resume")  # nothing else need be typed
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["alpha"] == 0.3
