"""Normalization layers, each called with the number of channels it normalizes.

Those that torch already has with channels first (``BatchNorm2d``, ``InstanceNorm2d``,
``Identity``) are named in ``conf/norm`` directly. All take and return N,C,H,W tensors.
"""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_BATCH_MEAN = 50.0  # standard deviations
LARGEST_INSTANCE_MEAN = 3000.0  # likewise


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
    return GroupNorm(_groups(channels, num_groups, channels_per_group), channels, eps, affine)


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
    groups = _groups(channels, None, each)
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
        self.num_groups = num_groups
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
        over = (2, 3, 4)
        centered = grouped - grouped.mean(over, keepdim=True)
        centered = centered - centered.mean(over, keepdim=True)  # what a large mean was rounded by
        variance = centered.square().mean(over, keepdim=True)
        x = (centered / torch.sqrt(variance + self.eps)).reshape(n, c, h, w)
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
            self._track(mean.detach(), (variance * total / (total - 1)).detach())
        scale = torch.rsqrt(variance + self.eps)
        normalized = (values - mean[:, None, None]) * scale[:, None, None]
        if self.affine:
            normalized = normalized * self.weight[:, None, None] + self.bias[:, None, None]
        output: Tensor = normalized.to(input.dtype)
        return output

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch, as BatchNorm does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def imprecise_statistics(model: nn.Module, images: Tensor) -> str | None:
    """Name a norm of ``model`` whose mean is too large beside its deviation, with the ratio.

    On a CPU torch's batch norm adds up the values of a channel one by one and computes
    x·scale + shift, so that the error grows with the ratio and with the values: with 131,072 of a
    channel, channels last, it is 1e-3 at a ratio of 100 and 0.2 at 500. Its ratio is that of the
    running statistics. Instance norm is right to 1e-3 up to several thousand; its ratio is that of
    a few ``images`` (N,C,H,W), which change nothing.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            assert layer.running_var is not None
            ratio = (layer.running_mean.abs() / (layer.running_var + layer.eps).sqrt()).max().item()
            if ratio > LARGEST_BATCH_MEAN:
                return f"{name}: a mean of {ratio:.0f} standard deviations"
    ratios: dict[str, float] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.InstanceNorm2d):

            def look(
                module: nn.InstanceNorm2d, inputs: tuple[Tensor], _: object, name: str = name
            ) -> None:
                variance, mean = torch.var_mean(inputs[0].double(), (2, 3), correction=0)
                ratios[name] = (mean.abs() / (variance + module.eps).sqrt()).max().item()

            hooks.append(layer.register_forward_hook(look))
    if hooks:
        training = model.training
        with torch.inference_mode():
            model.eval()(images)
        model.train(training)
    for hook in hooks:
        hook.remove()
    for name, ratio in ratios.items():
        if ratio > LARGEST_INSTANCE_MEAN:
            return f"{name}: a mean of {ratio:.0f} standard deviations"
    return None


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
