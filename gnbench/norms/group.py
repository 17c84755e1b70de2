"""Norms over groups of the channels of one image."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn


def group_norm(
    channels: int,
    num_groups: int | Literal["auto"] | None = None,
    channels_per_group: int | None = None,
    eps: float = 1e-5,
    affine: bool = True,
    at_most: int = 32,
) -> nn.GroupNorm:
    """Group normalization (Wu & He 2018, section 3.1), torch's implementation.

    One group is layer normalization over C,H,W; as many groups as channels is instance
    normalization. ``auto`` takes the largest divisor of ``channels`` that is ``at_most`` so large.
    ``eps`` is added to the variance; ``affine`` learns γ and β per channel.

    Raises:
        ValueError: unless exactly one of ``num_groups`` and ``channels_per_group`` is given and
            it divides ``channels``.
    """
    groups = choose_groups(channels, num_groups, channels_per_group, at_most)
    return GroupNorm(groups, channels, eps, affine)


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``, also right on a CPU where a mean is large beside its deviation.

    For channels-last inputs torch's CPU kernel takes the variance as E[x²] − E[x]², whose rounding
    error grows with (mean / deviation)²: 1e-4 of the output at 10, all of it at 1,000. Beyond
    `LARGEST_MEAN` the groups are shifted by their means first, which changes neither the output nor
    the gradient of a group norm but for rounding. Below it the bits are those of torch.
    """

    LARGEST_MEAN = 8.0  # deviations; trainings of SimpleNetv2 stay below 3

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each group of channels of each image of ``input`` (N,C,H,W)."""
        plain = input.device.type == "cpu" and input.dtype == torch.float32
        if not plain or torch.compiler.is_compiling():  # other kernels
            return super().forward(input)
        output, mean, scale = self._normalize(input)
        # By numpy: inside a recorded step, torch would take it for a kernel that waits.
        with np.errstate(all="ignore"):  # of a training that diverges
            ratios = mean.detach().numpy() * scale.detach().numpy()
        if np.abs(ratios).max(initial=0.0) > self.LARGEST_MEAN:
            each = self.num_channels // self.num_groups
            shift = mean.detach().repeat_interleave(each, dim=1)
            output, _, _ = self._normalize(input - shift[:, :, None, None])
        return output

    def _normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output of torch's kernel, mean and 1/deviation of the groups (N,groups)."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        n, c, h, w = x.shape
        return torch.native_group_norm(
            x, self.weight, self.bias, n, c, h * w, self.num_groups, self.eps
        )


class ReferenceGroupNorm(nn.Module):
    """Group normalization written out as in the report and in Wu & He 2018, figure 3.

    Arguments and errors are those of `group_norm`, with which it agrees up to rounding.
    """

    def __init__(
        self,
        channels: int,
        num_groups: int | Literal["auto"] | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        at_most: int = 32,
    ) -> None:
        super().__init__()
        self.groups = choose_groups(channels, num_groups, channels_per_group, at_most)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each group of channels of each image of ``x`` (N,C,H,W)."""
        n, c, h, w = x.shape
        grouped = x.reshape(n, self.groups, c // self.groups, h, w)
        over = (2, 3, 4)
        centered = grouped - grouped.mean(over, keepdim=True)
        centered = centered - centered.mean(over, keepdim=True)  # what a large mean was rounded by
        variance = centered.square().mean(over, keepdim=True)
        x = (centered / torch.sqrt(variance + self.eps)).reshape(n, c, h, w)
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight.view(1, c, 1, 1) + self.bias.view(1, c, 1, 1)


def choose_groups(
    channels: int,
    num_groups: int | Literal["auto"] | None,
    channels_per_group: int | None = None,
    at_most: int = 32,
) -> int:
    """Return the number of groups of so many channels; arguments and errors as `group_norm`."""
    if num_groups != "auto" and at_most != 32:
        raise ValueError(f"at_most={at_most}: goes with num_groups=auto, not {num_groups}")
    if num_groups == "auto" and channels_per_group is None:
        if at_most < 1:
            raise ValueError(f"at_most={at_most}: must be at least 1")
        return max(d for d in range(1, min(channels, at_most) + 1) if channels % d == 0)
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
