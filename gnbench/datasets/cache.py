"""One verified file a dataset: written atomically, checked by SHA-256 at every read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.uint8]]  # train_images, train_labels, test_images, test_labels


class DamagedError(ValueError):
    """Arrays that are not what their checksums say they are."""


def verify(arrays: Mapping[str, npt.NDArray[np.uint8]], checksums: Mapping[str, str]) -> None:
    """Check the bytes of every array (images in N,H,W,C order) against its SHA-256.

    Raises:
        DamagedError: for an array that is absent, of another type, or differs.
    """
    for name, expected in checksums.items():
        if name not in arrays:
            raise DamagedError(f"{name} is missing")
        array = np.ascontiguousarray(arrays[name])
        if array.dtype != np.uint8:
            raise DamagedError(f"{name} holds {array.dtype}, not uint8")
        found = hashlib.sha256(array.data).hexdigest()
        if found != expected:
            raise DamagedError(f"{name} has SHA-256 {found[:12]}…, not {expected[:12]}…")


def read(path: Path, checksums: Mapping[str, str]) -> Arrays:
    """Read and verify a file of `write`; nothing in it is unpickled.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if it cannot be read or does not match ``checksums``.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise DamagedError(f"{path.name} cannot be read ({error})") from error
    verify(arrays, checksums)
    return arrays


def write(path: Path, arrays: Arrays) -> None:
    """Write ``arrays`` beside ``path`` and rename: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
