"""Files written whole, what a run owns, its lock, and the rule by which a run starts in a folder or goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calseg.errors import RunError, listing
from calseg.files import InputFile, as_json, file_digest, file_stamp, read_json, write_atomic, write_json
from calseg.runs import STATE, RunFolder, _locked, check_apart, read_state


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"ece": float(np.nan)})
    assert not list(tmp_path.iterdir())


def test_files_are_read_as_written_and_errors_name_them(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"sides": (1, 2)})
    assert read_json(tmp_path / "a.json") == as_json({"sides": (1, 2)}) == {"sides": [1, 2]}
    write_atomic(tmp_path / "b.json", b"{")
    for name in ("b.json", "c.json"):
        with pytest.raises(RunError, match=rf"{name}: not readable as JSON"):
            read_json(tmp_path / name)
    with pytest.raises(RunError, match=r"a.txt: cannot be written \(No such file or directory\)$"):
        write_atomic(tmp_path / "none" / "a.txt", "text")


FILES = ("state.json", "report.json", "maps/a.gz", "maps/b.gz")
SETTINGS = {"a": 1, "b": (2,)}


def folder(path: Path, **options: Any) -> RunFolder:
    return RunFolder(path, options.pop("command", "train"), options.pop("files", FILES), **options)


def begun(path: Path, **options: Any) -> RunFolder:
    """A folder with a run that was stopped, a temporary file of its, and files that are not the run's."""
    run = folder(path, **options)
    with run.open(SETTINGS, {"the split": [1, 2]}) as open_run:
        assert not open_run.is_resumed
        open_run.write("report.json", "ours")
        open_run.write("maps/a.gz", "ours")
    for name in ("maps/.calseg.123.tmp", "notes.txt", "maps/b.nii", ".notes.txt.1.tmp"):
        (path / name).write_text("theirs")
    return run


def refused(run: RunFolder, message: str, *given: Any, **how: bool) -> str:
    """Check that a run is refused with a message, and return it."""
    with pytest.raises(RunError, match=message) as caught, run.open(*given, **how):
        pytest.fail("the run began")
    return str(caught.value)


FOREIGN = {"notes.txt", "maps/b.nii", ".notes.txt.1.tmp"}


def content(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_a_new_run_makes_its_folders(tmp_path: Path) -> None:
    run = folder(tmp_path / "a" / "b")
    refused(run, r"calseg.json: not found; there is no run to resume in .*b$", SETTINGS, resume=True)
    assert not (tmp_path / "a").exists()
    with run.open(SETTINGS, overwrite=True) as begun_run:
        assert content(run.path) == {STATE, ".calseg.lock"}
        assert not begun_run.holds("maps/a.gz")
        begun_run.write("maps/a.gz", b"1")
        assert begun_run.holds("maps/a.gz")
    assert content(run.path) == {STATE, "maps/a.gz"}


def test_a_run_goes_on_and_leftovers_go(tmp_path: Path) -> None:
    run = begun(tmp_path)
    refused(run, "not empty; give --resume to continue the run in it, or --overwrite", SETTINGS)
    assert "maps/.calseg.123.tmp" in content(tmp_path)
    with run.open(SETTINGS, {"the split": (1, 2)}, resume=True) as again:
        assert again.is_resumed
        assert again.holds("report.json")
        assert not again.holds("maps/b.gz")
    assert content(tmp_path) == {STATE, "report.json", "maps/a.gz", *FOREIGN}
    refused(run, "--resume and --overwrite exclude each other", SETTINGS, resume=True, overwrite=True)


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run = begun(tmp_path)
    with run.open({"a": 2}, overwrite=True) as again:
        assert not again.is_resumed
        assert content(tmp_path) == {STATE, ".calseg.lock", *FOREIGN}
    state = read_state(tmp_path)
    assert state is not None
    assert (state.settings, state.files) == ({"a": 2}, [])
    for options, message in (
        ({"command": "evaluate"}, r"holds a run of calseg train; move it, or give another --out"),
        ({"files": (*FILES, "notes.txt")}, r"notes.txt: was not written by this run, and is not replaced; move it"),
    ):
        for how in ({"overwrite": True}, {"resume": True}):
            refused(folder(tmp_path, **options), message, {"a": 2}, **how)
    refused(folder(tmp_path / "notes.txt"), r"notes.txt: exists and is not a folder", {}, overwrite=True)


def test_a_folder_without_a_run_gives_no_file_away(tmp_path: Path) -> None:
    """An earlier run is known by its state alone; a file that only has the name of one of its files is foreign."""
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a.gz").write_text("theirs")
    for how, message in (
        ({}, "not empty and without a run; give --overwrite to add to its files, or give another --out"),
        ({"resume": True}, "there is no run to resume"),
        ({"overwrite": True}, r"maps.a.gz: was not written by this run, and is not replaced"),
    ):
        refused(folder(tmp_path), message, SETTINGS, **how)
    assert content(tmp_path) == {"maps/a.gz"}
    with folder(tmp_path, files=("report.json",)).open(SETTINGS, overwrite=True) as run:
        run.write("report.json", "ours")
        with pytest.raises(RunError, match=r"maps.a.gz: was not written by this run"):
            run.write("maps/a.gz", "ours")
    assert (tmp_path / "maps" / "a.gz").read_text() == "theirs"


def test_a_file_that_a_user_puts_in_a_files_place_is_not_replaced(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (tmp_path / "maps" / "b.gz").write_text("theirs")
    for how in ({"resume": True}, {"overwrite": True}):
        refused(run, r"maps.b.gz: was not written by this run", SETTINGS, {"the split": [1, 2]}, **how)
    assert (tmp_path / "maps" / "a.gz").read_text() == "ours"


@pytest.mark.parametrize("link", ["maps", "report.json", STATE])
def test_links_are_not_followed(tmp_path: Path, link: str) -> None:
    """A folder of the run that became a link leads to files of others that have the names of the run's."""
    run = begun(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run" / link).rename(elsewhere)
    (tmp_path / "run" / link).symlink_to(elsewhere)
    kept = elsewhere / "a.gz" if elsewhere.is_dir() else elsewhere
    before = kept.read_text()
    for how in ({"resume": True}, {"overwrite": True}):
        refused(run, r"is a symbolic link|no run to resume", SETTINGS, {"the split": [1, 2]}, **how)
    assert kept.read_text() == before


def test_a_link_in_a_temporary_files_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / f".calseg.{os.getpid()}.tmp").symlink_to(tmp_path / "theirs")
    write_atomic(tmp_path / "ours", "ours")
    assert content(tmp_path) == {"theirs", "ours"}
    assert (tmp_path / "theirs").read_text() == "theirs"


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["../victim"]},
        {"files": ["/victim"]},
        {"files": [""]},
        {"files": [3]},
        {"files": "report.json"},
        {"settings": []},
        {"inputs": {"a": 3}},
        {"format": 99},
        {"more": 1},
    ],
)
def test_a_state_that_calseg_did_not_write_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run = begun(tmp_path / "run")
    (tmp_path / "victim").write_text("theirs")
    path = tmp_path / "run" / STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for how in ({}, {"resume": True}, {"overwrite": True}):
        refused(
            run,
            r"calseg.json: (not the state|the run is of another)",
            SETTINGS,
            {"the split": [1, 2]},
            **how,
        )
    assert (tmp_path / "victim").exists()
    assert (tmp_path / "run" / "maps" / "a.gz").exists()


@pytest.mark.parametrize("stop", range(1, 9))
def test_overwriting_that_is_killed_is_taken_up_again(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever step, the next run starts anew and sees nothing of the old one."""
    run = begun(tmp_path)
    steps = 0

    def dies(name: str) -> None:
        plain = getattr(os, name)

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == stop:
                raise KeyboardInterrupt
            return plain(*arguments, **options)

        monkeypatch.setattr(os, name, step)

    for name in ("replace", "unlink", "fsync"):
        dies(name)
    with pytest.raises(KeyboardInterrupt), run.open({"a": 5}, overwrite=True):
        raise KeyboardInterrupt
    monkeypatch.undo()
    state = read_state(tmp_path)
    assert state is not None
    with run.open(state.settings, state.data, resume=True) as again:
        if state.settings == {"a": 5}:
            assert not again.holds("report.json")
            assert not (tmp_path / "maps" / "a.gz").exists()
        else:
            assert again.holds("report.json")
    assert content(tmp_path) >= FOREIGN


def test_a_run_that_was_stopped_before_its_state_was_written_starts_anew(tmp_path: Path) -> None:
    (tmp_path / ".calseg.lock").write_text("calseg: process 1 on somewhere")
    (tmp_path / ".calseg.77.tmp").write_text("{")
    with folder(tmp_path).open(SETTINGS) as run:
        assert not run.is_resumed
    assert content(tmp_path) == {STATE}


def test_what_differs_is_named(tmp_path: Path) -> None:
    run = begun(tmp_path)
    for settings, data, message in (
        ({"a": 3, "b": [2], "c": 4}, {}, r"resumed with other settings: a is 3 but was 1; c is 4 but was None$"),
        (SETTINGS, {"the split": [1]}, r"cannot be resumed on other data: the split changed since$"),
        ({"a": "x" * 10_000}, {}, r"a is 'xx.* \.\.\. x.*' but was 1$"),
    ):
        assert len(refused(run, message, settings, data, resume=True)) < 600


def test_a_command_that_continues_by_itself(tmp_path: Path) -> None:
    part = folder(tmp_path / "part", files=("a",))
    run = folder(tmp_path, command="demo", files=("demo.json",), continues=True, parts=(part,))
    (tmp_path / "notes.txt").write_text("theirs")
    refused(
        run,
        "not empty and not made by calseg demo; give --overwrite to add to its files, or give",
        SETTINGS,
    )
    with run.open(SETTINGS, overwrite=True) as demo:
        assert not demo.is_resumed
        with part.open({"a": 3}) as inner:
            inner.write("a", "ours")
    (tmp_path / "part" / "b").write_text("theirs")
    with run.open(SETTINGS) as demo:
        assert demo.is_resumed
    refused(run, r"holds a demo with other settings \(a is 2 but was 1\); give --overwrite or", {"a": 2})
    with run.open({"a": 2}, overwrite=True):
        assert content(tmp_path) == {STATE, ".calseg.lock", "part/b", "notes.txt"}
    (tmp_path / STATE).unlink()
    (tmp_path / "part" / "b").unlink()
    begun(tmp_path / "part")
    refused(run, "part: holds a run that this one did not make; give another --out", SETTINGS, overwrite=True)


def test_advice_names_only_options_that_the_command_has(tmp_path: Path) -> None:
    run = begun(tmp_path, has_out=False, has_resume=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("theirs")
    bare = {"has_out": False, "has_resume": False}
    messages = [
        refused(run, "not empty; give --overwrite to start anew$", SETTINGS),
        refused(folder(tmp_path, command="predict", **bare), "holds a run of calseg train; move it$", SETTINGS),
        refused(folder(tmp_path / "foreign", **bare), "give --overwrite to add to its files$", SETTINGS),
        refused(folder(tmp_path, files=(*FILES, "notes.txt"), **bare), "move it$", SETTINGS, overwrite=True),
    ]
    with run.open(SETTINGS, overwrite=True):
        messages.append(refused(run, "wait until it has ended$", SETTINGS, overwrite=True))
    (tmp_path / ".calseg.lock").write_text("theirs")
    messages.append(refused(run, "is no lock of calseg; move it$", SETTINGS, overwrite=True))
    (tmp_path / ".calseg.lock").unlink()
    (tmp_path / STATE).write_text("{}")
    messages.append(refused(run, "not the state of a run of this version of calseg; move it away$", SETTINGS))
    assert not [message for message in messages if "--out" in message or "--resume" in message]


def test_names_that_the_file_system_does_not_take(tmp_path: Path) -> None:
    with folder(tmp_path / "a", files=("x" * 255,)).open({}) as run:
        run.write("x" * 255, "as long as can be")
    refused(
        folder(tmp_path / "b", files=("x" * 254 + "é",)),
        r"xxx \.\.\. xxx.*: a file name of 256 bytes; .* takes up to 255$",
        {},
    )
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------------------------- inputs


def test_results_are_kept_apart_from_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    (data / "labelsTr").mkdir(parents=True)
    (data / "labelsTr" / "a.nii.gz").write_text("label")
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "b.nii.gz").write_text("label")
    (data / "labelsTr" / "b.nii.gz").symlink_to(tmp_path / "store" / "b.nii.gz")
    monkeypatch.chdir(data)
    labels = list((data / "labelsTr").iterdir())
    for out, inputs, files, relation in (
        (data, [data], [], "is the input"),
        (Path(), [data], [], "is the input"),
        (Path("../link"), [data], [], "is the input"),
        (data, [tmp_path / "link"], [], "is the input"),
        (data / "labelsTr", [data], [], "lies in the input"),
        (data / "new" / "run", [data], [], "lies in the input"),
        (tmp_path / "link" / "labelsTr" / "run", [data], [], "lies in the input"),
        (data / "labelsTr" / ".." / "run", [data], [], "lies in the input"),
        (tmp_path, [data], [], "contains the input"),
        (Path(".."), [Path("labelsTr")], [], "contains the input"),
        (tmp_path / "x", [tmp_path / "y", data / "a" / "..", tmp_path], [], "lies in the input"),
        (data / "labelsTr", [], labels, "is the input"),
        (data / "labelsTr" / "run", [], labels, "lies in the input"),
        (data, [], labels, "contains the input"),
        (tmp_path / "store", [], labels, "contains the input"),
    ):
        with pytest.raises(RunError, match=rf"the folder of the results {relation} .*; give another --out$"):
            check_apart(out, *inputs, files=files)
    check_apart(tmp_path / "run", data, tmp_path / "nowhere", files=labels)
    check_apart(tmp_path / "data2", data)
    check_apart(tmp_path / "store" / "run", data, files=labels)


def test_folders_are_the_same_by_what_the_file_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where letters of both cases are one name, as on macOS and Windows."""
    (tmp_path / "data").mkdir()
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: stat(str(path).replace("DATA", "data"), **options))
    with pytest.raises(RunError, match="is the input"):
        check_apart(tmp_path / "DATA", tmp_path / "data")
    with pytest.raises(RunError, match="lies in the input"):
        check_apart(tmp_path / "DATA" / "run", tmp_path / "data")


def test_inputs_that_changed_are_named(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.nii" for name in "abc"}
    for path in paths.values():
        path.write_text("voxels")

    def inputs(read: Callable[[Path], str] = file_digest, **cases: str) -> dict[str, list[InputFile]]:
        return {
            case: [InputFile(paths[name], paths[name].name, read(paths[name])) for name in names]
            for case, names in cases.items()
        }

    run = folder(tmp_path / "run")
    with run.open(SETTINGS) as first:
        first.remember(inputs(one="ab", two="c"))
    with run.open(SETTINGS, resume=True) as again:
        again.check_inputs(inputs(one="ab", two="c", three="a"))
        again.remember(inputs(three="a"))
        os.utime(paths["a"], ns=(1, 1))  # the content decides
        again.check_inputs(inputs(one="ab", two="c", three="a"))
        for cases, names in (({"one": "ba"}, "b.nii, .*a.nii"), ({"one": "ac"}, "c.nii")):
            with pytest.raises(RunError, match=rf"cannot be resumed; .*{names} changed since$"):
                again.check_inputs(inputs(**cases))
        before = inputs(two="c")
        paths["c"].write_text("VOXELS")
        with pytest.raises(RunError, match=r"run: cannot be resumed; \S*c.nii changed since$"):
            again.check_inputs(inputs(one="ab", two="c"))
        again.check_inputs(before)
        again.remember(inputs(file_stamp, two="c"))
        again.check_inputs(inputs(file_stamp, two="c"))
        os.utime(paths["c"], ns=(1, 1))
        with pytest.raises(RunError, match=r"c.nii changed since"):
            again.check_inputs(inputs(file_stamp, two="c"))
    paths["b"].unlink()
    for read in (file_digest, file_stamp):
        with pytest.raises(RunError, match=r"b.nii: cannot be read \(No such file or directory\)"):
            inputs(read, one="b")


# ------------------------------------------------------------------------------------------------ lock

HOLD = """
import sys, time
from pathlib import Path
from calseg.runs import RunFolder
with RunFolder(Path(sys.argv[1]), "train").open({}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second is refused while the first is at work; a process that was killed holds nothing."""
    run = folder(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        message = rf"{tmp_path}: process {process.pid} on \S+ is at work in this folder; wait until it has ended"
        for how in ({}, {"resume": True}, {"overwrite": True}):
            refused(run, message, {}, **how)
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / ".calseg.lock").exists()
    with run.open({}, resume=True) as again:
        assert again.is_resumed
        refused(run, rf"process {os.getpid()} on", {}, resume=True)
    assert content(tmp_path) == {STATE}


def test_a_lock_that_a_killed_process_left_is_taken_over_whole(tmp_path: Path) -> None:
    """The text of the old lock leaves nothing behind, so that the next process knows the file as a lock again."""
    lock = tmp_path / ".calseg.lock"
    lock.write_text("calseg: process 1 on a host with a long name that stands beyond the new text of the lock")
    for _ in range(2):
        with _locked(tmp_path):
            text = lock.read_text()
            assert text.startswith(f"calseg: process {os.getpid()} on ")
            assert "\0" not in text
        lock.write_text(text)


def test_a_foreign_file_with_the_locks_name_is_left(tmp_path: Path) -> None:
    (tmp_path / ".calseg.lock").write_text("theirs")
    refused(folder(tmp_path), r"calseg.lock: is no lock of calseg", {})
    assert (tmp_path / ".calseg.lock").read_text() == "theirs"
    (tmp_path / ".calseg.lock").unlink()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("")
    (tmp_path / ".calseg.lock").symlink_to(tmp_path / "theirs" / "a")
    refused(folder(tmp_path), "cannot be made ready", {}, overwrite=True)
    assert (tmp_path / "theirs" / "a").read_text() == ""


def test_many_take_turns(tmp_path: Path) -> None:
    """The lock's file is removed and made again all the time; never do two hold it."""

    def work(turns: int) -> None:
        while turns:
            time.sleep(0.0001)
            with suppress(RunError), _locked(tmp_path):
                (tmp_path / "inside").open("x").close()
                (tmp_path / "inside").unlink()
                turns -= 1

    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(work, 30) for _ in range(8)]:
            result.result()
    assert not list(tmp_path.iterdir())


def test_messages_stay_short() -> None:
    assert len(str(RunError("x" * 5000))) <= 600
    assert str(RunError("one\ntwo")) == "one two"
    assert listing(["a", "b", "c"]) == "a, b, c"
    assert listing(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_it_imports_nothing_else() -> None:
    code = "import sys; import calseg.errors; before = set(sys.modules); import calseg.runs, calseg.settings"
    code += "; print(sorted(name for name in set(sys.modules) - before if name.startswith(('calseg', 'monai'))))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['calseg.files', 'calseg.runs', 'calseg.settings']"
