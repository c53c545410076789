"""Every command killed at its file operations: what it leaves is taken up again and ends with the same bytes."""

from __future__ import annotations

import functools
import json
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("nibabel", "monai", "matplotlib"):
    pytest.importorskip(package)
if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

import matplotlib  # noqa: E402

from calseg import demo, report  # noqa: E402
from calseg.evaluate import evaluate_folders  # noqa: E402
from calseg.files import write_atomic  # noqa: E402
from calseg.report import DIAGRAMS, EvaluateConfig  # noqa: E402
from calseg.runs import read_state  # noqa: E402
from calseg.simulation import DemoConfig, make_dataset  # noqa: E402
from calseg.training import TrainConfig, stage_one, train  # noqa: E402
from calseg.training.checkpoint import load_checkpoint  # noqa: E402
from calseg.training.predict import predict_folder  # noqa: E402

matplotlib.use("agg")

CONFIG = TrainConfig(iterations=4, patch_size=(16, 16, 8), val_fraction=0.5)
CALSEG = TrainConfig(method="calseg", iterations=2, patch_size=(16, 16, 8), val_fraction=0.5, num_samples=1, folds=2)
Command = Callable[..., Any]
COMMANDS: dict[str, Command] = {
    "train": lambda root, out, **how: train(root / "data", out, CONFIG, checkpoint_every=1, **how),
    "train calseg": lambda root, out, **how: train(root / "data", out, CALSEG, **how),
    "soft-labels": lambda root, out, **how: stage_one.estimate(root / "data", out, CALSEG, **how),
    "predict": lambda root, out, **how: predict_folder(root / "run", root / "data", out, cases="all", **how),
    "evaluate": lambda root, out, **how: evaluate_folders(
        root / "data" / "truth", root / "data" / "labelsTr", out, EvaluateConfig(num_resamples=5), **how
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """A forked process has no threads of OpenMP."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    make_dataset(folder / "data", DemoConfig(cases=4, raters=2, side=16))
    train(folder / "data", folder / "run", CONFIG)
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; files with a word in them stand in for the pictures."""

    def draw(out: Path, *rest: Any) -> None:
        for name in DIAGRAMS:
            for ending in ("png", "pdf"):
                write_atomic(out / f"{name}.{ending}", "drawn")

    monkeypatch.setattr(report, "draw_diagrams", draw)
    monkeypatch.setattr(demo, "draw", lambda *rest: b"drawn")


def forked(call: Callable[[], Any], dies_at: int = 0) -> int:
    """Call in a process of its own, which is killed at a file operation; the number of these, or -1 if it was killed.

    An operation is killed before or after it takes effect, by turns.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code, steps = 1, 0
        try:

            def step(operation: Any, *arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == dies_at and dies_at % 2:
                    os._exit(77)
                result = operation(*arguments, **options)
                if steps == dies_at:
                    os._exit(77)
                return result

            for name in ("replace", "fsync", "unlink", "ftruncate"):
                setattr(os, name, functools.partial(step, getattr(os, name)))
            call()
            os.write(writing, str(steps).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        steps = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 77)
    return int(steps) if code == 0 else -1


def results(folder: Path) -> dict[str, Any]:
    """Everything in a folder of results, but for times, the folder's place and its state."""

    def without_times(content: Any) -> Any:
        if isinstance(content, dict):
            return {key: without_times(value) for key, value in content.items() if key not in ("seconds", "data")}
        return content

    def read(path: Path) -> Any:
        if path.name == "checkpoint.pt":
            content = load_checkpoint(path)
            return str(without_times({key: value for key, value in content.items() if key != "model"})), {
                key: value.tolist() for key, value in content["model"].items()
            }
        return without_times(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()

    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "calseg.json")
    return {path.relative_to(folder).as_posix(): read(path) for path in files}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_run_is_taken_up_again(root: Path, tmp_path: Path, command: str) -> None:
    """Killed at random operations, again and again, until it ends; and once more while it replaces a finished run."""
    call = COMMANDS[command]
    count = forked(lambda: call(root, tmp_path / "whole"))
    whole = results(tmp_path / "whole")
    rng = random.Random(command)
    for attempt, how in enumerate(({}, {"overwrite": True})):
        out = tmp_path / str(attempt)
        if how:
            assert forked(lambda out=out: call(root, out)) == count
        ended = forked(lambda out=out, how=how: call(root, out, **how), rng.randint(1, count))
        while ended < 0:
            how = {"resume": read_state(out) is not None}
            ended = forked(lambda out=out, how=how: call(root, out, **how), rng.randint(1, count))
        assert results(out) == whole


def test_a_killed_demo_is_taken_up_again(tmp_path: Path) -> None:
    """It continues by itself, also where it was to replace a finished one."""
    config = DemoConfig(cases=4, raters=2, side=16, iterations=1)

    def call(**how: Any) -> int:
        return forked(lambda: demo.run_demo(tmp_path / "demo", config, **how), rng.randint(1, count))

    count = forked(lambda: demo.run_demo(tmp_path / "demo", config))
    whole = results(tmp_path / "demo")
    rng = random.Random(0)
    ended = call(overwrite=True)
    while ended < 0:
        ended = call()
    assert results(tmp_path / "demo") == whole
