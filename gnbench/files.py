"""Whole files only: write beside, flush to the disk, rename. Nothing else here writes a file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gnbench.errors import LockedError, WriteError


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there.

    Raises:
        WriteError: if it cannot be made.
    """
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


def replace(path: Path, data: bytes | memoryview | Callable[[IO[bytes]], Any]) -> None:
    """Write a file that readers see whole or not at all: the old one or the new.

    ``data`` is the contents, or a function that writes them to an open binary file. Several
    processes may replace the same file at once: one of theirs stays.

    Raises:
        WriteError: with the old file as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with explained(path):
        try:
            with partial.open("wb") as file:
                write(file, data)
            partial.replace(path)
            _flush_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> None:
    """Append to a file and flush it to the disk; a crash may leave the last line cut short.

    Raises:
        WriteError: likewise.
    """
    with explained(path), path.open("ab") as file:
        write(file, data)


def write(file: IO[bytes], data: bytes | memoryview | Callable[[IO[bytes]], Any]) -> None:
    """Write to an open file and wait until the disk has it."""
    if callable(data):
        data(file)
    else:
        file.write(data)
    file.flush()
    os.fsync(file.fileno())


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in a folder."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says of ``path`` into a `WriteError`."""
    try:
        yield
    except (LockedError, WriteError):
        raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: "make room there; the same command resumes",
            errno.EDQUOT: "make room there; the same command resumes",
        }.get(error.errno or 0, "choose another folder with outputs=DIR, or mend this one")
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}; {remedy}"
        ) from error


def _flush_folder(folder: Path) -> None:
    """Have a rename survive a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
