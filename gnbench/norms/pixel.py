"""Norms of each pixel over its channels, and what needs no statistics at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization of each pixel over its channels, as in ConvNeXt (Liu et al. 2022, 2.6).

    Not over C,H,W as in Wu & He 2018: that is `group_norm` with one group.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each pixel of each image of ``input`` (N,C,H,W)."""
        output: Tensor = super().forward(input.movedim(1, -1)).movedim(-1, 1)
        return output.to(input.dtype)


class ChannelRMSNorm(nn.Module):
    """RMS normalization (Zhang & Sennrich 2019, section 4) of each pixel over its channels.

    Each pixel is divided by √(mean square + ``eps``): its mean stays. γ, but no β.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each pixel of each image of ``x`` (N,C,H,W)."""
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x.movedim(1, -1), weight.shape, weight, self.eps).movedim(-1, 1)


class DynamicTanh(nn.Module):
    """γ tanh(αx) + β (Zhu et al. 2025, section 4): in place of a norm, without any statistics.

    One α a layer, which starts at ``alpha``; γ and β are per channel.
    """

    def __init__(self, channels: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Squash every value of ``x`` (N,C,H,W)."""
        squashed = torch.tanh(self.alpha * x)
        return (squashed * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)
