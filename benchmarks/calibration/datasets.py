"""The data sets of the experiment, each as two folders in the layout of the Decathlon: development and test.

``calseg train`` splits the development cases into training and tuning cases. The test cases are not used before the
settings are chosen, and those of one source are the same for every number of training cases. If the probability of
every voxel is known, or the share of many annotators, it is in ``truth/NAME.nii.gz`` ``[x, y, z, classes]``. The label
is then the map of one rater, as it often is in practice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.image import imread
from numpy.typing import NDArray

from calseg.files import as_json, read_json, write_json
from calseg.simulation import CLASS_NAMES, DemoConfig, make_case


@dataclass(frozen=True)
class Plan:
    """The source of a data set, its numbers of training, tuning and test cases, and the settings of training."""

    source: str
    training: int
    tuning: int
    test: int
    patch_size: tuple[int, int, int]
    batch_size: int
    iterations: int

    def quick(self) -> Plan:
        """Return a plan with few cases and updates, which shows that the experiment runs, and nothing else."""
        return replace(self, training=3, tuning=2, test=3, iterations=2)


PLANS = {
    "hippocampus-20": Plan("hippocampus", 20, 20, 40, (32, 48, 32), 2, 400),
    "hippocampus-60": Plan("hippocampus", 60, 20, 40, (32, 48, 32), 2, 800),
    "hippocampus-100": Plan("hippocampus", 100, 20, 40, (32, 48, 32), 2, 1000),
    "multirater": Plan("multirater", 12, 8, 15, (128, 128, 1), 2, 400),
    "synthetic": Plan("synthetic", 20, 20, 40, (24, 24, 24), 2, 400),
}
"""The plans of the experiment by the name of the data set.

There are 160 hippocampus cases. Tuning cases are needed beside training cases also to fit the temperature of
temperature scaling, so 100 is the largest number of training cases.
"""


def prepare(folder: Path | None, out: Path, plan: Plan) -> None:
    """Make ``out/development`` and ``out/test`` from the cases in ``folder``, unless they exist.

    The plan is kept in ``out/plan.json``. A folder with another plan is refused, because its runs would be taken for
    those of this plan.
    """
    kept = out / "plan.json"
    if not kept.is_file():
        MAKERS[plan.source](folder, out, plan)
        write_json(kept, as_json(asdict(plan)))
    elif read_json(kept) != as_json(asdict(plan)):
        raise SystemExit(f"{out}: its runs are of another plan ({kept}); give another --out")


def _write(out: Path, labels: Sequence[str], entries: Sequence[dict[str, str]], plan: Plan) -> None:
    """Split the cases at random with a fixed seed, and write both ``dataset.json``."""
    wanted = plan.training + plan.tuning + plan.test
    if len(entries) < wanted:
        raise SystemExit(f"{plan.source}: {len(entries)} cases, but the plan needs {wanted}")
    order = sorted(entries, key=lambda entry: entry["label"])
    random.Random(0).shuffle(order)
    for part, chosen in (("test", order[: plan.test]), ("development", order[plan.test : wanted])):
        (out / part).mkdir(parents=True, exist_ok=True)
        content = {
            "name": plan.source,
            "modality": {"0": "image"},
            "labels": {str(number): label for number, label in enumerate(labels)},
            "training": chosen,
        }
        write_json(out / part / "dataset.json", content)


def _hippocampus(source: Path | None, out: Path, plan: Plan) -> None:
    """Split the cases of Task04_Hippocampus."""
    if source is None:
        raise SystemExit("hippocampus: --data must name the folder of Task04_Hippocampus")
    meta = json.loads((source / "dataset.json").read_text())
    entries = [{key: str((source / entry[key]).resolve()) for key in ("image", "label")} for entry in meta["training"]]
    _write(out, [meta["labels"][key] for key in sorted(meta["labels"], key=int)], entries, plan)


def _save(voxels: NDArray[Any], path: Path) -> str:
    """Write voxels to a NIfTI file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return str(path.resolve())


def _multirater(source: Path | None, out: Path, plan: Plan) -> None:
    """Make slices ``[x, y, 1]`` from every second pixel. The label of an image is that of one annotator, in turns."""
    if source is None:
        raise SystemExit("multirater: --data must name the folder with images/ and raters/")
    entries = []
    for index, path in enumerate(sorted((source / "images").glob("*.png"))):
        image = imread(path)
        image = (image if image.ndim == 2 else image[..., :3].mean(-1)).T[::2, ::2, None].astype(np.float32)
        bits = np.rint(imread(source / "raters" / path.name) * 65535).astype(np.uint16).T[::2, ::2]
        raters = np.stack([bits >> bit & 1 for bit in range(10)]).astype(np.uint8)[..., None]
        share = raters.mean(0, dtype=np.float32)
        _save(np.stack([1 - share, share], -1), out / "truth" / f"{path.stem}.nii.gz")
        entries.append(
            {
                "image": _save(image, out / "images" / f"{path.stem}.nii.gz"),
                "label": _save(raters[index % 10], out / "labels" / f"{path.stem}.nii.gz"),
            }
        )
    _write(out, ("background", "cell"), entries, plan)


def _synthetic(source: Path | None, out: Path, plan: Plan) -> None:
    """Simulate the lesions of the demo in smaller volumes. The label is that of one simulated rater."""
    config = DemoConfig(raters=2, side=28)
    entries = []
    for index in range(plan.training + plan.tuning + plan.test):
        image, raters, truth = make_case(1, index, config)
        name = f"synthetic_{index:03d}.nii.gz"
        _save(np.moveaxis(truth, 0, -1), out / "truth" / name)
        entries.append({"image": _save(image, out / "images" / name), "label": _save(raters[0], out / "labels" / name)})
    _write(out, CLASS_NAMES, entries, plan)


MAKERS: dict[str, Callable[[Path | None, Path, Plan], None]] = {
    "hippocampus": _hippocampus,
    "multirater": _multirater,
    "synthetic": _synthetic,
}
