"""Batch norms of a finished network by other statistics than their running ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.config import RunConfig
from gnbench.norms import BatchGroupNorm, BatchRenorm, SyncBatchNorm
from gnbench.train.batches import ResidentData, draw_epoch
from gnbench.train.engine import autocast, find_correct


@dataclass(frozen=True)
class Moments:
    """What a batch norm saw of the training set, per channel (float32).

    ``variance`` is the mean of the variances of the batches, each with n − 1 as the running one;
    ``population`` the variance of all their values together.
    """

    mean: Tensor
    variance: Tensor
    population: Tensor


class OfBatches(nn.Module):
    """A batch norm by the statistics of every ``images`` images, in any mode; it adds them up."""

    def __init__(self, bn: nn.BatchNorm2d, images: int) -> None:
        super().__init__()
        self.bn = bn
        self.images = images
        self.batches = 0
        self.means: Tensor | float = 0.0  # summed over the batches, in float64
        self.variances: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each chunk of ``x`` (N,C,H,W) by itself."""
        return torch.cat([self._normalized(chunk) for chunk in torch.split(x, self.images)])

    def _normalized(self, x: Tensor) -> Tensor:
        bn = self.bn
        mean = x.new_zeros(x.shape[1], dtype=torch.float32)  # also under autocast
        variance = torch.ones_like(mean)
        # With momentum 1 the "running" statistics are those of this batch.
        output = F.batch_norm(x, mean, variance, bn.weight, bn.bias, True, 1.0, bn.eps)
        count = x.numel() // x.shape[1]
        mean, variance = mean.double(), variance.double()
        self.batches += 1
        self.means = self.means + mean
        self.variances = self.variances + variance
        self.squares = self.squares + mean.square() + variance * ((count - 1) / count)
        return output

    def moments(self) -> Moments:
        """Return the averages over all batches so far."""
        mean, variance, square = (
            torch.as_tensor(total) / self.batches
            for total in (self.means, self.variances, self.squares)
        )
        population = square - mean.square()
        return Moments(mean.float(), variance.float(), population.float())


class EvalNorm(nn.Module):
    """A batch norm that weighs an image at inference as it was in training: as one of ``images``.

    Singh & Shrivastava 2019; Summers & Dinneen 2020, on the weight of the example at inference.
    With α = 1/images, and m and v of the image itself, mean (1−α)μ + αm and variance
    (1−α)σ² + αv + α(1−α)(m−μ)².
    """

    def __init__(self, bn: nn.BatchNorm2d, moments: Moments, images: int) -> None:
        super().__init__()
        self.bn = bn
        self.share = 1 / images
        self.mean = moments.mean[:, None, None]
        self.variance = moments.population[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each image of ``x`` (N,C,H,W)."""
        a, bn = self.share, self.bn
        v, m = torch.var_mean(x.float(), (2, 3), correction=0, keepdim=True)
        mean = (1 - a) * self.mean + a * m
        variance = (1 - a) * self.variance + a * v + a * (1 - a) * (m - self.mean).square()
        normalized = (x - mean) * torch.rsqrt(variance + bn.eps)
        if bn.affine:
            normalized = normalized * bn.weight[:, None, None] + bn.bias[:, None, None]
        return normalized.to(x.dtype)


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Return the batch norms of ``model`` that have running statistics, by their names.

    Batch Renorm is none of them: it does not train by the statistics of a batch alone.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
        and layer.running_mean is not None
        and not isinstance(layer, BatchRenorm)
    }


def replaced(model: nn.Module, make: Callable[[str, nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """Return a copy of ``model`` in eval mode with other layers in place of its batch norms."""
    model = copy.deepcopy(model).eval()
    for name, layer in batch_norms(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, layer))
    return model.eval()


@torch.inference_mode()
def training_moments(
    model: nn.Module, data: ResidentData, config: RunConfig, images: int
) -> dict[str, Moments]:
    """Run an epoch's images through ``model`` by the statistics of batches; return what each saw.

    Their order and augmentation are those of an epoch by the number ``epochs``. A last, smaller
    batch is left out. (fvcore's precise BN averages in the same way.)
    """
    settings = config.dataset
    plan = draw_epoch(
        config.seed,
        config.epochs,
        len(data),
        settings.augmentation,
        settings.order,
        settings.block,
        data.labels,
    )
    plan = plan.to(data.labels.device)
    network = replaced(model, lambda _, bn: OfBatches(bn, images))
    whole = len(data) // images * images
    step = _chunk(images, data)
    for start in range(0, whole, step):
        inputs, _ = data.batch(plan, slice(start, min(start + step, whole)))
        with autocast(config.precision, inputs.device):
            network(inputs)
    layers = {name: network.get_submodule(name) for name in batch_norms(model)}
    return {name: layer.moments() for name, layer in layers.items() if isinstance(layer, OfBatches)}


def with_moments(
    model: nn.Module, moments: Mapping[str, Moments], population: bool = False
) -> nn.Module:
    """Return a copy of ``model`` whose running statistics are ``moments``."""
    model = copy.deepcopy(model).eval()
    for name, layer in batch_norms(model).items():
        own = moments[name]
        layer.running_mean = own.mean
        layer.running_var = own.population if population else own.variance
    return model


def evaluated(
    config: RunConfig,
    model: nn.Module,
    train: ResidentData,
    test: ResidentData,
    wanted: Mapping[int | None, list[str]],
) -> Iterator[tuple[str, int | None, int]]:
    """Yield statistics, images and the number of wrong test images for all that is ``wanted``.

    ``wanted`` names statistics by the number of images over which they are taken, None for ema.
    Batches of test images are drawn from all of them, in an order that follows from the seed.
    """

    def wrong(network: nn.Module, chunk: int | None = None, shuffled: bool = False) -> int:
        data = test
        if shuffled:
            order = draw_epoch(config.seed, 0, len(test), "none").order
            data = test.reordered(order.to(test.labels.device))
        return int((~find_correct(network, data, config.precision, chunk)).sum())

    for images, statistics in wanted.items():
        if images is None:
            yield "ema", None, wrong(model)
            continue
        if set(statistics) & {"precise", "population", "evalnorm"}:
            moments = training_moments(model, train, config, images)
        networks: dict[str, Callable[[], nn.Module]] = {
            "precise": lambda: with_moments(model, moments),  # noqa: B023  (called at once)
            "population": lambda: with_moments(model, moments, population=True),  # noqa: B023
            "batch": lambda: replaced(model, lambda _, bn: OfBatches(bn, images)),  # noqa: B023
            "evalnorm": lambda: replaced(
                model,
                lambda name, bn: EvalNorm(bn, moments[name], images),  # noqa: B023
            ),
        }
        for name in statistics:
            batch = name == "batch"
            chunk = _chunk(images, test) if batch else None
            yield name, images, wrong(networks[name](), chunk, batch)


def trained_images(run: RunConfig, model: nn.Module) -> int:
    """Return over how many images the batch norms of ``model`` took their statistics."""
    for layer in model.modules():
        if isinstance(layer, BatchGroupNorm):
            return layer.images
        if isinstance(layer, SyncBatchNorm):
            return run.batch_size * run.processes
    return run.batch_size


def _chunk(images: int, data: ResidentData) -> int:
    """Return the size of a forward pass: whole batches, about as many images as an evaluation."""
    return images * max(1, data.evaluation_chunk // images)
