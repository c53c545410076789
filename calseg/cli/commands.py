"""The commands. The docstring of a command is its help text; its options are explained where they are declared."""

# No "from __future__ import annotations" here: typer evaluates the annotations of the commands.

import importlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import calseg
from calseg.cli.options import Given, with_options
from calseg.methods import METHODS

if TYPE_CHECKING:
    from calseg.runs import Progress
    from calseg.training.config import TrainConfig

Data = Annotated[
    Path,
    typer.Argument(help="Folder of images and labels as the Medical Segmentation Decathlon or nnU-Net lays them out."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the interrupted run in the folder --out; give the same other options."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that the folder --out holds; other files stay.")
]
Device = Annotated[str, typer.Option(help="Device that the networks run on: cpu, cuda, cuda:1 and so on.")]
Threads = Annotated[int, typer.Option(min=0, help="Number of CPU threads; 0 leaves the choice to PyTorch.")]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of the commands that train. The functions that train take arguments of the same names."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in the folder --out, with its own settings.")
    ] = False
    overwrite: Overwrite = False
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Number of updates between two checkpoints.")] = 50
    device: Device = "cpu"


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Also show backends, threads and GPU, as PyTorch sees them, in seconds.")
    ] = False,
) -> None:
    """Show what is installed: versions, the processor's instruction sets, and what is missing."""
    from calseg.cli.info import print_info

    print_info(as_json=as_json, runtime=runtime)


def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, split and metrics.")],
    given: Given,
    soft_labels: Annotated[
        Path | None,
        typer.Option(
            help="Folder of soft labels, CASE.nii.gz for every training case, to train on instead of estimating them"
            " (method calseg)."
        ),
    ] = None,
    *,
    options: TrainingOptions,
    threads: Threads = 0,
) -> None:
    """Train a small U-Net (MONAI's) with one of the methods, and score it on the validation cases.

    The method calseg first trains networks that estimate a soft label of every training case, then the network to
    deploy on these soft labels.

    Ctrl-C saves a checkpoint. With --resume the run goes on with its own settings, and ends where an uninterrupted run
    would have ended, bit for bit on the same machine.
    """
    from calseg.cli.tables import print_metrics
    from calseg.training import stage_two

    config = _settings(out, given, resume=options.resume)
    with _progress(threads) as progress:
        metrics = stage_two.train(data, out, config, soft_labels=soft_labels, progress=progress, **asdict(options))
    print_metrics({config.method: metrics})
    print(f"written to {out / 'metrics.json'}")


def soft_labels(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the networks; the soft labels go to soft_labels in it.")],
    given: Given,
    networks: Annotated[
        Path | None,
        typer.Option(
            help="Folder of another run on the same cases, whose networks are used instead of training new ones; alpha,"
            " temperature and the number of samples may differ."
        ),
    ] = None,
    *,
    options: TrainingOptions,
    threads: Threads = 0,
) -> None:
    """Estimate a soft label of every case (the first stage of CALSeg), for any trainer to train on.

    The cases are dealt into folds, so that no case is estimated by a network that was trained on it. The folder
    OUT/soft_labels gets CASE.nii.gz: 4-D, the classes last, 16-bit integers that the header scales to probabilities.
    """
    from calseg.cli.tables import print_estimate
    from calseg.training import stage_one

    config = _settings(out, given, resume=options.resume, method="calseg")
    with _progress(threads) as progress:
        summary = stage_one.estimate(data, out, config, networks=networks, progress=progress, **asdict(options))
    print_estimate(summary)
    print(f"written to {out / 'soft_labels'}")


def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run of calseg train.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder that the probability maps are written to.")],
    cases: Annotated[
        str,
        typer.Option(
            help="Cases to predict: validation or training, as the run split them, or all cases of the folder."
        ),
    ] = "validation",
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated",
            help="Divide the logits by the temperature that fits the validation cases of the run best, near the"
            " foreground. The class with the highest probability stays the same.",
        ),
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Write the class probabilities that a trained network predicts.

    Each case gets a 4-D NIfTI file with the axes x, y, z and classes.
    """
    from calseg.training.predict import predict_folder

    with _progress(threads) as progress:
        content = predict_folder(
            run, data, out, cases=cases, calibrated=calibrated, resume=resume, overwrite=overwrite, device=device,
            progress=progress,
        )  # fmt: skip
    print(f"{len(content['cases'])} probability maps are in {out}")


def evaluate(
    probabilities: Annotated[
        Path,
        typer.Argument(
            help="Folder of probability maps: NAME.nii.gz with the classes last, NAME_0000.nii.gz and so on with one"
            " class each, or NAME.npz of nnU-Net."
        ),
    ],
    labels: Annotated[Path, typer.Argument(help="Folder of label maps, NAME.nii.gz or NAME.nii.")],
    out: Annotated[Path, typer.Option(help="Folder of the report: JSON, CSV and diagrams.")],
    given: Given,
    dataset_json: Annotated[
        Path | None,
        typer.Option(
            help="File with the names of the classes. Default: dataset.json in or above the folder of label maps, or in"
            " the folder of probability maps."
        ),
    ] = None,
    memory: Annotated[
        int,
        typer.Option(
            min=1,
            help="Approximate memory to work in, in MiB. Larger volumes are read in slabs, and a compressed file that"
            " unpacks to more than a quarter of it goes through a temporary file.",
        ),
    ] = 512,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of processes that cases are shared out to. They share memory and threads; the report is the"
            " same for any number.",
        ),
    ] = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    threads: Threads = 0,
) -> None:
    """Score probability maps against label maps: Dice, NLL, Brier, calibration errors, reliability diagrams.

    Every score comes with its 95 % confidence interval over the cases (percentile bootstrap). Each case is kept as soon
    as it is done: after Ctrl-C, or an error in a file, --resume continues with the others.

    calseg evaluate merge REPORT... makes one report of those of several machines. So a folder of probability maps that
    is called merge is given as ./merge.
    """
    from calseg.evaluate import evaluate_folders
    from calseg.report import EvaluateConfig

    _draw_into_files()
    with _progress(threads) as progress:
        report = evaluate_folders(
            probabilities, labels, out, EvaluateConfig(**given.values), dataset_json=dataset_json,
            resume=resume, overwrite=overwrite, memory=memory << 20, workers=workers, progress=progress,
        )  # fmt: skip
    _show_report(report, out)


def merge(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT",
            help="Folders of finished reports of calseg evaluate, with the same classes and settings, and each with"
            " cases of its own.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report of all cases.")],
    overwrite: Overwrite = False,
) -> None:
    """Make one report of the reports of several parts of a data set, as from several machines.

    It has the same bytes as the report of one calseg evaluate of all cases.
    """
    from calseg.merge import merge_reports

    _draw_into_files()
    _show_report(merge_reports(reports, out, overwrite=overwrite), out)


def _draw_into_files() -> None:
    """Let matplotlib open no window."""
    import matplotlib

    matplotlib.use("agg")


def _show_report(report: dict[str, Any], out: Path) -> None:
    """Print a report, and where it lies."""
    from calseg.cli.tables import print_report
    from calseg.report import DIAGRAMS

    print_report(report)
    print(f"written to {out}: report.json, cases.csv, {', '.join(f'{name}.png/.pdf' for name in DIAGRAMS)}")


def demo(
    given: Given,
    out: Annotated[Path, typer.Option(help="Folder for the simulated data and both runs.")] = Path("calseg-demo"),
    overwrite: Overwrite = False,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Simulate volumes with ambiguous borders and several raters, train with Dice + cross-entropy and CALSeg, compare.

    Started again with the same settings it continues an interrupted demo, and shows a finished one.
    """
    from calseg.cli.tables import print_metrics
    from calseg.demo import run_demo
    from calseg.simulation import DemoConfig

    with _progress(threads) as progress:
        results = run_demo(out, DemoConfig(**given.values), overwrite=overwrite, device=device, progress=progress)
    print_metrics(results)
    print(f"written to {out / 'demo.json'}, drawn in {out / 'demo.png'}; the data set is {out / 'data'}")


def nnunet_path() -> None:
    """Print the folder of calseg's trainers, for nnU-Net's environment variable nnUNet_extTrainer."""
    from calseg.integrations.nnunet import plugin_folder

    print(plugin_folder())


def nnunet_soft_labels(
    dataset: Annotated[str, typer.Argument(help="Number or name of the data set in nnUNet_preprocessed.")],
    configuration: Annotated[str, typer.Argument(help="Configuration to train, as in 2d or 3d_fullres.")],
    given: Given,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a finished run of nnU-Net, with all folds and their probabilities (--npz). Default: that of"
            " nnUNetTrainer on the same plans and configuration."
        ),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            help="Folder of soft labels, CASE.nii.gz with the classes last, in place of a run: of calseg soft-labels,"
            " or the shares of several raters."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted call; give the same other options.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the soft labels of an earlier call.")] = False,
    threads: Threads = 0,
) -> None:
    """Make soft labels for nnUNetTrainerSoftLabels, from the held-out predictions of a finished run of nnU-Net.

    They are written beside the preprocessed data, in a folder of their own. nnU-Net's own files are left as they are.
    """
    from calseg.integrations.nnunet import check_version

    check_version()
    from calseg.integrations.nnunet.config import SoftLabelConfig
    from calseg.integrations.nnunet.soft_labels import make_soft_labels

    with _progress(threads) as progress:
        summary = make_soft_labels(
            dataset, configuration, SoftLabelConfig(**given.values), run=run, maps=maps, resume=resume,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    print(
        f"soft labels of {len(summary['cases'])} cases, alpha {summary['alpha']:g}, temperature"
        f" {summary['temperature']:.2f}; train on them with: nnUNetv2_train {dataset} {configuration} FOLD"
        " -tr nnUNetTrainerSoftLabels"
    )


def _settings(out: Path, given: Given, *, resume: bool, **fixed: Any) -> "TrainConfig":
    """The settings given; with ``resume`` those of the run in ``out``, but for what the user typed.

    What was typed and differs is refused later, when the run is opened.
    """
    from calseg.runs import read_state
    from calseg.training.config import TrainConfig

    config = TrainConfig(**fixed, **given.values)
    state = read_state(out) if resume else None
    if state is None or state.command not in ("train", "soft-labels"):
        return config
    return replace(TrainConfig.from_json(state.settings), **{name: getattr(config, name) for name in given.typed})


@contextmanager
def _progress(threads: int) -> Iterator["Progress"]:
    """Set the number of CPU threads, and show progress bars until the work is done."""
    import torch

    from calseg.cli.tables import progress_bars

    if threads:
        torch.set_num_threads(threads)
    with progress_bars() as progress:
        yield progress


# ------------------------------------------------------------------------------------------- the application


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        run: the function.
        config: "module:name" of the dataclass whose fields become options in place of the parameter ``given``.
        leave_out: the fields that do not become options.
        is_resumable: whether the command has the option --resume.
    """

    run: Callable[..., None]
    config: str = ""
    leave_out: Collection[str] = ()
    is_resumable: bool = False

    def for_typer(self) -> Callable[..., None]:
        """The function with all its options; only now the dataclass is imported."""
        if not self.config:
            return self.run
        module, _, name = self.config.partition(":")
        return with_options(self.run, getattr(importlib.import_module(module), name), self.leave_out)


def _not_of_stage_one() -> set[str]:
    """The settings of training that do not bear on the first stage of CALSeg."""
    of_methods = {name for method in METHODS.values() for name in method.settings}
    return {"method", "val_fraction", "dice_labels", *(of_methods - set(METHODS["calseg"].settings))}


TRAINING = "calseg.training.config:TrainConfig"
COMMANDS = {
    "info": Command(info),
    "train": Command(train, TRAINING, is_resumable=True),
    "soft-labels": Command(soft_labels, TRAINING, _not_of_stage_one(), is_resumable=True),
    "predict": Command(predict, is_resumable=True),
    "evaluate": Command(evaluate, "calseg.report:EvaluateConfig", is_resumable=True),
    "evaluate merge": Command(merge),
    "demo": Command(demo, "calseg.simulation:DemoConfig"),
    "nnunet-path": Command(nnunet_path),
    "nnunet-soft-labels": Command(
        nnunet_soft_labels, "calseg.integrations.nnunet.config:SoftLabelConfig", is_resumable=True
    ),
}
RESUMABLE = tuple(name for name, command in COMMANDS.items() if command.is_resumable)


def name_of(arguments: Sequence[str]) -> str:
    """The command that the arguments begin with, which has one word or two."""
    two = " ".join(arguments[:2])
    return two if two in COMMANDS else arguments[0]


def build_app(word: str) -> Any:
    """The typer application that runs the command ``word``.

    Where ``word`` is no command, the application holds all of them, without their options: enough for the help text
    and for the error message.
    """
    app = _group(help=calseg.__doc__)
    for name, command in COMMANDS.items():
        if name == word:
            *groups, last = name.split()
            place = app
            for group in groups:
                inner = _group()
                place.add_typer(inner, name=group)
                place = inner
            place.command(last, help=_help_of(command))(command.for_typer())
        elif word not in COMMANDS:
            app.command(name, help=_help_of(command))(lambda: None)
    return app


def _group(**options: Any) -> typer.Typer:
    """An application of several commands. It keeps the names of its commands even if there is only one."""
    group = typer.Typer(add_completion=False, **options)
    group.callback()(lambda: None)
    return group


def _help_of(command: Command) -> str:
    """The docstring with each paragraph on one line, for typer to wrap."""
    paragraphs = (command.run.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
