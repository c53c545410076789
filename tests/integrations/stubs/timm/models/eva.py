"""The one name that nnU-Net imports from here."""

from torch import nn

EvaBlock = nn.Module
