"""Train MONAI's UNet with calseg's loss on a Decathlon folder: python monai_decathlon.py DATA [--help]."""

import argparse
import json
import operator
from pathlib import Path

import monai
import torch
from monai import transforms as mt
from monai.data import CacheDataset, DataLoader, load_decathlon_datalist
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointSaver, StatsHandler, ValidationHandler, from_engine
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet

from calseg.integrations.monai import CalibrationHandler, DiceVLSLoss, EnsureSoftLabeld
from calseg.metrics import CalibrationError

parser = argparse.ArgumentParser()
parser.add_argument("data", type=Path)
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--patch", type=int, default=64, help="side of the patches, in voxels")
parser.add_argument("--soft-labels", type=Path, help="folder that `calseg soft-labels` has written")
parser.add_argument("--alpha", type=float, default=0.4, help="the one that the soft labels were made with")
parser.add_argument("--out", type=Path, default=Path("monai_decathlon"))
args = parser.parse_args()

monai.utils.set_determinism(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
meta = json.loads((args.data / "dataset.json").read_text())
cases = load_decathlon_datalist(args.data / "dataset.json", True, "training")
keys, patch = ["image", "label"], [args.patch] * 3
if args.soft_labels:
    keys.append("soft_label")
    cases = [{**case, "soft_label": args.soft_labels / Path(case["label"]).name} for case in cases]
fitting = EnsureSoftLabeld("soft_label", alpha=args.alpha, allow_missing_keys=True)
load = [mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys), mt.Orientationd(keys, "RAS", labels=None), fitting]
load += [mt.NormalizeIntensityd("image", channel_wise=True), mt.SpatialPadd(keys, patch, mode="edge")]
augment = [mt.RandSpatialCropd(keys, patch, random_size=False), *(mt.RandFlipd(keys, 0.5, axis) for axis in range(3))]
train = DataLoader(CacheDataset(cases[len(cases) // 5 :], mt.Compose(load + augment)), batch_size=2, shuffle=True)
held_out = DataLoader(CacheDataset(cases[: len(cases) // 5], mt.Compose(load)), batch_size=1)

network = UNet(3, len(meta["modality"]), len(meta["labels"]), (16, 32, 64, 128), (2, 2, 2), num_res_units=2).to(device)
saver = CheckpointSaver(args.out, {"network": network}, save_key_metric=True)
evaluator = SupervisedEvaluator(
    device, held_out, network, inferer=SlidingWindowInferer(patch, 4, 0.5), metric_cmp_fn=operator.lt,
    key_val_metric={"ece_near_foreground": CalibrationHandler(CalibrationError(region="near"))},
    val_handlers=[StatsHandler(output_transform=lambda output: None), saver],
)  # fmt: skip
loss = DiceVLSLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)  # was DiceCELoss(...)
print_loss = StatsHandler(tag_name="loss", output_transform=from_engine("loss", first=True))
SupervisedTrainer(
    device, args.epochs, train, network, torch.optim.AdamW(network.parameters(), 1e-3), loss,
    prepare_batch=lambda batch, device, *_, **__: (batch["image"].to(device), batch[keys[-1]].to(device)),
    train_handlers=[print_loss, ValidationHandler(min(5, args.epochs), evaluator)],
).run()  # fmt: skip
print(evaluator.state.metrics)
