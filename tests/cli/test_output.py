"""Names that are unusual, streams that are closed or full, memory that runs out, signals: one line and an exit code."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("typer", "rich", "monai", "nibabel", "matplotlib"):
    pytest.importorskip(package)

import nibabel  # noqa: E402
from command_line import run  # noqa: E402

from calseg import report  # noqa: E402
from calseg.training import loop  # noqa: E402

QUICK = ["--iterations", "1", "--patch-size", "16", "16", "8", "--val-fraction", "0.5", "--threads", "1"]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a small evaluation."""
    monkeypatch.setattr(report, "draw_diagrams", lambda *arguments: None)


def shell(command: str, *words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command line of the shell; "$@" in it is ``calseg`` with ``words``."""
    calseg = [sys.executable, "-c", "from calseg.cli.main import main; main()", *map(str, words)]
    return subprocess.run(["sh", "-c", command, "sh", *calseg], capture_output=True, text=True, check=False, **options)


# --------------------------------------------------------------------------------------------------- names

ODD_CLASSES = ("[bold]", "[/a] :heart: $x_{", "a name of a class that is as long as " + "long " * 20 + "names are")


def test_class_names_are_text_wherever_they_stand(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"] = {str(number): name for number, name in enumerate(ODD_CLASSES)}
    (folder / "dataset.json").write_text(json.dumps(content))
    code, out, err = run(capsys, "train", folder, "--out", tmp_path / "run", *QUICK)
    assert code == 0, err
    assert "Dice [/a] :heart: $x_{" in out
    code, out, err = run(
        capsys, "evaluate", folder / "truth", folder / "labelsTr", "--out", tmp_path / "out", "--num-resamples", 5
    )
    assert code == 0, err
    assert "[bold]" in out
    assert "[/a] :heart: $x_{" in out
    assert (tmp_path / "out" / "reliability_classes.png").stat().st_size


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", [b"=1+1", b"+a", b"-a", b"@a", b"a b\xff\xe9", "ü[1]*?".encode(), b"x" * 240, b'a,"b'])
def test_case_names_are_text_wherever_they_stand(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, name: bytes
) -> None:
    """Names that a spreadsheet takes for formulas, that are not UTF-8, with brackets and wildcards, and long ones."""
    for part in ("maps", "labels"):
        (tmp_path / part).mkdir()
        source = data / ("truth" if part == "maps" else "labelsTr") / "demo_000.nii.gz"
        shutil.copy(source, os.path.join(os.fsencode(tmp_path / part), name + b".nii.gz"))
    out = tmp_path / "out"
    code, _, err = run(capsys, "evaluate", tmp_path / "maps", tmp_path / "labels", "--out", out, "--num-resamples", 5)
    assert code == 0, err
    with open(out / "cases.csv", newline="", errors="surrogateescape") as file:
        row = next(csv.DictReader(file))
    written = os.fsencode(row["case"])
    assert written == (b"'" + name if name[:1] in b"=+-@" else name)
    code, _, err = run(capsys, "evaluate", tmp_path / "maps", tmp_path / "labels", "--out", out, "--resume")
    assert code == 2  # another number of resamples
    assert len(err.strip().splitlines()) == 1


def test_predictions_of_case_names_that_are_not_utf_8(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    for number in range(4):
        name = os.fsdecode(b"\xe9" * number + b"[a]*")
        for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (folder / part).mkdir(exist_ok=True, parents=True)
            shutil.copy(data / part / f"demo_{number:03d}.nii.gz", folder / part / f"{name}{end}")
    labels = {"background": 0, "lesion": 1, "core": 2}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "a"}, "labels": labels}))
    out = tmp_path / "maps"
    code, _, err = run(capsys, "train", folder, "--out", tmp_path / "run", *QUICK)
    assert code == 0, err
    for words in ([], ["--resume"], ["--overwrite"]):
        code, _, err = run(capsys, "predict", tmp_path / "run", folder, "--out", out, "--cases", "all", *words)
        assert code == 0, err
        written = sorted(path.name for path in out.glob("*.nii.gz"))
        assert written == sorted(path.name for path in (folder / "labelsTr").iterdir())


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "words",
    [
        [LONG],
        ["train", f"--{LONG}"],
        ["train", LONG, "--out", "a"],
        ["train", "a", "--out", LONG],
        ["train", "a", "--out", "b", "--method", LONG],
        ["train", "a", "--out", "b", "--iterations", LONG],
        ["predict", "a\0b\n\x1b[31m", "c", "--out", "d", "--device", LONG],
        ["evaluate", "a", "b", "--out", "c", "--preset", LONG, "--dataset-json", LONG],
        ["evaluate", LONG, LONG, "--out", "c"],
    ],
)
def test_a_long_argument_gives_a_short_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert len(err) < 800
    assert len(err.splitlines()) == 1
    assert err.strip().isprintable()


# ------------------------------------------------------------------------------------------------- streams


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["info"], ["train", "--help"]])
def test_a_full_output(words: list[str]) -> None:
    result = shell('exec "$@" > /dev/full', *words)
    assert result.returncode not in (0, 120)
    assert result.stderr == f"calseg {words[0]}: the output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("words", [["info"], ["train", "--help"]])
def test_a_reader_that_went_away(words: list[str]) -> None:
    result = shell('{ "$@"; echo "code $?" >&2; } | true', *words)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    for words, code in ((["info"], 0), (["nonsense"], 2)):
        result = shell(f'exec "$@" {closed}', *words)
        assert result.returncode == code
        assert "Traceback" not in result.stderr


def test_an_evaluation_without_streams(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["evaluate", data / "truth", data / "labelsTr", "--out", out, "--num-resamples", 5]
    assert shell('exec "$@" <&- >&- 2>&-', *words).returncode == 0
    assert json.loads((out / "report.json").read_text())["cases"] == 4


# -------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 3 TiB"), None])
def test_memory_that_runs_out(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def step(*arguments: Any) -> float:
        if error is not None:
            raise error
        torch.empty(1 << 60)  # what PyTorch says
        return 0.0

    monkeypatch.setattr(loop, "_step", step)
    code, _, err = run(capsys, "train", data, "--out", tmp_path / "run", *QUICK)
    assert code == 2
    assert "calseg train: not enough memory (" in err.splitlines()[-1]
    assert "Traceback" not in err


# -------------------------------------------------------------------------------------------------- signals


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_saves_the_training(data: Path, tmp_path: Path, name: str) -> None:
    code = (
        "import os, signal, sys; from calseg.cli import main; from calseg.training import loop; step = loop._step\n"
        f"def hurt(*a): os.kill(os.getpid(), signal.{name}); return step(*a)\n"
        "loop._step = hurt; main.main()"
    )
    words = ["train", str(data), "--out", str(tmp_path / "run"), *QUICK, "--iterations", "9"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 128 + getattr(signal, name)
    assert "interrupted after iteration 1, which is saved in" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_nohup_is_respected(data: Path, tmp_path: Path) -> None:
    """A hang-up that the process was started to ignore stays ignored."""
    result = shell(
        'trap "" HUP; "$@" & sleep 0; kill -HUP $!; wait $!; exit $?', "train", data, "--out", tmp_path / "run", *QUICK
    )
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------ bad files


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(20))
def test_damaged_files_end_with_one_line(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, seed: int
) -> None:
    """Headers with random bytes: a result or one line, never a traceback."""
    rng = np.random.default_rng(seed)
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    part = ("imagesTr", "labelsTr", "truth")[seed % 3]
    path = folder / part / "demo_000.nii.gz"
    content = bytearray(nibabel.load(path).to_bytes())
    for place in rng.integers(0, 352, int(rng.integers(1, 8))):
        content[place] = int(rng.integers(256))
    plain = path.with_suffix("")
    path.unlink()
    plain.write_bytes(content)
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace(f"{part}/demo_000.nii.gz", f"{part}/demo_000.nii"))
    for words in (
        ["train", folder, "--out", tmp_path / "run", *QUICK],
        ["evaluate", folder / "truth", folder / "labelsTr", "--out", tmp_path / "out", "--num-resamples", 2],
    ):
        code, _, err = run(capsys, *words)
        assert code in (0, 2)
        assert "Traceback" not in err
        if code == 2:
            assert len(err.strip().splitlines()[-1]) < 700
