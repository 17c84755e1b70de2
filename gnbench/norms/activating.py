"""Norms that bring their activation (``apply_act``): timm's, with those settings that work."""

from __future__ import annotations

from typing import Literal

from torch import nn

from gnbench.norms.group import choose_groups


def evonorm_s0(
    channels: int,
    num_groups: int | Literal["auto"] | None = None,
    channels_per_group: int | None = None,
    eps: float = 1e-5,
    at_most: int = 32,
) -> nn.Module:
    """EvoNorm-S0 (Liu et al. 2020, table 2): x·σ(vx) / deviation of its group · γ + β, by timm.

    It brings its activation. Groups are chosen as in `group_norm`, with the same errors.
    """
    from timm.layers.evo_norm import EvoNorm2dS0

    groups = choose_groups(channels, num_groups, channels_per_group, at_most)
    layer: nn.Module = EvoNorm2dS0(channels, groups=groups, eps=eps)
    return layer


def evonorm_b0(channels: int, eps: float = 1e-3, momentum: float = 0.1) -> nn.Module:
    """EvoNorm-B0 (Liu et al. 2020, table 2), by timm.

    x / max(deviation of the channel over the batch, vx + deviation of the channel in the image)
    · γ + β. ``momentum`` is that of the running variance, which takes the batch's place in eval
    mode.
    """
    from timm.layers.evo_norm import EvoNorm2dB0

    layer: nn.Module = EvoNorm2dB0(channels, momentum=momentum, eps=eps)
    return layer


def filter_response_norm(channels: int, eps: float = 1e-6) -> nn.Module:
    """Filter response normalization with TLU (Singh & Krishnan 2020, equations 1 to 4), by timm.

    max(γ x / √(mean square of the channel in the image + ``eps``) + β, τ).
    """
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d

    layer: nn.Module = FilterResponseNormTlu2d(channels, eps=eps)
    return layer
