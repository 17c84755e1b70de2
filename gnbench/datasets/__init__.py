"""A dataset by name: its function is called, what it returns is checked, and shared by the runs."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_method
from torch import Tensor

from gnbench.config import DatasetConfig
from gnbench.datasets import cache, sources
from gnbench.errors import ConfigError, DataError, one_line

log = logging.getLogger(__name__)

VALIDATION = ("validation_images", "validation_labels")


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 tensors (N,H,W,C) and labels as int64 tensors (N), in the official order.

    ``mean`` and ``std``, per channel in [0, 1], are there where `load` measures them; ``facts`` is
    what ``run.json`` is to say of the data.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    validation_images: Tensor | None = None
    validation_labels: Tensor | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Dataset:
        """Return it on ``device``."""
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


def load(settings: DatasetConfig) -> Dataset:
    """Call the function that ``settings`` name and hold what it returns against them.

    Types are converted where nothing is lost: numpy arrays, integers of any width. Shapes are not
    guessed. The runs of a process share what a function returned for a root. One with a parameter
    ``train_size`` is given all the settings that it names, takes the subset and holds out the
    validation by itself.

    Raises:
        DataError: if no source has the dataset.
        ConfigError: if the function fails, or returns something else than the settings say.
    """
    try:
        function = get_method(settings.target)
        wanted = inspect.signature(function).parameters
        if "train_size" in wanted:
            given = {key: getattr(settings, key) for key in wanted if hasattr(settings, key)}
            found = _shared(function, json.dumps(given))
            dataset = _converted(found)
            _check(dataset, settings, settings.images)
            if settings.validation_size is not None:
                held = {key: getattr(found, key) for key in VALIDATION}
                held = {key: _tensor(key, value) for key, value in held.items()}
                dataset = replace(dataset, **held)
        else:
            dataset = _returned(function, settings.root)
            _check(dataset, settings, settings.train_images)
            if settings.validation_size is not None:
                dataset = hold_out(dataset, settings.validation_size)
            if settings.train_size is not None:
                dataset = balanced_subset(dataset, settings.train_size)
        if settings.mean is None or settings.std is None:
            dataset = _measured(dataset, settings)
    except DataError:
        raise
    except ConfigError as error:
        raise ConfigError(f"dataset._target_={settings.target}: {error}") from error
    except Exception as error:  # whatever a user's function may raise
        raise ConfigError(
            f"dataset._target_={settings.target}: {type(error).__name__}: {one_line(error)} "
            "(HYDRA_FULL_ERROR=1 shows where)"
        ) from error
    return dataset


def cifar10(root: str | Path) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009), cached under ``root``.

    Raises:
        DataError: if no source has it.
    """
    return _dataset(cache.load(sources.CIFAR10, Path(root)))


def cifar100(root: str | Path) -> Dataset:
    """Return CIFAR-100 (Krizhevsky 2009) with its 100 fine classes, cached under ``root``.

    Raises:
        DataError: if no source has it.
    """
    return _dataset(cache.load(sources.CIFAR100, Path(root)))


def svhn(root: str | Path) -> Dataset:
    """Return SVHN (Netzer et al. 2011), its cropped digits without "extra", cached under ``root``.

    Raises:
        DataError: if no source has it.
    """
    return _dataset(cache.load(sources.SVHN, Path(root)))


def fashion_mnist(root: str | Path) -> Dataset:
    """Return FashionMNIST (Xiao et al. 2017), cached under ``root``.

    Raises:
        DataError: if no source has it.
    """
    return _dataset(cache.load(sources.FASHION_MNIST, Path(root)))


def fashion_mini(root: str | Path | None = None) -> Dataset:
    """Return the FashionMNIST subset inside the package: the first 200 + 100 images of each class.

    ``root`` is not used.
    """
    return _dataset(cache.read(sources.FASHION_MINI, sources.FASHION_MINI_CHECKSUMS))


def balanced_subset(dataset: Dataset, train_size: int) -> Dataset:
    """Keep the first ``train_size`` training images, the classes in equal parts, in their order.

    Where ``train_size`` is no multiple of the number of classes, the first classes get one more.
    The test images stay.

    Raises:
        ConfigError: if a class has too few images.
    """
    order = _of_each_class(dataset.train_labels, "train_size", train_size)
    return replace(
        dataset,
        train_images=dataset.train_images[order],
        train_labels=dataset.train_labels[order],
    )


def hold_out(dataset: Dataset, validation_size: int) -> Dataset:
    """Take the last ``validation_size`` training images, in equal parts, for validation.

    Where that is no multiple of the number of classes, the first classes give one more. All stay in
    their order.

    Raises:
        ConfigError: if a class has too few images.
    """
    images, labels = dataset.train_images, dataset.train_labels
    backwards = _of_each_class(labels.flip(0), "validation_size", validation_size)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[len(labels) - 1 - backwards] = True
    return replace(
        dataset,
        train_images=images[~held],
        train_labels=labels[~held],
        validation_images=images[held],
        validation_labels=labels[held],
    )


def _of_each_class(labels: Tensor, setting: str, size: int) -> Tensor:
    """Return the first ``size`` positions, the classes in equal parts, sorted (int64)."""
    classes = int(labels.max()) + 1
    kept = []
    for label in range(classes):
        wanted = size // classes + (label < size % classes)
        positions = torch.nonzero(labels == label).flatten()
        if len(positions) < wanted:
            raise ConfigError(
                f"dataset.{setting}={size} takes {wanted} images of each class, but class "
                f"{label} has {len(positions)}: choose a smaller one"
            )
        kept.append(positions[:wanted])
    return torch.cat(kept).sort().values


def measured(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of uint8 ``images`` (N,H,W,C) per channel, in [0, 1].

    From the number of pixels at each of the 256 levels: exact but for the last rounding.
    """
    levels, channels = torch.arange(256), range(images.shape[-1])
    pixels = torch.zeros(len(channels), 256, dtype=torch.int64)
    for few in torch.split(images, 1024):
        counts = [
            torch.bincount(few[..., channel].flatten(), minlength=256) for channel in channels
        ]
        pixels += torch.stack(counts)
    count = int(pixels[0].sum())
    total, squares = ((pixels * levels**power).sum(dim=1).tolist() for power in (1, 2))
    mean = [t / count / 255 for t in total]
    pairs = zip(total, squares, strict=True)
    return mean, [math.sqrt(count * s - t * t) / count / 255 for t, s in pairs]


def normalization(dataset: Dataset, settings: DatasetConfig) -> tuple[list[float], list[float]]:
    """Return mean and std per channel in [0, 1]: of the settings, else as `load` measured them."""
    mean, std = settings.mean or dataset.mean, settings.std or dataset.std
    if mean is None or std is None:
        raise ConfigError("dataset.mean, dataset.std: give both, or load the dataset with `load`")
    return [*mean], [*std]


def _measured(dataset: Dataset, settings: DatasetConfig) -> Dataset:
    """Add mean and std of the training images that are left, where the settings have none."""
    mean, std = measured(dataset.train_images)
    mean, std = settings.mean or mean, settings.std or std
    if not all(std):
        raise ConfigError(
            f"the training images have a standard deviation of {std} per channel: give a "
            "dataset.std without zeros"
        )
    facts = {**dataset.facts, "mean": mean, "std": std}
    return replace(dataset, mean=mean, std=std, facts=facts)


@functools.lru_cache(maxsize=4)
def _returned(function: Callable[[str | None], Any], root: str | None) -> Dataset:
    return _converted(function(root))


@functools.lru_cache(maxsize=1)  # they can be as large as the memory
def _shared(function: Callable[..., Any], given: str) -> Any:
    return function(**json.loads(given))


def _converted(found: Any) -> Dataset:
    if not isinstance(found, Dataset):
        raise ConfigError(
            f"it returns a {type(found).__name__}, not a gnbench.datasets.Dataset: return "
            "Dataset(train_images, train_labels, test_images, test_labels)"
        )
    return replace(_dataset(vars(found)), facts=found.facts)


def _dataset(arrays: Mapping[str, Any]) -> Dataset:
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return Dataset(**{name: _tensor(name, arrays[name]) for name in names})  # type: ignore[arg-type]


def _tensor(name: str, value: Any) -> Tensor:
    """Return images as uint8 and labels as int64, contiguous and on the CPU."""
    if not isinstance(value, Tensor | np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise ConfigError(f"{name} is a {type(value).__name__}: give a torch tensor")
    kind = value.dtype.name if isinstance(value, np.ndarray) else str(value.dtype)[len("torch.") :]
    images = name.endswith("images")
    wanted = "uint8 from 0 to 255" if images else "int64, a class number for each image"
    if not re.fullmatch(r"u?int(8|16|32|64)", kind):
        raise ConfigError(f"{name} are {kind}: give {wanted}")
    array = value if isinstance(value, np.ndarray) else value.cpu().numpy()
    if images and kind != "uint8" and array.size and (array.min() < 0 or array.max() > 255):
        raise ConfigError(f"{name} go from {array.min()} to {array.max()}: give {wanted}")
    dtype = np.uint8 if images else np.int64
    # A copy only where it is needed: of another type, not contiguous, or read-only (a mapped file).
    return torch.from_numpy(np.require(array, dtype, requirements=["C", "W", "E"]))


def _check(dataset: Dataset, settings: DatasetConfig, train_images: int) -> None:
    """Refuse what is not as ``settings`` say; warn of what is odd."""
    channels, height, width = settings.image
    for split, count in (("train", train_images), ("test", settings.test_images)):
        images: Tensor = getattr(dataset, f"{split}_images")
        labels: Tensor = getattr(dataset, f"{split}_labels")
        found, wanted = tuple(images.shape), (count, height, width, channels)
        if found != wanted:
            raise ConfigError(
                f"{split}_images have the shape {found}, but dataset.image={settings.image} and "
                f"dataset.{split}_images={count} want {wanted} (N,H,W,C): change one of them"
            )
        if labels.shape != (count,):
            raise ConfigError(
                f"{split}_labels have the shape {tuple(labels.shape)}: give {(count,)}, a class "
                "number for each image"
            )
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= settings.classes:
            raise ConfigError(
                f"{split}_labels go from {least} to {most}, but dataset.classes="
                f"{settings.classes} wants 0 to {settings.classes - 1}: change one of them"
            )
        if int(images.max()) <= 1:
            log.warning("dataset=%s: %s_images go up to 1, not 255", settings.name, split)
    train, test = ({*labels.tolist()} for labels in (dataset.train_labels, dataset.test_labels))
    absent = sorted({*range(settings.classes)} - train)
    if absent and max(train | test) < settings.classes - 1:
        raise ConfigError(
            f"the labels go up to {max(train | test)} only, but dataset.classes="
            f"{settings.classes}: change one of them"
        )
    if absent:
        log.warning("dataset=%s: no training image is of class %s", settings.name, absent)
