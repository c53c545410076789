"""Train every contender in the same way, tune it on the tuning cases, and score it on the test cases.

    python benchmarks/calibration/run.py hippocampus-20 --data Task04_Hippocampus --out RUNS

Every contender (contenders.py) has the same network, cases, updates and seeds. A comparison method has up to three
settings to choose from, one of which is the published one. All settings are tried with the first seed. The chosen one
has the lowest NLL near the foreground on the tuning cases, among the settings whose Dice there is at most 0.005 below
that of Dice + cross-entropy. It is trained with every seed, and scored on the test cases, which were not used before.
Finished runs are kept in RUNS, so an interrupted experiment continues where it stopped. The result is
benchmarks/results/calibration-NAME.json, or with --quick RUNS/calibration-NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from contenders import CONTENDERS, REFERENCE
from datasets import PLANS, prepare
from experiment import Experiment
from markdown_tables import table
from report import FORMAT, report
from scores import DESCRIPTIONS

import calseg
from calseg.files import as_json, write_json

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(PLANS))
    parser.add_argument("--data", type=Path, help="folder of the cases; the synthetic set needs none")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes that train at once; 0: this one does")
    parser.add_argument("--quick", action="store_true", help="few cases, updates and settings: does it run?")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in the other processes, so that the last bits do not depend on --jobs
    plan = PLANS[given.name].quick() if given.quick else PLANS[given.name]
    root = given.out / f"{given.name}{'-quick' * given.quick}"
    prepare(given.data, root, plan)
    experiment = Experiment(given.name, root, plan, given.jobs)
    names = [name for name in CONTENDERS if name in {REFERENCE, *given.contenders}]
    chosen = experiment.tune(names, most=2 if given.quick else None)
    content = {
        "format": FORMAT,
        "dataset": given.name,
        "plan": asdict(plan),
        "seeds": list(range(given.seeds)),
        "versions": calseg.info(),
        "reference": REFERENCE,
        "scores": DESCRIPTIONS,
        "tuning": chosen,
        "test": report(experiment.test(chosen, given.seeds), experiment.perfect_forecast()),
    }
    path = (given.out if given.quick else RESULTS) / f"calibration-{given.name}.json"
    write_json(path, as_json(content))
    print(table(content))
    print(f"written to {path}; the figure of all data sets: {Path(__file__).with_name('figures.py')}")


if __name__ == "__main__":
    main()
