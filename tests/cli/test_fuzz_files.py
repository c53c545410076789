"""Commands on files with wrong content: a result, or one line and the exit code 2, and never a traceback.

The state files of the table are tried in every run of the tests. ``pytest -m fuzz tests/cli/test_fuzz_files.py`` tries
1000 files with random content; ``CALSEG_FUZZ`` sets another number, ``CALSEG_FUZZ_SEED`` where the seeds begin.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "monai", "nibabel", "matplotlib"):
    pytest.importorskip(package)

from command_line import run  # noqa: E402

from calseg import demo, report  # noqa: E402
from calseg.simulation import DemoConfig, make_dataset  # noqa: E402

CALLS, FIRST = int(os.environ.get("CALSEG_FUZZ", 1000)), int(os.environ.get("CALSEG_FUZZ_SEED", 0))
CHUNK = 25
QUICK = "--iterations 1 --patch-size 16 16 8 --threads 1"
CALSEG = f"{QUICK} --folds 2 --num-samples 1"
DATA = ("data/dataset.json", "data/imagesTr/demo_000.nii.gz", "data/labelsTr/demo_001.nii.gz")
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": (f"train data --out run {QUICK} --val-fraction 0.5", ("checkpoint.pt", *DATA)),
    "two": (f"train data --out two --method calseg {CALSEG} --val-fraction 0.5", ("checkpoint.pt", "soft_labels.json")),
    "soft": (f"soft-labels data --out soft {CALSEG}", ("soft_labels.json", "stage1/fold_0/checkpoint.pt", *DATA)),
    "maps": ("predict run data --out maps --cases all", ("run/checkpoint.pt", *DATA)),
    "scores": ("evaluate maps data/labelsTr --out scores --num-resamples 2", (
        "cases.jsonl", "maps/demo_000.nii.gz", "data/labelsTr/demo_001.nii.gz", "data/dataset.json")),
    "demo": ("demo --out demo --cases 4 --raters 2 --side 16 --iterations 1", (
        "demo.json", "data/dataset.json", "calseg/calseg.json", "calseg/soft_labels.json")),
}  # fmt: skip
"""For each folder of results the command that writes it, and files that it reads when it goes on."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    make_dataset(root / "data", DemoConfig(cases=4, raters=2, side=16))
    return root


@pytest.fixture
def root(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Path:
    """The folders of all commands, finished, as the working directory."""
    monkeypatch.setattr(report, "draw_diagrams", lambda *arguments: None)
    monkeypatch.setattr(demo, "draw", lambda *arguments: b"drawn")
    monkeypatch.chdir(finished)
    for out, (words, _) in COMMANDS.items():
        if not Path(out).exists():
            assert run(capsys, *words.split())[0] == 0
    monkeypatch.chdir(tmp_path)
    return finished


def outcome(capsys: pytest.CaptureFixture[str], root: Path, out: str, file: str, content: bytes, fresh: bool) -> str:
    """The message of a command whose ``file`` has that content; empty if it ended well."""
    for name in ("work", "unrelated"):
        shutil.rmtree(name, ignore_errors=True)
    shutil.copytree(root, "work")
    os.chdir("work")
    try:
        words = COMMANDS[out][0].split()
        Path(file).write_bytes(content)
        if fresh and out != "demo":
            words[words.index("--out") + 1] = "new"
        elif out != "demo":
            words.append("--resume")
        code, _, err = run(capsys, *words)
    finally:
        os.chdir("..")
    assert code in (0, 2)
    assert "Traceback" not in err
    if code == 0:
        return ""
    message = err.strip().splitlines()[-1]  # after the bars of the progress
    assert message.startswith(f"calseg {words[0]}: ")
    assert len(message) < 800
    return message


# ------------------------------------------------------------------------------------------- state files


def changed(**entries: Any) -> Callable[[Any], Any]:
    return lambda content: {**content, **entries}


def of_case(**entries: Any) -> Callable[[Any], Any]:
    return lambda content: {**content, "cases": {**content["cases"], "demo_000": entries}}


def without(name: str) -> Callable[[Any], Any]:
    return lambda content: {key: value for key, value in content.items() if key != name}


QUALITY = {"dice": 0.5, "nll": 0.5, "confidence": 0.5, "accuracy": 0.5}
SUMMARIES = (
    without("cases"),
    changed(cases=[]),
    changed(cases={"another": QUALITY}),
    changed(temperature=None),
    changed(temperature=0),
    changed(temperature=float("nan")),
    of_case(dice=0.5),
    of_case(**{**QUALITY, "nll": "low"}),
    of_case(**{**QUALITY, "nll": float("inf")}),
    lambda content: [content],
)
LINES = (
    without("case"),
    without("bins"),
    without("hits"),
    changed(case=[]),
    changed(more=1),
    changed(labelled=[1, 2]),
    *(changed(hits=value) for value in (3, ["a"], [0.5, 1, 2], [10**30, 1, 2])),
    *(changed(bins=value) for value in ([], {}, None)),
    lambda content: {**content, "bins": {**content["bins"], "all": None}},
    lambda content: 3,
    lambda content: None,
)
RUNS = (without("inputs"), changed(files=[3]), changed(settings=None), lambda content: "state")
STATES: list[tuple[str, str, Callable[[Any], Any], str]] = [
    *(("soft", "soft_labels.json", edit, "soft/soft_labels.json: not what the first stage") for edit in SUMMARIES),
    *(
        ("two", "soft_labels.json", edit, "two/soft_labels.json: not what the first stage")
        for edit in (*SUMMARIES, without("seconds"), changed(estimate={}))
    ),
    *(("scores", "cases.jsonl", edit, "scores/cases.jsonl: line 1 is corrupt; give --overwrite") for edit in LINES),
    *(
        (out, "calseg.json", edit, f"{out}/calseg.json: not the state of a run of this version of calseg")
        for out in COMMANDS
        for edit in RUNS
    ),
]


@pytest.mark.parametrize("number", range(len(STATES)))
def test_a_state_file_with_wrong_content(root: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    out, name, edit, message = STATES[number]
    text = (root / out / name).read_text()
    end = text.index("\n") if name.endswith(".jsonl") else len(text)
    content = json.dumps(edit(json.loads(text[:end]))) + text[end:]
    assert message in outcome(capsys, root, out, f"{out}/{name}", content.encode(), fresh=False)


# -------------------------------------------------------------------------------------------- random files

JUNK = (
    None,
    True,
    -1,
    0,
    1,
    10**30,
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "../a",
    "\0",
    [],
    {},
    [[]],
    {"a": 1},
)


def mutated(content: Any, rng: random.Random) -> Any:
    """The content of a JSON file with something wrong at a random place."""
    if isinstance(content, (dict, list)) and content and rng.random() < 0.85:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        content = content.copy()
        if rng.random() < 0.15:
            del content[key]
        else:
            content[key] = mutated(content[key], rng)
        return content
    return rng.choice(JUNK)


def scrambled(content: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them wrong, missing or added."""
    kind, place = rng.randrange(5), rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return rng.randbytes(rng.randrange(2000))
    if kind == 2:
        return content[:place] + rng.randbytes(rng.randrange(1, 20)) + content[place:]
    if kind == 3:
        return content[: place // 2] + content[place:]
    several = bytearray(content)
    for _ in range(rng.randint(1, 9)):
        several[rng.randrange(min(len(several), rng.choice((400, len(several)))))] = rng.randrange(256)
    return bytes(several)


def spoilt(path: Path, rng: random.Random) -> bytes:
    """The content of a file with something wrong: of its text, of the numbers in it, or of its bytes."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.8:
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(mutated(json.loads(lines[number]), rng)).encode()
        return b"\n".join([*lines, b""])
    if path.suffix == ".gz" and rng.random() < 0.8:
        return gzip.compress(scrambled(gzip.decompress(content), rng), 1)
    return scrambled(content, rng)


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(FIRST, FIRST + CALLS, CHUNK))
def test_random_files(root: Path, capsys: pytest.CaptureFixture[str], first: int) -> None:
    for seed in range(first, first + CHUNK):
        rng = random.Random(seed)
        out = rng.choice(list(COMMANDS))
        name = rng.choice(("calseg.json", *COMMANDS[out][1]))
        file = name if (root / name).is_file() and out != "demo" else f"{out}/{name}"
        content = spoilt(root / file, rng)
        try:
            outcome(capsys, root, out, file, content, fresh=rng.random() < 0.3)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {out} with another {file}") from error
