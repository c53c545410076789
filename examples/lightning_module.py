"""Train a LightningModule with calseg's loss and metrics, in one process or several: python lightning_module.py --help.

The data are simulated. A data set of your own gives images ``[channels, *S]`` and labels ``[1, *S]``.
"""

import argparse
import json

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import calseg
from calseg.integrations.lightning import ReliabilityDiagrams
from calseg.metrics import BrierScore, CalibrationError, NegativeLogLikelihood, PerCase


class Segmentation(L.LightningModule):
    """A network, trained with Dice and cross-entropy. Its metrics are exact over all volumes of all processes."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.loss = calseg.VLSDiceCrossEntropyLoss(batch_dice=True)
        self.metrics = MetricCollection(
            {
                "ece": CalibrationError(),
                "ece_near_foreground": CalibrationError(region="near"),
                "nll": NegativeLogLikelihood(),
                "brier": BrierScore(),
                "accuracy": MulticlassAccuracy(classes, average="micro"),
            },
            prefix="val_",
        )
        self.cases = PerCase(CalibrationError(region="near"))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        image, label = batch
        loss = self.loss(self.network(image), label)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """Add a batch to the metrics. Lightning computes, logs and resets those that it is given."""
        image, label = batch
        logits = self.network(image)
        self.metrics.update(preds=logits, target=label[:, 0])
        self.cases.update(preds=logits, target=label)
        self.log_dict(self.metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over cases with its interval. A metric that gives several numbers is computed by hand."""
        names = {"value": "val_mean", "lower": "val_mean_lower", "upper": "val_mean_upper"}
        self.log_dict({names[key]: value for key, value in self.cases.compute().items()}, sync_dist=False)
        self.cases.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), 1e-2)


def volumes(count: int, seed: int) -> TensorDataset:
    """Simulate images, float ``[count, 1, 16, 16, 16]``, and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    smooth = nn.functional.avg_pool3d(torch.randn(count, 1, 20, 20, 20, generator=generator), 5, 1)
    label = (smooth > 0.02).to(torch.uint8) + (smooth > 0.08)
    return TensorDataset(smooth * 10 + 0.5 * torch.randn(smooth.shape, generator=generator), label)


def main() -> None:
    """Train and validate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1, help="number of processes")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="lightning_run")
    args = parser.parse_args()
    L.seed_everything(0)
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 3, 3, padding=1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.out, name="", version=""),
        callbacks=[ReliabilityDiagrams()],
    )
    held_out = DataLoader(volumes(8, seed=1))
    module = Segmentation(network, classes=3)
    before = trainer.validate(module, held_out)[0]
    trainer.fit(module, DataLoader(volumes(16, seed=0), batch_size=2, shuffle=True), held_out)
    if trainer.is_global_zero:
        print(json.dumps({"before": before, "after": {k: float(v) for k, v in trainer.callback_metrics.items()}}))


if __name__ == "__main__":
    main()
