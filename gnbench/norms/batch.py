"""Norms that look across the images of a batch."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.norms.group import GroupNorm, choose_groups


def batch_group_norm(
    channels: int,
    images: int,
    channels_per_group: int | Literal["all"] = 1,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
) -> nn.Module:
    """Batch group normalization (Summers & Dinneen 2020, arXiv 1906.03548).

    Statistics are taken over ``images`` images and ``channels_per_group`` channels. One image is
    group normalization (with one channel IN, with all LN), which is what is returned then; one
    channel is Ghost BN (Hoffer et al. 2017, algorithm 1), or BN when a batch has ``images`` images.

    Raises:
        ValueError: if ``images`` is not at least 1 or ``channels_per_group`` does not divide
            ``channels``.
    """
    each = channels if channels_per_group == "all" else channels_per_group
    groups = choose_groups(channels, None, each)
    if images < 1:
        raise ValueError(f"images={images} must be at least 1")
    if images == 1:
        return GroupNorm(groups, channels, eps, affine)
    return BatchGroupNorm(groups, channels, images, eps, momentum, affine)


class BatchGroupNorm(nn.Module):
    """Torch's BatchNorm of every ``images`` images of a batch in turn, over groups of channels.

    The images of a batch are taken in their order; what the last, smaller chunk holds is normalized
    by its own statistics. Each chunk moves the running statistics once, a smaller one as much as a
    whole one, as batches do in BN: at the same momentum they remember as many images as those of BN
    at a batch size of ``images``. In eval mode they normalize every image.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        images: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.images = images
        self.num_groups, self.num_channels = num_groups, num_channels
        alone = num_groups == num_channels  # a channel a group: BN has γ and β itself
        self.bn = nn.BatchNorm2d(num_groups, eps, momentum, affine and alone)
        own = affine and not alone
        self.weight = nn.Parameter(torch.ones(num_channels)) if own else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if own else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each group of channels of each chunk of ``x`` (N,C,H,W)."""
        n, c, h, w = x.shape
        if self.num_groups < c:  # the channels of a group become rows of one channel
            x = x.reshape(n, self.num_groups, c // self.num_groups * h, w)
        chunks = torch.split(x, self.images) if self.training else (x,)
        normalized = [self.bn(chunk) for chunk in chunks]
        x = torch.cat(normalized) if len(normalized) > 1 else normalized[0]
        x = x.reshape(n, c, h, w)
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight.view(1, c, 1, 1) + self.bias.view(1, c, 1, 1)


class BatchRenorm(nn.BatchNorm2d):
    """Batch Renormalization (Ioffe 2017, algorithm 1).

    A training batch is normalized by its own mean and deviation, and then moved by r and d, which
    have no gradient, to where the running statistics would have put it. r stays within
    [1/limit, limit] and d within ± limit. Up to the fraction ``begin`` of the training the limits
    are 1 and 0, so that it is BN; then they grow linearly and are ``r_max`` and ``d_max`` from the
    fractions ``r_end`` and ``d_end`` on. A training says by ``forward_passes`` how many it has;
    None: the limits are the last ones from the start.

    The running deviation is the root of a moving average of variances, as in BN, where the paper
    averages deviations. As the running statistics enter the training, several processes, each with
    its own, would not train one network: gnbench refuses them.

    Raises:
        ValueError: if a limit is out of its range or the fractions are out of order.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        begin: float = 0.04,
        r_end: float = 0.31,
        d_end: float = 0.19,
    ) -> None:
        super().__init__(channels, eps, momentum, affine)
        if not (1 <= r_max < math.inf and 0 <= d_max < math.inf):
            raise ValueError(f"r_max={r_max} d_max={d_max}: must be at least 1 and 0")
        if not (0 <= begin < min(r_end, d_end) and max(r_end, d_end) <= 1):
            raise ValueError(
                f"begin={begin} r_end={r_end} d_end={d_end}: must be fractions of the training, "
                "begin before both others"
            )
        self.r_max, self.d_max = r_max, d_max
        self.begin, self.r_end, self.d_end = begin, r_end, d_end
        self.forward_passes: int | None = None

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the limits of r and of ± d for the next forward pass."""
        assert self.num_batches_tracked is not None
        done = self.num_batches_tracked / (self.forward_passes or 1)
        if self.forward_passes is None:
            done = torch.ones_like(done)
        r_share = ((done - self.begin) / (self.r_end - self.begin)).clamp(0, 1)
        d_share = ((done - self.begin) / (self.d_end - self.begin)).clamp(0, 1)
        return 1 + r_share * (self.r_max - 1), d_share * self.d_max

    def initial_share(self) -> float:
        """Return how much of the running statistics is as before the training when d is open."""
        if self.momentum is None or self.forward_passes is None:
            return 0.0
        return float((1 - self.momentum) ** (self.d_end * self.forward_passes))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each channel of ``input`` (N,C,H,W)."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            values = input.to(torch.promote_types(input.dtype, torch.float32))
            variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
            count = input.numel() // input.shape[1]
            if count == 1:
                raise ValueError(f"a single value per channel in training, input {input.shape}")
            deviation = torch.sqrt(self.running_var + self.eps)
            most_r, most_d = self.limits()
            r = torch.sqrt(variance + self.eps) / deviation
            r = torch.minimum(torch.maximum(r, 1 / most_r), most_r)
            d = (mean - self.running_mean) / deviation
            d = torch.minimum(torch.maximum(d, -most_d), most_d)
            _track(self, mean, variance * count / (count - 1))
        if self.affine:
            r, d = r * self.weight, d * self.weight + self.bias
        return F.batch_norm(input, None, None, r, d, training=True, eps=self.eps)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of what every process passes. The loss is the sum of theirs: so is the gradient."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return cast(Tensor, _SumOverProcesses.apply(gradient))


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the joint batch of all processes of a run (Peng et al. 2018, 3.3).

    The processes exchange count, mean and variance of their shares. Alone, and in eval mode, it is
    BatchNorm. Not torch's, which refuses the CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each channel of ``input`` (N,C,H,W)."""
        together = dist.is_available() and dist.is_initialized() and not input.is_meta
        if not together or not self.training:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        count = values.new_tensor([values.numel() / values.shape[1]])
        mean = values.mean(dim=(0, 2, 3))
        variance = values.var(dim=(0, 2, 3), correction=0)
        # Every process fills its row of a table; the sum of the tables has all rows.
        table = values.new_zeros(dist.get_world_size(), 1 + 2 * input.shape[1])
        table[dist.get_rank()] = torch.cat([count, mean, variance])
        counts, means, variances = _SumOverProcesses.apply(table).split(
            [1, *2 * [input.shape[1]]], dim=1
        )
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        variance = (counts * (variances + (means - mean).square())).sum(dim=0) / total
        if self.running_mean is not None and self.running_var is not None:
            _track(self, mean.detach(), (variance * total / (total - 1)).detach())
        scale = torch.rsqrt(variance + self.eps)
        normalized = (values - mean[:, None, None]) * scale[:, None, None]
        if self.affine:
            normalized = normalized * self.weight[:, None, None] + self.bias[:, None, None]
        output: Tensor = normalized.to(input.dtype)
        return output


def _track(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics of ``bn`` towards those of a batch, as BatchNorm does."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked += 1
    momentum: float | Tensor | None = bn.momentum
    if momentum is None:  # a cumulative average
        momentum = 1 / bn.num_batches_tracked
    bn.running_mean.lerp_(mean, momentum)
    bn.running_var.lerp_(variance, momentum)
