"""One file for each dataset, checked by SHA-256 at every read, from the first source that works."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from gnbench import files
from gnbench.errors import DamagedError, DataError, WriteError

log = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]  # train_images, train_labels, test_images, test_labels
Source = Callable[[Path, Path], Arrays]  # of the data root, and of a working folder that vanishes

PIN = "sha256"  # an array of a file: the checksum of all its others, where none is known beforehand

TRY_AGAIN = 600.0  # seconds after which a dataset that was not to be had is looked for anew

_unavailable: dict[Path, tuple[float, str]] = {}  # since when, and the message, for the next runs


@dataclass(frozen=True)
class Known:
    """What is known of a dataset: the SHA-256 of its arrays, and where they are to be had.

    Without ``checksums`` the sources answer for what they return; the file is pinned by its own.
    """

    name: str
    checksums: Mapping[str, str] | None
    sources: Sequence[tuple[str, Source]]
    by_hand: str  # what a person can do who has none of them; {root} is put in


def load(known: Known, root: Path) -> Arrays:
    """Return the arrays of a dataset and keep them in ``root`` as ``<name>.npz``.

    Raises:
        DataError: if ``root`` cannot be used or no source has it.
    """
    return keep(known.name, root, lambda path: _fetch(known, path), known.checksums)


def keep(
    name: str,
    root: Path,
    make: Callable[[Path], Arrays],
    checksums: Mapping[str, str] | None = None,
    setting: str = "dataset.root",
) -> Arrays:
    """Return what ``<name>.npz`` in ``root`` holds, made and written there if it is not yet.

    Of the processes of a user one calls ``make``, with the path of the file; the others wait.
    ``setting`` is what names ``root``.

    Raises:
        DataError: if ``root`` cannot be used.
        Exception: what ``make`` raises, though an OSError only if it is a DataError.
    """
    folder = root.expanduser()
    path = folder / f"{name}.npz"
    user = os.geteuid() if os.name == "posix" else 0
    try:
        with contextlib.suppress(FileNotFoundError, DamagedError):
            return read(path, checksums)  # no lock: the folder may be read-only
        folder.mkdir(parents=True, exist_ok=True)
        # Of the runs of a user one fetches. A lock of another user might not be ours to open; both
        # may fetch, since whole files only are put in place.
        with FileLock(folder / f".{name}.{user}.lock"):
            try:
                return read(path, checksums)
            except FileNotFoundError:
                log.info("%s: not yet in %s", name, folder)
            except DamagedError as error:
                aside = path.replace(f"{path}.damaged")
                log.warning("%s: %s is damaged: %s; set aside as %s", name, path, error, aside.name)
            _sweep_up(folder, name, user)
            arrays = make(path)
            pinned = arrays if checksums is not None else {**arrays, PIN: _pin(arrays)}
            try:
                files.replace(path, lambda file: np.savez(file, allow_pickle=False, **pinned))
                log.info("%s: %scached as %s", name, "verified and " if checksums else "", path)
            except WriteError as error:
                log.warning("%s: not cached, to be fetched again: %s", name, error.__cause__)
            return arrays
    except DataError:
        raise
    except (OSError, NotImplementedError) as error:  # the latter where a disk has no locks
        raise DataError(
            f"{setting}={root} cannot be used: {error}; choose a folder that you can read and "
            f"write with {setting}=DIR or the environment variable GNBENCH_DATA"
        ) from error


def read(path: Path, checksums: Mapping[str, str] | None) -> Arrays:
    """Read and verify a file of `keep`; nothing in it is unpickled.

    Raises:
        OSError: if it cannot be opened.
        DamagedError: if it cannot be read or does not match ``checksums``, without them its own.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except MemoryError:  # says nothing of the file
            raise
        except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
            # One of them EINVAL: to look where a damaged file points to.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise DamagedError(f"{path.name} cannot be read ({error})") from error
    if checksums is not None:
        verify(arrays, checksums)
    elif not np.array_equal(arrays.pop(PIN, None), _pin(arrays)):
        raise DamagedError("it differs from what was written")
    return arrays


def verify(arrays: Mapping[str, npt.NDArray[Any]], checksums: Mapping[str, str]) -> None:
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


def _pin(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Return the SHA-256 (32 bytes) of names, types, shapes and bytes of all ``arrays``."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return np.frombuffer(found.digest(), np.uint8)


def _fetch(known: Known, path: Path) -> Arrays:
    """Return what the first source that works has; if none has just now, only the first is tried.

    So that not every run of a sweep waits for a network that does not answer.
    """
    name, failures = known.name, []
    if path in _unavailable and time.monotonic() - _unavailable[path][0] > TRY_AGAIN:
        del _unavailable[path]
    for label, source in known.sources[: 1 if path in _unavailable else None]:
        log.info("%s: trying %s", name, label)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as work:
            try:
                arrays = source(path.parent, Path(work))
                if known.checksums is not None:
                    verify(arrays, known.checksums)
                return arrays
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.info("%s: %s: %s", name, label, reason)
                failures.append(f"{label} ({reason})")
    by_hand = known.by_hand.format(root=path.parent)
    message = f"{name} is not to be had here. Tried: {'; '.join(failures)}. By hand: {by_hand}"
    raise DataError(_unavailable.setdefault(path, (time.monotonic(), message))[1])


def _sweep_up(folder: Path, name: str, user: int) -> None:
    """Remove what a process of ``user`` that was killed while fetching or writing left behind."""
    for path in [*folder.glob(f".{name}-*/"), *folder.glob(f".{name}.npz.*")]:
        with contextlib.suppress(OSError):
            if path.stat().st_uid == user:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
