"""Commands of nnU-Net's for a test: on the CPU, in few processes, and with trainings of one epoch of two updates
of a small network.

Their libraries take longer to import than all of these trainings together. So one process imports them, and is forked
for each command. nnU-Net itself is imported by each command, as it reads its variables then.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

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
READY = "ready\n"
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    call = [{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]
    socket.send_fds(server, [json.dumps(call).encode()], [0, 1, 2])
    sys.exit(int(server.recv(8) or 1))
"""


@contextmanager
def commands(folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """Write the commands to a folder for ``PATH``, and run what they call while the context lasts."""
    folder.mkdir()
    address = str(folder / "address")
    for name in COMMANDS:
        path = folder / name
        path.write_text(CLIENT.format(python=sys.executable, address=address, name=name))
        path.chmod(0o755)
    code = f"import short_nnunet; short_nnunet.serve({address!r})"
    with subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == READY
        try:
            yield
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Import the libraries, and run one command after another, each in a fork of this process."""
    for place, _ in COMMANDS.values():
        import_module(place.partition(":")[0])
    for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2"]:
        del sys.modules[name]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        sys.stdout.write(READY)
        sys.stdout.flush()
        while True:
            client, _ = server.accept()
            call, files, *_ = socket.recv_fds(client, 1 << 20, 3)
            child = os.fork()
            if not child:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))  # noqa: SIM115
                _run(*json.loads(call))
                sys.exit()
            for file in files:
                os.close(file)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            client.send(str(status).encode())
            client.close()


def _run(name: str, arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    """Run a command. The processes that it starts are forks too."""
    place, more = COMMANDS[name]
    module, _, function = place.partition(":")
    sys.argv = [name, *arguments, *more]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables, nnUNet_n_proc_DA="0" if name == "nnUNetv2_train" else "1")
    multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
    if name != "calseg":
        _shorten()
    getattr(import_module(module), function)()


def plan_small(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Let nnU-Net read little of the images when it plans, and plan small networks."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    extract, prepare = DatasetFingerprintExtractor.run, ExperimentPlanner.__init__

    def few(extractor: DatasetFingerprintExtractor, **options: bool) -> dict[str, Any]:
        extractor.num_foreground_voxels_for_intensitystats = 10_000  # instead of 100 million
        return extract(extractor, **options)

    def small(planner: ExperimentPlanner, *arguments: Any, **options: Any) -> None:
        prepare(planner, *arguments, **options)
        planner.UNet_base_num_features = 4  # instead of 32

    set_attribute(DatasetFingerprintExtractor, "run", few)
    set_attribute(ExperimentPlanner, "__init__", small)


def _shorten() -> None:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    whole = nnUNetTrainer.run_training

    def short(trainer: nnUNetTrainer) -> None:
        trainer.num_epochs = trainer.num_val_iterations_per_epoch = 1
        trainer.num_iterations_per_epoch = 2
        trainer.logger.plot_progress_png = lambda folder: None
        whole(trainer)

    nnUNetTrainer.run_training = short
    torch.set_num_threads = lambda count: None  # nnU-Net wants all cores; a fork may not use the threads of its parent
    plan_small(setattr)
