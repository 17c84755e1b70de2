"""In which order images and weights lie in a GPU's memory: as it has to convert the fewest."""

from __future__ import annotations

import torch
from torch import nn

from gnbench.norms import BatchGroupNorm


def place(model: nn.Module, device: torch.device) -> bool:
    """Move the network to ``device``; return whether its images are to come channels last.

    cuDNN converts what does not lie as the rest of a convolution does, weights too, and torch what
    a norm cannot take as it lies. On a GPU all is channels last, which tensor cores need, unless a
    norm knows N,C,H,W alone. A CPU converts weights once they are in its cache: they stay.
    """
    model.to(device)
    if device.type == "cpu":
        return True
    channels_last = not any(map(_needs_rows, model.modules()))
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return channels_last


def _needs_rows(layer: nn.Module) -> bool:
    """Tell whether torch computes a layer on a GPU in N,C,H,W order, whatever it is given."""
    grouped = isinstance(layer, BatchGroupNorm) and layer.num_groups < layer.num_channels
    return grouped or isinstance(layer, nn.GroupNorm | nn.InstanceNorm2d)
