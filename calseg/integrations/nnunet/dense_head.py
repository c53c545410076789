"""The dense head of variational label smoothing, added to the heads of a network of nnU-Net's for training only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = "moments"
HEADS = (nn.Conv2d, nn.Conv3d)
START_LOGVAR = -1.386
"""The first ``logvar`` of every voxel: sigma = 0.5, neither too large nor too small compared with mu."""


def add_dense_heads(network: nn.Module) -> None:
    """Make every head of the decoder give logits, mu and logvar ``[B, 3 C, *S]`` in training.

    In evaluation the heads give the logits ``[B, C, *S]``, as before. The parameters of the network keep their names;
    new ones have the word ``moments`` in theirs.

    Args:
        network: a network of nnU-Net's with a list of heads ``decoder.seg_layers``, as its U-Nets have.

    Raises:
        NotImplementedError: the network has no such heads.
    """
    for head in heads_of(network):
        _add(head)


def heads_of(network: nn.Module) -> list[nn.Conv2d | nn.Conv3d]:
    """Return the heads of a network of nnU-Net's, one for each level, the lowest resolution first.

    Raises:
        NotImplementedError: the network has no list of convolutions ``decoder.seg_layers``.
    """
    heads = [head for head in getattr(getattr(network, "decoder", None), "seg_layers", ()) if isinstance(head, HEADS)]
    if not heads:
        raise NotImplementedError(
            f"wanted a network with the heads decoder.seg_layers of nnU-Net's U-Nets; {type(network).__name__} has none"
        )
    return heads


def _add(head: nn.Conv2d | nn.Conv3d) -> None:
    """Give one head a convolution for mu and logvar, whose output follows the logits in training."""
    classes = head.out_channels
    moments = type(head)(head.in_channels, 2 * classes, 1).to(head.weight)
    with torch.no_grad():
        # mu starts as the logits: different heads pull the network in different directions at first.
        moments.weight[:classes], moments.weight[classes:] = head.weight, 0.0
        assert moments.bias is not None
        moments.bias[:classes] = 0.0 if head.bias is None else head.bias
        moments.bias[classes:] = START_LOGVAR
    head.add_module(MOMENTS, moments)
    head.register_forward_hook(_append_moments)
    head.register_load_state_dict_pre_hook(_keep_moments)


def _append_moments(head: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    """Concatenate mu and logvar to the logits in training."""
    return torch.cat([logits, head.get_submodule(MOMENTS)(inputs[0])], 1) if head.training else logits


def _keep_moments(head: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let weights without those of the dense head be loaded; the dense head keeps its own then."""
    for name, value in head.get_submodule(MOMENTS).state_dict().items():
        state.setdefault(f"{prefix}{MOMENTS}.{name}", value)


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the network without its dense heads, and those of the dense heads."""
    dense = {name: value for name, value in weights.items() if MOMENTS in name.split(".")}
    return {name: value for name, value in weights.items() if name not in dense}, dense
