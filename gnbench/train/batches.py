"""The images of every step: an epoch's order and augmentation, drawn from (seed, epoch) alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

EVALUATION_CHUNK = 500  # images a forward pass of an evaluation, at the most
EVALUATION_PIXELS = 500 * 64 * 64  # likewise; 40 images of 224×224
PAD = 4  # pixels on every side that pad_crop_flip may shift by (He et al. 2016, 4.2)


@dataclass(frozen=True)
class EpochPlan:
    """Which image stands at each position of an epoch, and how it is changed.

    ``order`` (int64, N) indexes the training images; ``flip`` (bool, N) mirrors them left to
    right; ``shift`` (int64, N×2) moves them by rows and columns in [-PAD, PAD]. None: not at all.
    """

    order: Tensor
    flip: Tensor | None
    shift: Tensor | None

    def to(self, device: torch.device) -> EpochPlan:
        """Move the plan to ``device``."""
        flip, shift = (None if t is None else t.to(device) for t in (self.flip, self.shift))
        return EpochPlan(self.order.to(device), flip, shift)

    def copy_(self, other: EpochPlan) -> None:
        """Take the values of another plan of the same kind, in place."""
        for own, new in zip(vars(self).values(), vars(other).values(), strict=True):
            if own is not None:
                own.copy_(new)


def draw_epoch(
    seed: int,
    epoch: int,
    size: int,
    augmentation: str,
    order: str = "shuffled",
    block: int | None = None,
    labels: Tensor | None = None,
) -> EpochPlan:
    """Draw the plan of an epoch of ``size`` images on the CPU.

    It depends on the arguments alone: it is the same on every device and engine, and after a
    resume. The order does not depend on the augmentation. Orders by class need the images'
    ``labels`` (int64, N), ``class_blocks`` also the ``block``; see `_by_class`.
    """
    rng = np.random.default_rng([seed, epoch])
    drawn = rng.permutation(size)
    if order != "shuffled":
        assert labels is not None
        drawn = _by_class(drawn, labels.cpu().numpy(), block, rng)
    flip = shift = None
    if augmentation in ("flip", "pad_crop_flip"):
        flip = torch.from_numpy(rng.random(size) < 0.5)
    if augmentation == "pad_crop_flip":
        shift = torch.from_numpy(rng.integers(-PAD, PAD + 1, size=(size, 2)))
    return EpochPlan(torch.from_numpy(drawn), flip, shift)


def evaluation_chunk(height: int, width: int) -> int:
    """Return how many images a forward pass of an evaluation takes, of the size of these.

    It follows from the dataset alone, so that a test error is reproducible.
    """
    return max(1, min(EVALUATION_CHUNK, EVALUATION_PIXELS // (height * width)))


class ResidentData:
    """Images and labels that live on the device as uint8 and int64.

    ``images`` is N,H,W,C; ``mean`` and ``std`` are per channel in [0, 1]. Inputs of a network lie
    in memory as the images do, or in N,C,H,W order if not ``channels_last``.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        channels_last: bool = True,
    ) -> None:
        self.channels_last = channels_last
        self.images = images.to(device)
        self.labels = labels.to(device)
        self._mean = 255 * torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = 255 * torch.tensor(std, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def evaluation_chunk(self) -> int:
        """How many of its images a forward pass of an evaluation takes."""
        return evaluation_chunk(*self.images.shape[1:3])

    def batch(self, plan: EpochPlan, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (float32, n,C,H,W) and labels (n) of the positions ``where`` (n)."""
        index = plan.order[where]
        images = self.images[index]
        if plan.shift is not None:
            images = _shift(images, plan.shift[where])
        if plan.flip is not None:
            images = torch.where(plan.flip[where][:, None, None, None], images.flip(2), images)
        return self._normalize(images), self.labels[index]

    def reordered(self, order: Tensor) -> ResidentData:
        """Return the same data with its images in another order (int64, N)."""
        other = copy.copy(self)
        other.images, other.labels = self.images[order], self.labels[order]
        return other

    def chunk(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the images ``start`` to ``stop`` as they are stored."""
        return self._normalize(self.images[start:stop]), self.labels[start:stop]

    def _normalize(self, images: Tensor) -> Tensor:
        """Map uint8 N,H,W,C to normalized float32 N,C,H,W."""
        if self.channels_last:
            return images.to(torch.float32).sub_(self._mean).div_(self._std).permute(0, 3, 1, 2)
        rows = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return rows.sub_(self._mean[:, None, None]).div_(self._std[:, None, None])


def _by_class(
    order: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    block: int | None,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Put the images of a class together, within it in the given ``order`` (int64, N).

    Without ``block`` one class follows the other. With it each class is cut into blocks of so many
    images, which then come in an order of their own. What is left of the classes, a shorter block
    of each, comes last, so that it does not put the blocks before it out of step with the batches.
    """
    classes = [order[labels[order] == label] for label in np.unique(labels)]
    if block is None:
        return np.concatenate(classes)
    blocks = [part for one in classes for part in np.split(one, range(block, len(one), block))]
    drawn = [blocks[number] for number in rng.permutation(len(blocks))]
    return np.concatenate(sorted(drawn, key=lambda part: len(part) < block))


def _shift(images: Tensor, shift: Tensor) -> Tensor:
    """Move each image (N,H,W,C) by its (rows, columns); what moves in is black."""
    n, height, width, _ = images.shape
    padded = torch.nn.functional.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    rows = torch.arange(height, device=images.device) + PAD + shift[:, :1]
    columns = torch.arange(width, device=images.device) + PAD + shift[:, 1:]
    image = torch.arange(n, device=images.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]
