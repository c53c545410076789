"""Reliability diagrams for those who train with Lightning (the extra ``calseg[lightning]``).

The losses of calseg and the metrics of :mod:`calseg.metrics` need no integration: a ``LightningModule`` uses them as
they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lightning":
        raise
    raise ModuleNotFoundError(
        "calseg.integrations.lightning needs Lightning: pip install 'calseg[lightning]'", name="lightning"
    ) from None

from torchmetrics import Metric, MetricCollection

from calseg import checks as check
from calseg.metrics import CalibrationError, PerCase

__all__ = ["ReliabilityDiagrams"]


class ReliabilityDiagrams(Callback):
    """Callback that draws the reliability diagram of every calibration error of a module into its loggers.

    It finds the metrics :class:`calseg.metrics.CalibrationError`, and :class:`calseg.metrics.PerCase` of them, among
    the attributes of the module, also in a ``MetricCollection``. At the end of a validation or test epoch it draws
    those that were updated, over the volumes of all processes, as ``reliability/NAME`` with the name of the attribute.
    The metrics keep their sums. A metric must not be reset before ``on_validation_epoch_end``, or
    ``on_test_epoch_end``.

    Figures are taken by the loggers of TensorBoard, Weights & Biases, MLflow and Comet, and by every logger whose
    ``experiment`` has a method ``add_figure``. If there is no such logger, one warning says so.

    Args:
        every_n_epochs: in training, diagrams are drawn after every so many epochs. Default 1.

    Raises:
        TypeError, ValueError: ``every_n_epochs`` is no integer of at least 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from calseg.integrations.lightning import ReliabilityDiagrams
        >>> trainer = Trainer(callbacks=[ReliabilityDiagrams(every_n_epochs=5)], accelerator="cpu", logger=False)
    """

    def __init__(self, *, every_n_epochs: int = 1) -> None:
        check.check_integer("every_n_epochs", every_n_epochs, 1)
        self.every_n_epochs = every_n_epochs
        self._has_warned = False

    def on_validation_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Draw the diagrams, except after the batches that Lightning tries before the training."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self._draw(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Draw the diagrams."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Any, module: nn.Module) -> None:
        for name, metric in _metrics_with_diagram(module):
            # All processes add their sums up together, so they must agree on what is drawn.
            if not trainer.strategy.reduce_boolean_decision(metric.update_called, all=False):
                continue
            figure, _ = metric.plot()
            try:
                if trainer.is_global_zero:
                    self._log(trainer, f"reliability/{name}", figure)
            finally:
                _close(figure)

    def _log(self, trainer: Any, name: str, figure: Any) -> None:
        taken = [log_figure(logger, name, figure, trainer.global_step) for logger in trainer.loggers]
        if not any(taken) and not self._has_warned:
            self._has_warned = True
            kinds = " and ".join(type(logger).__name__ for logger in trainer.loggers)
            why = f"{kinds} takes no figures" if kinds else "there is no logger"
            warnings.warn(
                f"ReliabilityDiagrams: no diagram is logged, since {why}; a TensorBoardLogger takes figures",
                RuntimeWarning,
                stacklevel=2,
            )


def log_figure(logger: Any, name: str, figure: Any, step: int) -> bool:
    """Give a figure of matplotlib to a logger of Lightning, and return whether it takes figures."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(name, figure, global_step=step, close=False)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        figure.canvas.draw()
        logger.log_image(name, [np.asarray(figure.canvas.buffer_rgba())], step=step)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_figure(logger.run_id, figure, f"{name}/{step}.png")
    elif hasattr(experiment, "log_figure"):  # Comet
        experiment.log_figure(name, figure, step=step)
    else:
        return False
    return True


def _close(figure: Any) -> None:
    """Free a figure, which pyplot would keep."""
    import matplotlib.pyplot as plt

    plt.close(figure)


def _metrics_with_diagram(module: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and metrics in a module of which there is a reliability diagram."""
    for name, child in module.named_children():
        if isinstance(child, MetricCollection):
            # The collection itself gives each metric its sums, which metrics with the same settings share.
            metrics: dict[str, nn.Module] = dict(child.items())
        else:
            metrics = {name: child}
        for key, metric in metrics.items():
            error = metric.metric if isinstance(metric, PerCase) else metric
            if isinstance(error, CalibrationError):
                yield f"{path}{key}", metric
        if not isinstance(child, (Metric, MetricCollection)):
            yield from _metrics_with_diagram(child, f"{path}{name}.")
