"""Tests of calseg evaluate: all forms of files, values against arithmetic on the arrays, interruption, and errors."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("nibabel", "matplotlib"):
    pytest.importorskip(package)

import matplotlib  # noqa: E402
import nibabel  # noqa: E402
from interruption import stop_after  # noqa: E402

from calseg import calibration_bins, calibration_error  # noqa: E402
from calseg import evaluate as module  # noqa: E402
from calseg import report as report_module  # noqa: E402
from calseg.errors import RunError  # noqa: E402
from calseg.evaluate import FOLDER_FILES, EvaluateConfig, evaluate_folders  # noqa: E402
from calseg.regions import REGIONS  # noqa: E402
from calseg.report import DIAGRAMS  # noqa: E402
from calseg.runs import CasesInterruptedError  # noqa: E402
from calseg.scores import STATISTICS  # noqa: E402
from calseg.volumes import nifti  # noqa: E402
from calseg.volumes.nifti import DataError  # noqa: E402
from calseg.volumes.probabilities import find_map_cases, read_slabs  # noqa: E402

matplotlib.use("agg")

CLASSES = ("background", "liver", "tumour")
QUICK = EvaluateConfig(num_resamples=50)
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def real_diagrams() -> None:
    """Draw the pictures, for the tests that need them."""


@pytest.fixture(autouse=True)
def quick_diagrams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the pictures, which take seconds to draw, by files with the drawn numbers."""
    if "real_diagrams" in request.fixturenames:
        return

    def write(out: Path, items: Any, class_names: Any) -> None:
        for name in DIAGRAMS:
            for ending in ("png", "pdf"):
                (out / f"{name}.{ending}").write_text(f"{class_names} {items}")

    monkeypatch.setattr(report_module, "draw_diagrams", write)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)


def arrays(count: int = 4, classes: int = 3) -> Arrays:
    """Return probabilities, float32 ``[x, y, z, C]``, and labels, uint8, of every case. The last case has no tumour."""
    result = {}
    for index in range(count):
        rng = np.random.default_rng(index)
        shape = (7 + index, 6, 5)
        label = rng.integers(0, classes - (index == count - 1), shape).astype(np.uint8)
        logits = 1.5 * rng.standard_normal((*shape, classes)) + 1.5 * np.eye(classes)[label]
        p = torch.softmax(torch.from_numpy(logits).float(), -1).numpy()
        result[f"case_{index}"] = (p, label)
    return result


def write_labels(folder: Path, cases: Arrays, dataset: dict[str, Any] | None = None) -> Path:
    for name, (_, label) in cases.items():
        save(folder / "labelsTr" / f"{name}.nii.gz", label)
    names = {name: number for number, name in enumerate(CLASSES)}
    (folder / "dataset.json").write_text(json.dumps({"labels": names} if dataset is None else dataset))
    return folder / "labelsTr"


def write_nifti(folder: Path, cases: Arrays) -> None:
    for name, (p, _) in cases.items():
        save(folder / f"{name}.nii.gz", p)


def write_plain(folder: Path, cases: Arrays) -> None:
    for name, (p, _) in cases.items():
        save(folder / f"{name}.nii", p)


def write_channels(folder: Path, cases: Arrays) -> None:
    for name, (p, _) in cases.items():
        for number in range(p.shape[-1]):
            save(folder / f"{name}_{number:04d}.nii.gz", p[..., number])


def write_npz(folder: Path, cases: Arrays) -> None:
    """Write a .npz file as nnU-Net does: with reversed axes, the segmentation, and another file."""
    for name, (p, _) in cases.items():
        save(folder / f"{name}.nii.gz", p.argmax(-1).astype(np.uint8))
        np.savez_compressed(folder / f"{name}.npz", probabilities=p.T)
        (folder / f"{name}.pkl").write_bytes(b"properties")
    (folder / "predict_from_raw_data_args.json").write_text("{}")


FORMS: dict[str, Callable[[Path, Arrays], None]] = {
    "nifti": write_nifti,
    "plain": write_plain,
    "channels": write_channels,
    "npz": write_npz,
}


def evaluate(maps: Path, labels: Path, out: Path, config: EvaluateConfig = QUICK, **options: Any) -> dict[str, Any]:
    return evaluate_folders(maps, labels, out, config, **options)


def contents(report: Path) -> dict[str, bytes]:
    """Return every file of a report except the store, which holds paths and times."""
    return {name: (report / name).read_bytes() for name in FOLDER_FILES if name != "cases.jsonl"}


def flat(cases: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all voxels of all cases: probabilities ``[V, C]`` and labels ``[V]``."""
    p = np.concatenate([p.reshape(-1, p.shape[-1]) for p, _ in cases.values()])
    return torch.from_numpy(p), torch.from_numpy(np.concatenate([label.reshape(-1) for _, label in cases.values()]))


def regions_of(label: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the voxels of each region. Those near the foreground are found by the distances of all pairs."""
    front = torch.from_numpy(label > 0)
    places = torch.ones_like(front).nonzero().double()
    near = (torch.cdist(places, front.nonzero().double()) < 3.001).any(1).view(front.shape)
    return {"near": near, "all": torch.ones_like(front), "foreground": front}


# ---- values ----


def test_the_report_is_the_arithmetic_of_the_arrays(tmp_path: Path) -> None:
    cases = arrays()
    write_nifti(tmp_path / "maps", cases)
    report = evaluate(tmp_path / "maps", write_labels(tmp_path, cases), tmp_path / "out")
    p, y = flat(cases)
    assert report["classes"] == list(CLASSES)
    inside_of = {name: regions_of(label) for name, (_, label) in cases.items()}
    for region in REGIONS:
        keep = torch.cat([inside[region].flatten() for inside in inside_of.values()])
        assert report["voxels"][region] == int(keep.sum())
        mine, labels = p[keep].double(), y[keep].long()
        truth = mine.gather(1, labels[:, None])[:, 0]
        onehot = torch.nn.functional.one_hot(labels, 3)
        single = {"n_bins": 15, "from_logits": False}
        wanted = {
            "nll": -truth.log().mean(),
            "brier": (mine - onehot).square().sum(1).mean(),
            "ece": calibration_error(p[keep], labels, **single),
            "ace": calibration_error(p[keep], labels, norm="average", **single),
            "mce": calibration_error(p[keep], labels, norm="max", **single),
            "class_wise_ece": calibration_error(p[keep], labels, class_wise=True, **single),
        }
        for score, value in wanted.items():
            entry = report[region][score]["pooled"]
            assert entry["value"] == pytest.approx(float(value), abs=1e-7), (region, score)
            assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
        per_case = []
        for name, (q, label) in cases.items():
            inside = inside_of[name][region].numpy()
            mine, labels = torch.from_numpy(q[inside]), torch.from_numpy(label[inside])
            per_case.append(float(calibration_error(mine, labels, from_logits=False)))
        mean = report[region]["ece"]["mean"]
        assert mean["value"] == pytest.approx(np.mean(per_case), abs=1e-12)
        assert min(per_case) <= mean["interval"][0] < mean["interval"][1] <= max(per_case)
    for number, name in enumerate(CLASSES):
        dice = []
        for q, label in cases.values():
            mine, true = q.argmax(-1) == number, label == number
            dice.append(2 * (mine & true).sum() / (mine.sum() + true.sum()))
        assert report["dice"][name]["mean"]["value"] == pytest.approx(np.mean(dice), abs=1e-12)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved == json.loads(json.dumps(report))


def test_every_statistic_is_in_the_report_and_the_csv(tmp_path: Path) -> None:
    cases = arrays()
    write_nifti(tmp_path / "maps", cases)
    report = evaluate(tmp_path / "maps", write_labels(tmp_path, cases), tmp_path / "out")
    header = (tmp_path / "out" / "cases.csv").read_text().splitlines()[0].split(",")
    assert len(set(header)) == len(header)
    for region in REGIONS:
        assert list(report[region]) == [*STATISTICS, "ece_of_class"]
        for name in STATISTICS:
            assert set(report[region][name]) == {"pooled", "mean"}
            assert f"{name}_{region}" in header


def test_every_statistic_is_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    from calseg.cli.tables import print_report

    cases = arrays()
    write_nifti(tmp_path / "maps", cases)
    report = evaluate(tmp_path / "maps", write_labels(tmp_path, cases), tmp_path / "out")
    capsys.readouterr()
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    for region in REGIONS:
        for name, statistic in STATISTICS.items():
            rows = [line for line in lines if re.search(rf"│ {statistic.title} +│ {region} voxels", line)]
            assert len(rows) == 1, (region, name)
            assert f"{report[region][name]['pooled']['value']:.4f}" in rows[0]


def test_csv(tmp_path: Path) -> None:
    cases = arrays()
    cases["case_9"] = (cases["case_0"][0], np.zeros_like(cases["case_0"][1]))  # no foreground
    write_nifti(tmp_path / "maps", cases)
    evaluate(tmp_path / "maps", write_labels(tmp_path, cases), tmp_path / "out")
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == sorted(cases)
    for row in rows:
        p, label = cases[row["case"]]
        true, mine = label == 2, p.argmax(-1) == 2
        assert int(row["voxels"]) == label.size
        assert float(row["dice_tumour"]) == pytest.approx(2 * (true & mine).sum() / (true.sum() + mine.sum()))
        ece = calibration_error(
            torch.from_numpy(p).reshape(-1, 3), torch.from_numpy(label).reshape(-1), from_logits=False
        )
        assert float(row["ece_all"]) == pytest.approx(float(ece), abs=1e-12)
    assert rows[-1]["foreground_voxels"] == rows[-1]["near_voxels"] == "0"
    assert rows[-1]["ece_foreground"] == rows[-1]["ece_near"] == ""


def test_presets(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    from calseg.metrics import PRESETS, preset_metric

    cases = arrays()
    write_npz_folder = tmp_path / "maps"
    write_npz_folder.mkdir()
    write_npz(write_npz_folder, cases)
    config = EvaluateConfig(presets=tuple(PRESETS), num_resamples=50)
    report = evaluate(write_npz_folder, write_labels(tmp_path, cases), tmp_path / "out", config)
    for name in PRESETS:
        metric = preset_metric(name, from_logits=False, **({"num_classes": 3} if name == "monai" else {}))
        for p, label in cases.values():
            metric.update(torch.from_numpy(p).movedim(-1, 0)[None], torch.from_numpy(label)[None])
        value = metric.compute()
        wanted = float(value if name == "torchmetrics" else value["value"])
        kind = "pooled" if name == "torchmetrics" else "mean"
        assert report["presets"][name][kind]["value"] == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("form", list(FORMS)[1:])
def test_every_form_gives_the_same_report(tmp_path: Path, form: str) -> None:
    cases = arrays()
    labels = write_labels(tmp_path, cases)
    for name in ("nifti", form):
        (tmp_path / name).mkdir(exist_ok=True)
        FORMS[name](tmp_path / name, cases)
        evaluate(tmp_path / name, labels, tmp_path / f"report_{name}")
    assert contents(tmp_path / "report_nifti") == contents(tmp_path / f"report_{form}")


@pytest.mark.parametrize("form", FORMS)
def test_slabs_and_temporary_files_change_nothing(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = arrays()
    for _, label in cases.values():
        label[..., :4] = 0  # a slab without foreground is near that of another slab
    labels = write_labels(tmp_path, cases)
    (tmp_path / "maps").mkdir()
    FORMS[form](tmp_path / "maps", cases)
    report = evaluate(tmp_path / "maps", labels, tmp_path / "whole")
    assert report["voxels"]["foreground"] < report["voxels"]["near"] < report["voxels"]["all"]
    files = []
    make = nifti.tempfile.TemporaryFile
    monkeypatch.setattr(nifti.tempfile, "TemporaryFile", lambda: files.append(make()) or files[-1])
    found, _ = find_map_cases(tmp_path / "maps", labels)
    starts = [slab.start for slab in read_slabs(found[0], 3, None, memory=32 * 2 * 7 * 6 * 3 * 4)]
    assert starts == [0, 2, 4]
    evaluate(tmp_path / "maps", labels, tmp_path / "slabs", memory=1)
    assert contents(tmp_path / "whole") == contents(tmp_path / "slabs")
    assert files  # of the label maps at least
    assert all(file.closed for file in files)


@pytest.mark.parametrize("form", ["float16", "float64", "big_endian", "fortran", "uint16", "nifti2"])
def test_other_encodings(tmp_path: Path, form: str) -> None:
    cases = arrays(2)
    labels, maps = write_labels(tmp_path, cases), tmp_path / "maps"
    maps.mkdir()
    for name, (p, _) in cases.items():
        if form in ("float16", "fortran"):
            stored = p.T.astype(np.float16) if form == "float16" else np.asfortranarray(p.T)
            np.savez(maps / f"{name}.npz", probabilities=stored)
        elif form == "uint16":
            image = nibabel.Nifti1Image(np.rint(p.astype(np.float64) * 65535).astype(np.uint16), np.eye(4))
            image.header.set_slope_inter(1 / 65535, 0)
            nibabel.save(image, maps / f"{name}.nii.gz")
        elif form == "big_endian":
            nibabel.save(
                nibabel.Nifti1Image(p.astype(">f4"), np.eye(4), nibabel.Nifti1Header(endianness=">")),
                maps / f"{name}.nii",
            )
        elif form == "nifti2":
            nibabel.save(nibabel.Nifti2Image(p, np.eye(4)), maps / f"{name}.nii.gz")
        else:
            save(maps / f"{name}.nii.gz", p.astype(np.float64))
    report = evaluate(maps, labels, tmp_path / "out")
    p, y = flat(cases)
    exact = form in ("float64", "big_endian", "fortran", "nifti2")
    brier = calibration_bins(p, y, from_logits=False).mean_brier()
    assert report["all"]["brier"]["pooled"]["value"] == pytest.approx(float(brier), abs=1e-7 if exact else 1e-3)


def test_ignored_voxels_and_class_names(tmp_path: Path) -> None:
    cases = arrays(2)
    for _, label in cases.values():
        label[:2] = 3
    labels = write_labels(tmp_path, cases, {"labels": {"0": "air", "1": "fat", "2": "bone", "3": "ignore"}})
    write_nifti(tmp_path / "maps", cases)
    report = evaluate(tmp_path / "maps", labels, tmp_path / "out")
    assert report["classes"] == ["air", "fat", "bone"]
    assert report["config"]["ignore_label"] == 3
    assert report["voxels"]["all"] == sum(int((label != 3).sum()) for _, label in cases.values())
    kept = {name: (p[2:], label[2:]) for name, (p, label) in cases.items()}
    p, y = flat(kept)
    value = float(calibration_error(p, y, from_logits=False))
    assert report["all"]["ece"]["pooled"]["value"] == pytest.approx(value, abs=1e-12)
    # The same by the option, without a dataset.json.
    (tmp_path / "dataset.json").unlink()
    again = evaluate(tmp_path / "maps", labels, tmp_path / "again", EvaluateConfig(ignore_label=3, num_resamples=50))
    assert again["all"] == report["all"] | {"ece_of_class": again["all"]["ece_of_class"]}
    assert again["classes"] == ["class 0", "class 1", "class 2"]
    elsewhere = tmp_path / "names.json"
    elsewhere.write_text(json.dumps({"labels": {"a": 0, "b": 1, "c": 2, "ignore": 3}}))
    named = evaluate(tmp_path / "maps", labels, tmp_path / "named", dataset_json=elsewhere)
    assert named["classes"] == ["a", "b", "c"]


def test_nan_and_infinite(tmp_path: Path) -> None:
    cases = arrays(3)
    p, label = cases["case_1"]
    p[0, 0, :2] = np.nan
    p[1, 1, 1], label[1, 1, 1] = (0, 1, 0), 0
    write_nifti(tmp_path / "maps", cases)
    report = evaluate(tmp_path / "maps", write_labels(tmp_path, cases), tmp_path / "out")
    assert (report["nan_voxels"], report["infinite_voxels"]) == (2, 1)
    assert report["all"]["nll"]["pooled"]["value"] == "inf"
    total = sum(label.size for _, label in cases.values())
    assert sum(report["bins"]["all"]["count"]) == total - 2
    # The arg max of NaN is no class.
    valid = ~np.isnan(p).any(-1)
    mine, true = (p.argmax(-1) == 1) & valid, (label == 1) & valid
    row = next(csv.DictReader((tmp_path / "out" / "cases.csv").read_text().splitlines()[:1] + [
        line for line in (tmp_path / "out" / "cases.csv").read_text().splitlines() if line.startswith("case_1")
    ]))  # fmt: skip
    assert float(row["dice_liver"]) == pytest.approx(2 * (mine & true).sum() / (mine.sum() + true.sum()))
    assert row["nan_voxels"] == "2"


def test_what_is_odd_is_noted(tmp_path: Path) -> None:
    cases = arrays(3)
    labels = write_labels(tmp_path, cases)
    write_nifti(tmp_path / "maps", dict(list(cases.items())[:2]))
    save(tmp_path / "maps" / "case_1.nii.gz", cases["case_1"][0], np.diag([1, 1, 2, 1.0]))
    report = evaluate(tmp_path / "maps", labels, tmp_path / "out")
    odd = "the affine of the label map differs from that of the probability map; voxels are matched as stored"
    assert report["notes"] == ["1 label maps have no probability map: case_2", f"case_1: {odd}"]
    assert report["left_out"] == ["case_2"]


@pytest.mark.parametrize("form", ["plain", "nifti", "npz"])
def test_memory_is_that_of_slabs(
    tmp_path: Path, form: str, peak_growth: Callable[[Callable[[], object]], int], set_threads: Callable[[int], None]
) -> None:
    """24 MB of probabilities are evaluated in 8 MiB of memory."""
    set_threads(1)
    p = np.full((48, 48, 320, 8), 1 / 8, np.float32)
    p[..., 0] += np.float32(1 / 16)
    p[..., 1] -= np.float32(1 / 16)
    cases = {"big": (p, np.zeros(p.shape[:3], np.uint8))}
    labels = write_labels(tmp_path, cases, {"labels": {str(c): c for c in range(8)}})
    (tmp_path / "maps").mkdir()
    FORMS[form](tmp_path / "maps", cases)
    size = p.nbytes
    del p, cases
    small = arrays(1, 8)  # exclude imports and one-time allocations
    save(tmp_path / "small" / "labels" / "case_0.nii.gz", small["case_0"][1])
    write_nifti(tmp_path / "small" / "maps", small)
    evaluate(tmp_path / "small" / "maps", tmp_path / "small" / "labels", tmp_path / "warm")
    growth = peak_growth(lambda: evaluate(tmp_path / "maps", labels, tmp_path / "out", memory=1 << 23))
    assert growth < size / 2


# ---- interruption ----


def test_an_interrupted_evaluation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_diagrams: None
) -> None:
    cases = arrays(5)
    labels, maps = write_labels(tmp_path, cases), tmp_path / "maps"
    write_nifti(maps, cases)
    evaluate(maps, labels, tmp_path / "whole")
    with pytest.raises(
        CasesInterruptedError, match=r"interrupted after 2 of 5 cases, which are kept in .*jsonl"
    ) as stop:
        evaluate(maps, labels, tmp_path / "part", progress=stop_after(2))
    assert stop.value.code == 130
    assert not (tmp_path / "part" / "report.json").exists()
    store = tmp_path / "part" / "cases.jsonl"
    assert len(store.read_text().splitlines()) == 2
    with store.open("ab") as file:  # like a loss of power in the middle of a line
        file.write(b'{"case": "case_2", "files": {')
    scored = []
    score = module.score_case
    monkeypatch.setattr(module, "score_case", lambda case, *rest: scored.append(case.name) or score(case, *rest))
    evaluate(maps, labels, tmp_path / "part", resume=True)
    assert scored == ["case_2", "case_3", "case_4"]
    assert contents(tmp_path / "whole") == contents(tmp_path / "part")
    assert (tmp_path / "whole" / "cases.jsonl").read_bytes() == store.read_bytes()
    evaluate(maps, labels, tmp_path / "part", resume=True)  # a finished report is written again
    assert len(scored) == 3
    assert contents(tmp_path / "whole") == contents(tmp_path / "part")


def test_an_interruption_inside_a_case_loses_that_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = arrays(3)
    labels, maps = write_labels(tmp_path, cases), tmp_path / "maps"
    write_nifti(maps, cases)
    calls = []
    slab = module._score_slab

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # the third slab of the second case
            raise KeyboardInterrupt
        return slab(*arguments)

    monkeypatch.setattr(module, "_score_slab", interrupted)
    with pytest.raises(CasesInterruptedError, match="after 1 of 3 cases"):
        evaluate(maps, labels, tmp_path / "part", memory=1)
    evaluate(maps, labels, tmp_path / "part", resume=True)
    evaluate(maps, labels, tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(tmp_path / "part")


def test_an_error_in_a_file_keeps_the_cases_before_it(tmp_path: Path) -> None:
    cases = arrays(3)
    labels, maps = write_labels(tmp_path, cases), tmp_path / "maps"
    write_nifti(maps, cases)
    path = maps / "case_1.nii.gz"
    good = path.read_bytes()
    path.write_bytes(good[:-30])
    with pytest.raises(DataError, match=r"case_1.nii.gz: cannot be read; the file is corrupt or truncated"):
        evaluate(maps, labels, tmp_path / "out")
    assert len((tmp_path / "out" / "cases.jsonl").read_text().splitlines()) == 1
    path.write_bytes(good)
    evaluate(maps, labels, tmp_path / "out", resume=True)
    evaluate(maps, labels, tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_resume_refuses_what_has_changed(tmp_path: Path) -> None:
    cases = arrays(3)
    labels, maps, out = write_labels(tmp_path, cases), tmp_path / "maps", tmp_path / "out"
    write_nifti(maps, cases)
    with pytest.raises(RunError, match=r"calseg.json: not found; there is no run to resume"):
        evaluate(maps, labels, out, resume=True)
    with pytest.raises(CasesInterruptedError):
        evaluate(maps, labels, out, progress=stop_after(2))
    with pytest.raises(RunError, match="not empty"):
        evaluate(maps, labels, out)
    with pytest.raises(RunError, match="cannot be resumed with other settings: n_bins is 10 but was 15"):
        evaluate(maps, labels, out, EvaluateConfig(n_bins=10, num_resamples=50), resume=True)
    shutil.move(maps / "case_0.nii.gz", tmp_path)
    with pytest.raises(RunError, match="cannot be resumed; the case 'case_0' is gone"):
        evaluate(maps, labels, out, resume=True)
    p, _ = cases["case_0"]
    save(maps / "case_0.nii.gz", p[..., ::-1])
    with pytest.raises(RunError, match=r"cannot be resumed; \S*maps.case_0.nii.gz changed since$"):
        evaluate(maps, labels, out, resume=True)
    store = out / "cases.jsonl"
    store.write_bytes(b"{}\n" + store.read_bytes())
    with pytest.raises(RunError, match=r"cases.jsonl: line 1 is corrupt; give --overwrite"):
        evaluate(maps, labels, out, resume=True)
    foreign = out / "notes.txt"
    foreign.write_text("mine")
    report = evaluate(maps, labels, out, overwrite=True)
    assert report["cases"] == 3
    assert foreign.read_text() == "mine"
    with pytest.raises(RunError, match="exclude each other"):
        evaluate(maps, labels, out, overwrite=True, resume=True)


# ---- errors ----


def _drop_label(root: Path) -> None:
    (root / "labelsTr" / "case_1.nii.gz").unlink()


def _shape(root: Path) -> None:
    save(root / "labelsTr" / "case_1.nii.gz", np.zeros((6, 6, 5), np.uint8))


def _one_class_more(root: Path) -> None:
    save(root / "maps" / "case_1.nii.gz", np.full((8, 6, 5, 4), 0.25, np.float32))


def _segmentation(root: Path) -> None:
    save(root / "maps" / "case_1.nii.gz", np.zeros((8, 6, 5), np.uint8))


def _two_forms(root: Path) -> None:
    np.savez(root / "maps" / "case_1.npz", probabilities=np.zeros((3, 5, 6, 8), np.float32))


def _channel_gap(root: Path) -> None:
    (root / "maps" / "case_1.nii.gz").unlink()
    for number in (0, 2):
        save(root / "maps" / f"case_1_{number:04d}.nii.gz", np.zeros((8, 6, 5), np.float32))


def _channel_shape(root: Path) -> None:
    (root / "maps" / "case_1.nii.gz").unlink()
    for number in range(3):
        save(root / "maps" / f"case_1_{number:04d}.nii.gz", np.zeros((8, 6, 5 + number), np.float32))


def _npz(**content: np.ndarray) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / "maps" / "case_1.nii.gz").unlink()
        np.savez(root / "maps" / "case_1.npz", **content)

    return write


def _no_zip(root: Path) -> None:
    (root / "maps" / "case_1.nii.gz").unlink()
    (root / "maps" / "case_1.npz").write_bytes(b"PK but no archive")


def _garbage(root: Path) -> None:
    (root / "maps" / "case_1.nii").write_bytes(b"no header" * 100)
    (root / "maps" / "case_1.nii.gz").unlink()


def _twice(root: Path) -> None:
    save(root / "labelsTr" / "case_1.nii", np.zeros((8, 6, 5), np.uint8))


def _truncate(name: str) -> Callable[[Path, Arrays], None]:
    def write(root: Path, cases: Arrays) -> None:
        path = root / name
        path.write_bytes(path.read_bytes()[:-12])

    return write


def _empty(root: Path) -> None:
    for file in (root / "maps").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_label, r"maps.case_1.nii.gz: no label map case_1.nii.gz \(or .nii\) in .*labelsTr"),
        (_shape, r"labelsTr.case_1.nii.gz: label of shape \(6, 6, 5\), but .*maps.case_1.nii.gz has \(8, 6, 5\)"),
        (_one_class_more, r"maps.case_1.nii.gz: 4 classes, but dataset.json names 3"),
        (_segmentation, r"maps.case_1.nii.gz: shape \(8, 6, 5\); probabilities are wanted as 4-D"),
        (_two_forms, r"maps: holds the case 'case_1' in more than one form"),
        (_channel_gap, r"case_1_0002.nii.gz: found, but no file case_1_0001 for class 1"),
        (_channel_shape, r"case_1_0001.nii.gz: shape \(8, 6, 6\) differs from \(8, 6, 5\) of .*case_1_0000.nii.gz"),
        (_npz(softmax=np.zeros((3, 5, 6, 8))), r"case_1.npz: has no key 'probabilities', but softmax"),
        (_npz(probabilities=np.zeros((3, 5, 6, 8), int)), r"case_1.npz: 'probabilities' of type int64"),
        (_npz(probabilities=np.zeros((3, 5, 6))), r"case_1.npz: 'probabilities' of shape \(3, 5, 6\)"),
        (_npz(probabilities=np.zeros((3, 8, 6, 5))), r"case_1.nii.gz: label of shape \(8, 6, 5\), .*reversed: are the"),
        (_npz(probabilities=np.zeros((1, 5, 6, 8))), r"case_1.npz: 1 class; the probabilities of all classes"),
        (_no_zip, r"case_1.npz: cannot be read; the file is corrupt"),
        (_garbage, r"case_1.nii: "),
        (_twice, r"labelsTr.case_1.nii.gz: the case 'case_1' is also in case_1.nii"),
        (_empty, r"maps: holds no probability map"),
    ],
)
def test_bad_files_are_named_before_anything_is_written(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    cases = arrays(3)
    labels = write_labels(tmp_path, cases)
    write_nifti(tmp_path / "maps", cases)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path / "maps", labels, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _spoil_map(change: Callable[[np.ndarray], object]) -> Callable[[Path, Arrays], None]:
    def write(root: Path, cases: Arrays) -> None:
        p = cases["case_1"][0].copy()
        change(p)
        save(root / "maps" / "case_1.nii.gz", p)

    return write


def _set(index: Any, value: Any) -> Callable[[np.ndarray], None]:
    return lambda p: p.__setitem__(index, value)


def _label(value: Any) -> Callable[[Path, Arrays], None]:
    def write(root: Path, cases: Arrays) -> None:
        label = cases["case_1"][1].astype(np.float32)
        label[2, 1, 3] = value
        save(root / "labelsTr" / "case_1.nii.gz", label)

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_map(_set((4, 2, 3), 0.5)), r"case_1.nii.gz: the 3 .* \(4, 2, 3\) sum to 1.5, the smallest is 0.5"),
        (
            _spoil_map(_set((4, 2, 3), (1.5, -0.5, 0))),
            r"voxel \(x, y, z\) = \(4, 2, 3\) sum to 1, the smallest is -0.5",
        ),
        (_spoil_map(_set((4, 2, 3), (np.inf, 0, 0))), r"\(4, 2, 3\) sum to inf"),
        (_spoil_map(lambda p: np.log(p, out=p)), r"\(0, 0, 0\) sum to .*not logits"),
        (_truncate("maps/case_1.nii.gz"), r"maps.case_1.nii.gz: cannot be read; the file is corrupt or truncated"),
        (_truncate("labelsTr/case_1.nii.gz"), r"labelsTr.case_1.nii.gz: cannot be read; the file is corrupt"),
        (_label(3), r"labelsTr.case_1.nii.gz: labels outside the classes 0 to 2: 3; the first is at voxel"),
        (_label(0.5), r"labelsTr.case_1.nii.gz: labels must be whole numbers; found 0.5"),
        (_label(np.nan), r"labelsTr.case_1.nii.gz: labels must be whole numbers; found nan"),
    ],
)
@pytest.mark.parametrize("memory", [1, 1 << 25])
def test_bad_voxels_are_named(tmp_path: Path, spoil: Callable[[Path, Arrays], None], message: str, memory: int) -> None:
    cases = arrays(3)
    labels = write_labels(tmp_path, cases)
    write_nifti(tmp_path / "maps", cases)
    spoil(tmp_path, cases)
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path / "maps", labels, tmp_path / "out", memory=memory)
    assert [json.loads(line)["case"] for line in (tmp_path / "out" / "cases.jsonl").read_text().splitlines()] == [
        "case_0"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bins": 0}, "n_bins must lie in 1 to 1000; got 0"),
        ({"num_resamples": 0}, "num_resamples must be at least 1; got 0"),
        ({"seed": -1}, r"seed must lie in 0 to 2\^63 - 1; got -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        EvaluateConfig(**settings)


def test_an_unknown_preset_and_missing_folders(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    cases = arrays(2)
    labels = write_labels(tmp_path, cases)
    write_nifti(tmp_path / "maps", cases)
    with pytest.raises(RunError, match="preset must be one of torchmetrics, monai, marginloss; got 'guo'"):
        evaluate(tmp_path / "maps", labels, tmp_path / "out", EvaluateConfig(presets=("guo",)))
    with pytest.raises(DataError, match="nowhere: no such folder"):
        evaluate(tmp_path / "nowhere", labels, tmp_path / "out")
    with pytest.raises(DataError, match=r"nowhere.json: not readable as JSON"):
        evaluate(tmp_path / "maps", labels, tmp_path / "out", dataset_json=tmp_path / "nowhere.json")
    assert not (tmp_path / "out").exists()


def test_evaluation_needs_neither_monai_nor_networks(tmp_path: Path) -> None:
    """An evaluation imports nibabel and matplotlib, and no package of the command line, of training or of networks."""
    cases = arrays(2)
    labels = write_labels(tmp_path, cases)
    write_nifti(tmp_path / "maps", cases)
    code = """
import sys
sys.modules.update(dict.fromkeys(("monai", "typer", "rich", "torchmetrics")))
import matplotlib
matplotlib.use("agg")
from calseg.evaluate import EvaluateConfig, evaluate_folders
evaluate_folders(*sys.argv[1:], EvaluateConfig(num_resamples=10))
assert not [name for name in sys.modules if name.startswith(("calseg.training", "calseg.nets", "calseg.cli"))]
"""
    arguments = [str(path) for path in (tmp_path / "maps", labels, tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert all((tmp_path / "out" / name).stat().st_size for name in FOLDER_FILES)
