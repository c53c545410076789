"""Commands of nnU-Net's for a test: on the CPU, in few processes, and with trainings of one epoch of two updates."""

from __future__ import annotations

import os
import stat
import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "nnUNetv2_plan_and_preprocess": (
        "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry",
        ["-np", "1", "-npfp", "1"],
    ),
    "nnUNetv2_train": ("nnunetv2.run.run_training:run_training_entry", ["-device", "cpu"]),
    "nnUNetv2_predict": (
        "nnunetv2.inference.predict_from_raw_data:predict_entry_point",
        ["-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar"],
    ),
    "calseg": ("calseg.cli.main:main", []),
}


def write_commands(folder: Path) -> None:
    """Write the commands to a folder for ``PATH``."""
    folder.mkdir()
    for name in COMMANDS:
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nif __name__ == '__main__':\n    import short_nnunet\n    short_nnunet.run({name!r})\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(name: str) -> None:
    """Run a command with the arguments of this process."""
    place, arguments = COMMANDS[name]
    module, _, function = place.partition(":")
    sys.argv += arguments
    os.environ.update(nnUNet_n_proc_DA="0" if name == "nnUNetv2_train" else "1")
    if name == "nnUNetv2_train":
        _shorten()
    getattr(import_module(module), function)()


def _shorten() -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    whole = nnUNetTrainer.run_training

    def short(trainer: nnUNetTrainer) -> None:
        trainer.num_epochs = trainer.num_val_iterations_per_epoch = 1
        trainer.num_iterations_per_epoch = 2
        whole(trainer)

    nnUNetTrainer.run_training = short
