"""The command line: ``calseg info``, ``calseg demo``, ``calseg train``, ``calseg soft-labels``, ``calseg predict``,
``calseg evaluate``.

Without the extra ``calseg[train]`` only ``info`` runs; nothing of that extra is imported before it is needed.
Exit codes: 0, 2 for what the user can mend (one line on stderr), 130 and 143 after SIGINT and SIGTERM.
"""

# No "from __future__ import annotations" here: typer evaluates the annotations of the commands, and could not
# resolve the names in them from strings, for they are local to build_app.

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import calseg

EXTRA = ("typer", "rich", "monai", "nibabel")
RESUMABLE = ("calseg train", "calseg soft-labels", "calseg predict", "calseg evaluate")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = "calseg" if arguments[0].startswith("-") else f"calseg {arguments[0]}"
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        if command == "calseg info":
            print_info(as_json="--json" in arguments)
            raise SystemExit(0) from None
        _fail(command, f"needs {error.name}: pip install 'calseg[train]'")
    _run(app, arguments, command)


def _fail(command: str, message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and out."""
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _run(app: Any, arguments: Sequence[str], command: str) -> NoReturn:
    """Turn every failure that the user can mend into one line and an exit code."""
    import typer

    from calseg.data import DataError
    from calseg.training import RunInterruptedError, TrainingError

    click_error: Any = typer.BadParameter.__mro__[2]  # ClickException, which newer typer ships as its own
    try:
        code = app(args=list(arguments), prog_name="calseg", standalone_mode=False)
    except (DataError, TrainingError) as error:
        _fail(command, str(error))
    except RunInterruptedError as error:
        again = [word for word in arguments if word not in ("--overwrite", "--resume")]
        again += ["--resume"] if command in RESUMABLE else []
        _fail(command, f"{error}; continue with: {shlex.join(['calseg', *again])}", error.code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(command, "interrupted", 130)
    except click_error as error:
        _fail(command, f"{error.format_message()} (see {command} --help)")
    raise SystemExit(code if isinstance(code, int) else 0)


def build_app() -> Any:
    """The typer application with its commands."""
    import typer

    from calseg import stages
    from calseg.demo import DemoConfig, run_demo
    from calseg.evaluate import DIAGRAMS, EvaluateConfig, evaluate_folders
    from calseg.predict import CASES, predict_folder
    from calseg.probabilities import MEMORY
    from calseg.training import METHODS, TrainConfig

    app = typer.Typer(add_completion=False, help=calseg.__doc__)
    base, demo_base, evaluate_base = TrainConfig(), DemoConfig(), EvaluateConfig()
    Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in RUN where it stopped.")]
    Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")]
    Device = Annotated[str, typer.Option(help="Device to train on: cpu, cuda, cuda:1, ...")]
    Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves PyTorch's choice.")]
    Data = Annotated[
        Path, typer.Argument(help="Folder in the Medical Segmentation Decathlon's or nnU-Net's raw layout.")
    ]
    Iterations = Annotated[int, typer.Option(help="Updates of each network.")]
    BatchSize = Annotated[int, typer.Option(help="Patches per update.")]
    PatchSize = Annotated[
        tuple[int, int, int],
        typer.Option(help="Voxels of a patch along x, y, z: multiples of 8, or 1 along z for a network on slices."),
    ]
    LearningRate = Annotated[
        float, typer.Option(help="Peak rate of AdamW, after a warm-up and before polynomial decay.")
    ]
    Seed = Annotated[int, typer.Option(help="Seed of the weights, patches and noise.")]
    Foreground = Annotated[float, typer.Option(help="Share of the patches centred on a voxel that is not background.")]
    FlipAxis = Annotated[
        list[int] | None, typer.Option(help="Mirror patches along this axis (0 to 2); may be repeated.")
    ]
    CheckpointEvery = Annotated[int, typer.Option(min=1, help="Updates between checkpoints.")]
    # None: the default of the method.
    Alpha = Annotated[
        float | None,
        typer.Option(help="vls, calseg: share of the estimate in the soft label; label_smoothing: share of the"
                     " uniform one; mbls, nacl: weight of the penalty."),
    ]  # fmt: skip
    Temperature = Annotated[
        float | None,
        typer.Option(
            help="vls, calseg: temperature of the sampled softmax. calseg's default is fitted: the one under which the"
            " estimates of networks that did not see a case fit its label best."
        ),
    ]
    NumSamples = Annotated[int | None, typer.Option(help="vls: noise samples per voxel; calseg: codes per case.")]
    Beta = Annotated[
        float | None,
        typer.Option(
            help="vls, calseg: weight of the KL term. Of vls the prior N(0, 1) holds for the logits of every voxel,"
            " so that 0.1 already flattens confident voxels, and 1 keeps the network from learning."
        ),
    ]
    LatentSize = Annotated[int, typer.Option(help="calseg: numbers in the latent code.")]
    Reconstruction = Annotated[float, typer.Option(help="calseg: weight of the image's reconstruction.")]
    Folds = Annotated[
        int, typer.Option(help="calseg: parts of the cases that take turns in not being seen; 1: no cross-fitting.")
    ]

    @app.command("info")
    def info_command(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Versions, backends and instruction sets."""
        print_info(as_json=as_json)

    @app.command("train")
    def train_command(
        context: typer.Context,
        data: Data,
        out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, split, metrics.")],
        method: Annotated[str, typer.Option("--method", "--loss", help=f"One of {', '.join(METHODS)}.")] = base.method,
        iterations: Iterations = base.iterations,
        batch_size: BatchSize = base.batch_size,
        patch_size: PatchSize = base.patch_size,
        learning_rate: LearningRate = base.learning_rate,
        seed: Seed = base.seed,
        val_fraction: Annotated[float, typer.Option(help="Share of the cases that validate.")] = base.val_fraction,
        split_seed: Annotated[
            int, typer.Option(help="Seed of the split, apart from --seed so that runs stay comparable.")
        ] = base.split_seed,
        foreground: Foreground = base.foreground,
        flip_axis: FlipAxis = None,
        alpha: Alpha = None,
        sigma: Annotated[float, typer.Option(help="svls: of the Gaussian, in voxels.")] = base.sigma,
        gamma: Annotated[float, typer.Option(help="focal: the exponent.")] = base.gamma,
        margin: Annotated[float, typer.Option(help="mbls: by which a logit may lie below the top.")] = base.margin,
        temperature: Temperature = None,
        num_samples: NumSamples = None,
        beta: Beta = None,
        latent_size: LatentSize = base.latent_size,
        reconstruction: Reconstruction = base.reconstruction,
        folds: Folds = base.folds,
        soft_labels: Annotated[
            Path | None,
            typer.Option(help="calseg: folder with CASE.nii.gz to train on, instead of a first stage."),
        ] = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        checkpoint_every: CheckpointEvery = 50,
        device: Device = "cpu",
        threads: Threads = 0,
    ) -> None:
        """Train a small U-Net (MONAI's) with one of the methods, and score it.

        "calseg" first trains the networks that estimate soft labels (CALSeg's first stage), in folds, then the network
        to deploy. A patch size with 1 as its last side trains a network of two dimensions on slices.

        Ctrl-C saves a checkpoint; --resume takes the settings from the run, and ends where an uninterrupted
        run would have, bit for bit on the same machine.
        """
        given: dict[str, Any] = {
            "method": method,
            "iterations": iterations,
            "batch_size": batch_size,
            "patch_size": patch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            "val_fraction": val_fraction,
            "split_seed": split_seed,
            "foreground": foreground,
            "alpha": alpha,
            "sigma": sigma,
            "gamma": gamma,
            "margin": margin,
            "temperature": temperature,
            "num_samples": num_samples,
            "beta": beta,
            "latent_size": latent_size,
            "reconstruction": reconstruction,
            "folds": folds,
        }
        settings = TrainConfig(**given, flip_axes=tuple(flip_axis or ()))
        if resume:
            settings = _resumed(context, out, settings, given)
        with _progress_bars() as progress:
            _set_threads(threads)
            metrics = stages.train(
                data,
                out,
                settings,
                soft_labels=soft_labels,
                resume=resume,
                overwrite=overwrite,
                device=device,
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
        print_metrics({settings.method: metrics})
        print(f"written to {out / 'metrics.json'}")

    @app.command("soft-labels")
    def soft_labels_command(
        context: typer.Context,
        data: Data,
        out: Annotated[Path, typer.Option(help="Folder of the networks and, in soft_labels, of the maps.")],
        networks: Annotated[
            Path | None,
            typer.Option(help="Folder of another run on the same cases, whose networks estimate again instead."),
        ] = None,
        iterations: Iterations = base.iterations,
        batch_size: BatchSize = base.batch_size,
        patch_size: PatchSize = base.patch_size,
        learning_rate: LearningRate = base.learning_rate,
        seed: Seed = base.seed,
        split_seed: Annotated[int, typer.Option(help="Seed of the folds.")] = base.split_seed,
        foreground: Foreground = base.foreground,
        flip_axis: FlipAxis = None,
        alpha: Alpha = None,
        temperature: Temperature = None,
        num_samples: NumSamples = None,
        beta: Beta = None,
        latent_size: LatentSize = base.latent_size,
        reconstruction: Reconstruction = base.reconstruction,
        folds: Folds = base.folds,
        resume: Resume = False,
        overwrite: Overwrite = False,
        checkpoint_every: CheckpointEvery = 50,
        device: Device = "cpu",
        threads: Threads = 0,
    ) -> None:
        """Estimate a soft label for every case (CALSeg's first stage), for any trainer to train on.

        The networks are trained in folds, so that no case is estimated by a network that saw it. OUT/soft_labels gets
        CASE.nii.gz: 4-D, the classes last, 16-bit integers that the header scales to probabilities.
        """
        given: dict[str, Any] = {
            "iterations": iterations,
            "batch_size": batch_size,
            "patch_size": patch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            "split_seed": split_seed,
            "foreground": foreground,
            "alpha": alpha,
            "temperature": temperature,
            "num_samples": num_samples,
            "beta": beta,
            "latent_size": latent_size,
            "reconstruction": reconstruction,
            "folds": folds,
        }
        settings = TrainConfig(method="calseg", **given, flip_axes=tuple(flip_axis or ()))
        if resume:
            settings = _resumed(context, out, settings, given)
        with _progress_bars() as progress:
            _set_threads(threads)
            summary = stages.estimate(
                data,
                out,
                settings,
                networks=networks,
                resume=resume,
                overwrite=overwrite,
                device=device,
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
        print_estimate(summary)
        print(f"written to {out / 'soft_labels'}")

    @app.command("predict")
    def predict_command(
        run: Annotated[Path, typer.Argument(help="Folder of a run of calseg train.")],
        data: Data,
        out: Annotated[Path, typer.Option(help="Folder of the probability maps.")],
        cases: Annotated[str, typer.Option(help="validation or training, by the split of the run, or all.")] = CASES[0],
        resume: Resume = False,
        overwrite: Overwrite = False,
        device: Device = "cpu",
        threads: Threads = 0,
    ) -> None:
        """Write the probabilities that a trained network gives, a 4-D NIfTI file [x, y, z, classes] per case."""
        with _progress_bars() as progress:
            _set_threads(threads)
            content = predict_folder(
                run, data, out, cases=cases, resume=resume, overwrite=overwrite, device=device, progress=progress
            )
        print(f"{len(content['cases'])} probability maps are in {out}")

    @app.command("evaluate")
    def evaluate_command(
        probabilities: Annotated[
            Path,
            typer.Argument(
                help="Folder of probability maps: NAME.nii.gz with the classes last, NAME_0000.nii.gz, ... with a class"
                " each, or nnU-Net's NAME.npz."
            ),
        ],
        labels: Annotated[Path, typer.Argument(help="Folder of label maps, NAME.nii.gz or NAME.nii.")],
        out: Annotated[Path, typer.Option(help="Folder of the report: JSON, CSV and diagrams.")],
        n_bins: Annotated[int, typer.Option(help="Bins of confidence, of equal width.")] = evaluate_base.n_bins,
        ignore_label: Annotated[
            int | None, typer.Option(help="Label of voxels that do not count; default: that of dataset.json.")
        ] = None,
        preset: Annotated[
            list[str] | None,
            typer.Option(
                help="Add the ECE as torchmetrics, monai or marginloss define it; may be repeated. The figure of"
                " torchmetrics is the pooled one, that of the others the mean over the cases."
            ),
        ] = None,
        dataset_json: Annotated[
            Path | None,
            typer.Option(help="File with the names of the classes; default: dataset.json beside or above the maps."),
        ] = None,
        num_resamples: Annotated[
            int, typer.Option(help="How often cases are drawn anew for the 95 % intervals.")
        ] = evaluate_base.num_resamples,
        seed: Annotated[int, typer.Option(help="Seed of these draws.")] = evaluate_base.seed,
        memory: Annotated[
            int,
            typer.Option(
                min=1,
                help="MiB to work in, about: larger volumes are read in slabs, and what is compressed and unpacks to"
                " more than a quarter of it goes through a temporary file.",
            ),
        ] = MEMORY >> 20,
        resume: Resume = False,
        overwrite: Overwrite = False,
        threads: Threads = 0,
    ) -> None:
        """Score probability maps against label maps: Dice, NLL, Brier, calibration errors, reliability diagrams.

        Every score comes with its 95 % interval over the cases (percentile bootstrap). Cases are kept as they are
        done: after Ctrl-C, or an error in a file, --resume goes on where it stopped.
        """
        import matplotlib

        matplotlib.use("agg")
        config = EvaluateConfig(n_bins, ignore_label, tuple(preset or ()), num_resamples, seed)
        with _progress_bars() as progress:
            _set_threads(threads)
            report = evaluate_folders(
                probabilities,
                labels,
                out,
                config,
                dataset_json=dataset_json,
                resume=resume,
                overwrite=overwrite,
                memory=memory << 20,
                progress=progress,
            )
        print_report(report)
        print(f"written to {out}: report.json, cases.csv, {', '.join(f'{name}.png/.pdf' for name in DIAGRAMS)}")

    @app.command("demo")
    def demo_command(
        out: Annotated[Path, typer.Option(help="Folder for the data and both runs.")] = Path("calseg-demo"),
        cases: Annotated[int, typer.Option(help="Volumes to simulate.")] = demo_base.cases,
        raters: Annotated[int, typer.Option(help="Raters to simulate.")] = demo_base.raters,
        side: Annotated[int, typer.Option(help="Mean side of a volume in voxels.")] = demo_base.side,
        iterations: Annotated[int, typer.Option(help="Updates per network.")] = demo_base.iterations,
        seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = demo_base.seed,
        overwrite: Overwrite = False,
        device: Device = "cpu",
        threads: Threads = 0,
    ) -> None:
        """Simulate volumes with ambiguous borders and several raters, train with cross-entropy and CALSeg, compare.

        Started again with the same settings it continues an interrupted demo, and shows a finished one.
        """
        config = DemoConfig(cases=cases, raters=raters, side=side, iterations=iterations, seed=seed)
        with _progress_bars() as progress:
            _set_threads(threads)
            results = run_demo(out, config, overwrite=overwrite, device=device, progress=progress)
        print_metrics(results)
        print(f"written to {out / 'demo.json'}, drawn in {out / 'demo.png'}; the data set is {out / 'data'}")

    return app


def _resumed(context: Any, out: Path, settings: Any, given: Iterable[str]) -> Any:
    """The settings of the run in ``out``; what the user typed stays, and is refused later if it differs."""
    from calseg.training import TrainConfig, read_json

    if not (out / "config.json").is_file():
        return settings
    source = {name: context.get_parameter_source(name) for name in given}
    source["flip_axes"] = context.get_parameter_source("flip_axis")
    typed = [name for name, where in source.items() if where and where.name == "COMMANDLINE"]
    saved = {key: value for key, value in read_json(out / "config.json").items() if key != "data"}
    return replace(TrainConfig.from_json(saved), **{name: getattr(settings, name) for name in typed})


def _set_threads(count: int) -> None:
    import torch

    if count:
        torch.set_num_threads(count)


# ------------------------------------------------------------------------------------------------- output


def print_info(*, as_json: bool) -> None:
    """What :func:`calseg.info` returns, as JSON or one line per entry."""
    content = calseg.info()
    if as_json:
        print(json.dumps(content, indent=2, default=str))
        return
    rows = list(_flatten(content))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(str(item) for item in value) or "-"
        else:
            yield f"{prefix}{key}", "-" if value is None else str(value)


@contextmanager
def _progress_bars() -> Iterator[Any]:
    """A progress callback that draws one bar on stderr per stage."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    open_task: list[Any] = []

    def progress(stage: str, done: int, total: int, loss: float | None) -> None:
        bars.start()  # only now, so that an error before the first stage stays a single line
        if not open_task or open_task[0] != stage:
            open_task[:] = [stage, bars.add_task(stage, total=total, loss="")]
        bars.update(open_task[1], completed=done, loss="" if loss is None else f"loss {loss:.4f}")

    try:
        yield progress
    finally:
        if open_task:
            bars.stop()


def print_estimate(summary: Mapping[str, Any]) -> None:
    """What the first stage's estimates are worth, before they are blended with the labels."""
    estimate = summary["estimate"]
    print(
        f"{len(summary['cases'])} cases; the estimate alone, before it is blended with the label, mean over the cases:"
    )
    print(f"  Dice {estimate['dice']:.4f}; over the foreground: NLL {estimate['nll']:.4f},")
    print(
        f"  confidence {estimate['confidence']:.4f} against an accuracy of {estimate['accuracy']:.4f};"
        f" temperature {summary['temperature']:.2f}"
    )


def print_metrics(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """One table, a column per run."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(runs.values()))
    count = len(first["cases"])
    table = Table()
    table.add_column("score")
    table.add_column("over")
    for name in runs:
        table.add_column(name, justify="right")

    def row(score: str, over: str, *path: str, digits: int = 4) -> None:
        values = []
        for metrics in runs.values():
            value: Any = metrics
            for key in path:
                value = value[key]
            values.append("-" if value is None else f"{value:.{digits}f}")
        table.add_row(score, over, *values)

    for name in first["dice"]:
        row(f"Dice {name}", "cases", "dice", name)
    row("Dice mean", "classes", "dice_mean")
    for region in ("all", "foreground"):
        table.add_section()
        for score in ("nll", "brier", "ece"):
            row(score.upper() if score != "brier" else "Brier", region, region, score)
    if "raters" in first:
        table.add_section()
        for score in ("nll", "brier", "ece"):
            row(score.upper() if score != "brier" else "Brier", "all, other raters", "raters", "all", score)
        row("squared error", "all, true probability", "truth", "brier")
    table.add_section()
    row("training", "seconds", "seconds", "train", digits=0)
    print(f"{first['dataset']}: {first['iterations']} iterations, {count} validation case{'s' * (count != 1)}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print("foreground: voxels whose label is not 0; ECE: 15 equal bins of the top probability")


def print_report(report: Mapping[str, Any]) -> None:
    """The table of ``calseg evaluate``: each score with its interval over the cases."""
    from rich.console import Console
    from rich.table import Table

    def cell(entry: Mapping[str, Any] | None) -> str:
        if entry is None or entry["value"] is None:
            return "-"
        if entry["interval"] is None:
            return f"{float(entry['value']):.4f}"
        lower, upper = map(float, entry["interval"])
        return f"{float(entry['value']):.4f} [{lower:.4f}, {upper:.4f}]"

    table = Table()
    for name in ("score", "over"):
        table.add_column(name)
    for name in ("pooled", "mean over cases"):
        table.add_column(f"{name} [{report['confidence_level']:.0%}]", justify="right")

    def row(score: str, over: str, entry: Mapping[str, Any]) -> None:
        table.add_row(score, over, cell(entry.get("pooled")), cell(entry["mean"]))

    for name, entry in report["dice"].items():
        row("Dice", name, entry)
    row("Dice", "classes 1 and up", report["dice_foreground_mean"])
    names = {
        "nll": "NLL",
        "brier": "Brier",
        "ece": "ECE",
        "ace": "ACE",
        "mce": "MCE",
        "class_wise_ece": "class-wise ECE",
    }
    for region in ("all", "foreground"):
        table.add_section()
        for score, name in names.items():
            row(name, f"{region} voxels", report[region][score])
    if report["presets"]:
        table.add_section()
    for name, entry in report["presets"].items():
        row(f"ECE, {name}", "its voxels", entry)
    voxels = report["voxels"]
    count = report["cases"]
    print(f"{count} case{'s' * (count != 1)}, {voxels['all']:,} voxels, {voxels['foreground']:,} of them foreground")
    Console(width=None if sys.stdout.isatty() else 100).print(table, markup=False)
    print(f"foreground: label not 0; calibration errors: {report['config']['n_bins']} equal bins of the probability")
    for number, what in (
        ("nan_voxels", "a NaN probability; they are left out"),
        ("infinite_voxels", "a label of probability 0, whose NLL is infinite"),
    ):
        if report[number]:
            print(f"{report[number]:,} voxels have {what}")
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
