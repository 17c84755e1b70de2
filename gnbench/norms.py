"""Normalization layers, each called with the number of channels it normalizes.

Those that torch already has with channels first (``BatchNorm2d``, ``InstanceNorm2d``,
``Identity``) are named in ``conf/norm`` directly. All take and return N,C,H,W tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(
    channels: int,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    eps: float = 1e-5,
    affine: bool = True,
) -> nn.GroupNorm:
    """Group normalization (Wu & He 2018, section 3.1), torch's implementation.

    One group is layer normalization over C,H,W; as many groups as channels is instance
    normalization. ``eps`` is added to the variance; ``affine`` learns γ and β per channel.

    Raises:
        ValueError: unless exactly one of ``num_groups`` and ``channels_per_group`` is given and
            it divides ``channels``.
    """
    return nn.GroupNorm(_groups(channels, num_groups, channels_per_group), channels, eps, affine)


class ReferenceGroupNorm(nn.Module):
    """Group normalization written out as in the report and in Wu & He 2018, figure 3.

    Arguments and errors are those of `group_norm`, with which it agrees up to rounding.
    """

    def __init__(
        self,
        channels: int,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.groups = _groups(channels, num_groups, channels_per_group)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each group of channels of each image of ``x`` (N,C,H,W)."""
        n, c, h, w = x.shape
        grouped = x.reshape(n, self.groups, c // self.groups, h, w)
        mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
        variance = grouped.var(dim=(2, 3, 4), correction=0, keepdim=True)
        x = ((grouped - mean) / torch.sqrt(variance + self.eps)).reshape(n, c, h, w)
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight.view(1, c, 1, 1) + self.bias.view(1, c, 1, 1)


class LocalResponseNorm(nn.Module):
    """Local response normalization (Krizhevsky et al. 2012, section 3.3) over ``size`` channels.

    Computes what ``torch.nn.LocalResponseNorm`` does (α is divided by ``size``) as a sum of shifted
    slices: torch's goes through an average pooling whose CUDA backward is not deterministic.

    Raises:
        ValueError: if ``size`` is not from 1 to ``channels``.
    """

    def __init__(
        self, channels: int, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
    ) -> None:
        super().__init__()
        if not 1 <= size <= channels:
            raise ValueError(f"size={size} must be from 1 to the number of channels ({channels})")
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Divide each activation of ``x`` (N,C,H,W) by the energy of its neighbouring channels."""
        channels = x.shape[1]
        below = self.size // 2
        squares = F.pad(x.square(), (0, 0, 0, 0, below, self.size - 1 - below))
        energy = squares[:, :channels]
        for shift in range(1, self.size):
            energy = energy + squares[:, shift : shift + channels]
        return x / (self.k + self.alpha / self.size * energy) ** self.beta


def _groups(channels: int, num_groups: int | None, channels_per_group: int | None) -> int:
    if (num_groups is None) == (channels_per_group is None):
        raise ValueError(
            f"num_groups={num_groups} and channels_per_group={channels_per_group}: "
            "give exactly one of them and set the other to null"
        )
    name, value = (
        ("num_groups", num_groups)
        if channels_per_group is None
        else ("channels_per_group", channels_per_group)
    )
    if not isinstance(value, int) or value < 1 or channels % value:
        divisors = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        raise ValueError(f"{name}={value} does not divide {channels} channels: use {divisors}")
    return value if channels_per_group is None else channels // value
