"""Commands that would cost a user files: results aimed at inputs or at foreign files, and names that lead elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

for package in ("typer", "rich", "monai", "nibabel", "matplotlib"):
    pytest.importorskip(package)

from command_line import run  # noqa: E402

from calseg.simulation import DemoConfig, make_dataset  # noqa: E402
from calseg.training import TrainConfig, train  # noqa: E402

QUICK = "--iterations 1 --patch-size 16 16 8 --threads 1"
STAGE_ONE = f"{QUICK} --folds 2 --num-samples 1"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a run, probability maps, and a folder with foreign files of the names that commands write."""
    root = tmp_path_factory.mktemp("pristine")
    make_dataset(root / "data", DemoConfig(cases=4, raters=2, side=16))
    train(root / "data", root / "run", TrainConfig(iterations=1, patch_size=(16, 16, 8), val_fraction=0.5))
    shutil.copytree(root / "data" / "truth", root / "maps")
    for name in (
        "config.json", "report.json", "cases.csv", "cases.jsonl", "checkpoint.pt", "split.json", "metrics.json",
        "predict.json", "demo.json", "demo.png", "soft_labels.json", "soft_labels/demo_000.nii.gz", "demo_000.nii.gz",
        "stage1/fold_0/checkpoint.pt", "data/dataset.json", "data/imagesTr/demo_000.nii.gz", "reliability_all.png",
        "dice_cross_entropy/metrics.json",
    ):  # fmt: skip
        (root / "foreign" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "foreign" / name).write_text("mine")
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(pristine, tmp_path / "root")
    (tmp_path / "root" / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path / "root"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


COMMANDS = {
    "train": f"train data --out {{out}} {QUICK} --val-fraction 0.5",
    "train calseg": f"train data --out {{out}} --method calseg {STAGE_ONE} --val-fraction 0.5",
    "soft-labels": f"soft-labels data --out {{out}} {STAGE_ONE}",
    "predict": "predict run data --out {out} --cases all",
    "evaluate": "evaluate maps data/labelsTr --out {out} --num-resamples 5",
    "demo": "demo --out {out} --cases 4 --raters 2 --side 16 --iterations 1",
}
TARGETS = {
    "data": COMMANDS.keys() - {"evaluate", "demo"},
    "./data/": COMMANDS.keys() - {"evaluate", "demo"},
    "run/../data": COMMANDS.keys() - {"evaluate", "demo"},
    "link": COMMANDS.keys() - {"evaluate", "demo"},
    "data/labelsTr": COMMANDS.keys() - {"demo"},
    "link/labelsTr": COMMANDS.keys() - {"demo"},
    "data/imagesTr": COMMANDS.keys() - {"evaluate", "demo"},
    "data/new": COMMANDS.keys() - {"evaluate", "demo"},
    ".": COMMANDS.keys() - {"demo"},
    "maps": {"evaluate"},
    "maps/report": {"evaluate"},
    "run": {"predict"},
    "run/maps": {"predict"},
    "foreign": COMMANDS.keys(),
}


@pytest.mark.parametrize(
    ("command", "target"), [(command, target) for target, commands in TARGETS.items() for command in sorted(commands)]
)
@pytest.mark.parametrize("how", ["--overwrite", "--resume", ""])
def test_no_command_touches_what_it_did_not_write(
    capsys: pytest.CaptureFixture[str], root: Path, command: str, target: str, how: str
) -> None:
    if command == "demo" and how == "--resume":
        pytest.skip("the demo continues by itself")
    before = files(root)
    code, _, err = run(capsys, *COMMANDS[command].format(out=target).split(), *how.split())
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    if target != "foreign":
        assert "the folder of the results" in err
    assert files(root) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_another_commands_run_is_not_replaced(capsys: pytest.CaptureFixture[str], root: Path, command: str) -> None:
    """A run of ``train`` for the others, and of ``predict`` for it."""
    shutil.copytree("run", "second")
    if command.startswith("train"):
        shutil.rmtree("second")
        assert run(capsys, *COMMANDS["predict"].format(out="second").split())[0] == 0
    before = files(root)
    code, _, err = run(capsys, *COMMANDS[command].format(out="second").split(), "--overwrite")
    assert code == 2
    assert "second: holds a run of calseg" in err
    assert files(root) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_overwriting_keeps_what_a_user_added(capsys: pytest.CaptureFixture[str], root: Path, command: str) -> None:
    words = [*COMMANDS[command].format(out="out").split()]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    written = files(root / "out")
    for folder in {Path(name).parent for name in written}:
        (root / "out" / folder / "mine.nii.gz").write_text("mine")
        (root / "out" / folder / "mine.json").write_text("mine")
    added = files(root / "out").keys() - written.keys()
    code, _, err = run(capsys, *words, "--overwrite")
    assert code == 0, err
    assert files(root / "out").keys() == written.keys() | added
    assert {(root / "out" / name).read_text() for name in added} == {"mine"}


@pytest.mark.parametrize("command", ["train", "train calseg", "soft-labels", "predict"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "x" * 249])
def test_names_of_cases_lead_nowhere(capsys: pytest.CaptureFixture[str], root: Path, command: str, name: str) -> None:
    content = json.loads(Path("data/dataset.json").read_text())
    paths = {"images": ["imagesTr/demo_000.nii.gz"], "label": "labelsTr/demo_000.nii.gz"}
    del content["training"]
    content |= {"channel_names": content["modality"], "dataset": {name: paths, "b": paths, "c": paths}}
    content["labels"] = {value: int(key) for key, value in content["labels"].items()}
    Path("data/dataset.json").write_text(json.dumps(content))
    before = files(root.parent)
    code, _, err = run(capsys, *COMMANDS[command].format(out="out").split())
    assert code == 2
    assert "data/dataset.json: the case name" in err
    assert len(err.strip().splitlines()) == 1
    assert files(root.parent) == before
