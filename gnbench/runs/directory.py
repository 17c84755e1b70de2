"""The run directory: metrics, status, checkpoint, weights, lock."""

from __future__ import annotations

import csv
import errno
import functools
import importlib.metadata
import io
import json
import logging
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from gnbench.runs.lock import SIGN, LockedError, Presence, hold

log = logging.getLogger(__name__)

METRICS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
    "test_wrong",
    "test_total",
    "images_per_second",
    "seconds",
)
FINISHED = ("completed", "diverged")  # such a run is not trained again unless asked
STATUSES = (*FINISHED, "running", "interrupted", "failed", "out_of_memory")
REPORTED_EPOCHS = 5  # the reported error is the median of the last five (Wu & He 2018, 4.1)


class DamagedError(ValueError):
    """A file of a run that cannot be read, or is not what it should be."""


class WriteError(OSError):
    """A file that cannot be written; the message says which, why, and what to do."""


class Run:
    """The directory of one run. Every file but the log is replaced whole or appended by the line.

    Only the process in `locked` may write. What cannot be written raises `WriteError` and leaves
    the file as it was, but for a row of ``metrics.csv`` cut short.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.record_path = self.directory / "run.json"
        self.metrics_path = self.directory / "metrics.csv"
        self.log_path = self.directory / "gnbench.log"
        self.model_path = self.directory / "model.pt"
        self.checkpoint_path = self.directory / "checkpoint.pt"

    @contextmanager
    def locked(self, wait: bool = False) -> Iterator[Presence]:
        """Hold the directory's lock and give signs of life, making the directory if need be.

        Raises:
            LockedError: at once, if another process holds it and ``wait`` is false.
            WriteError: if the directory cannot be made or written.
        """
        with ExitStack() as stack:
            make_folder(self.directory)
            with explained(self.directory):
                presence = stack.enter_context(hold(self.directory, wait))
                for partial in self.directory.glob(".*.partial"):  # of a process that was killed
                    if partial.name != f"{SIGN}.partial":
                        partial.unlink()
            yield presence

    def record(self) -> dict[str, Any] | None:
        """Return the contents of ``run.json``, or None if there is none.

        Raises:
            DamagedError: if it is not a record.
        """
        try:
            return read_record(self.record_path)
        except FileNotFoundError:
            return None

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace ``run.json`` atomically."""
        text = json.dumps(record, indent=2, allow_nan=True) + "\n"
        replace(self.record_path, text.encode())

    def rows(self) -> list[dict[str, float]]:
        """Return the whole rows of ``metrics.csv``; a row cut short by a crash does not count."""
        return list(read_metrics(self.metrics_path))

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.csv`` and flush it to the disk."""
        new = not self.metrics_path.exists() or self.metrics_path.stat().st_size == 0
        with explained(self.metrics_path), self.metrics_path.open("ab") as file:
            _write(file, _csv([row], header=new).encode())

    def restore_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make ``metrics.csv`` hold exactly ``rows``, those of a checkpoint.

        Rows after them are trained again. A file that holds something else is set aside.
        """
        expected = _csv(rows, header=True).encode() if rows else b""
        found = self.metrics_path.read_bytes() if self.metrics_path.exists() else b""
        if found == expected:
            return
        if expected.startswith(found):
            log.warning("%s had lost rows; restored from the checkpoint", self.metrics_path)
        elif not found.startswith(expected):
            self.set_aside(self.metrics_path, f"{self.metrics_path} differs from its checkpoint")
        replace(self.metrics_path, expected)

    def set_aside(self, path: Path, reason: str) -> None:
        """Keep a file that cannot be used under another name, and say so."""
        number, aside = 1, path.with_name(f"{path.name}.set-aside")
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.set-aside-{number}")
        with explained(aside):
            path.replace(aside)
        log.warning("%s; set aside as %s", reason, aside.name)

    def clear(self) -> None:
        """Remove what an earlier training left, except the log."""
        # The record before what it vouches for: killed in between, the run is trained again.
        for path in (self.checkpoint_path, self.record_path, self.metrics_path, self.model_path):
            with explained(path):
                path.unlink(missing_ok=True)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace ``checkpoint.pt`` atomically."""
        _save(self.checkpoint_path, state)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state of ``checkpoint.pt`` on the CPU, or None if there is none.

        Raises:
            DamagedError: if it cannot be read.
        """
        import torch

        state: Any

        try:
            state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, MemoryError):  # says nothing of the file
            raise
        except Exception as error:  # torch raises many kinds for a damaged file
            raise DamagedError(
                f"{self.checkpoint_path} is not a whole checkpoint ({type(error).__name__})"
            ) from error
        if not isinstance(state, dict):
            raise DamagedError(f"{self.checkpoint_path} is not a checkpoint")
        return state

    def save_model(self, model_state: Mapping[str, Any]) -> None:
        """Replace ``model.pt`` atomically."""
        _save(self.model_path, model_state)

    def remove_checkpoint(self) -> None:
        """Remove the checkpoint of a run whose record says that it is complete."""
        with explained(self.checkpoint_path):
            self.checkpoint_path.unlink(missing_ok=True)


def result(rows: Sequence[Mapping[str, float]], diverged: bool) -> dict[str, float] | None:
    """Return what a run reports: the median test error of the last epochs, and the last one's.

    A diverged run reports its last error: the epochs before it say nothing of where it ended.
    """
    if not rows:
        return None
    errors = [row["test_error"] for row in rows]
    return {
        "test_error": errors[-1] if diverged else statistics.median(errors[-REPORTED_EPOCHS:]),
        "test_error_final": errors[-1],
        "epochs": len(rows),
    }


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a ``run.json``.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if it is not a record.
    """
    try:
        record = json.loads(Path(path).read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is not JSON ({error})") from error
    if (
        not isinstance(record, dict)
        or record.get("status") not in STATUSES
        or not isinstance(record.get("config"), dict)
    ):
        raise DamagedError(f"{path} is not the record of a run")
    return record


def read_metrics(path: str | Path) -> Iterator[dict[str, float]]:
    """Yield the whole rows of a ``metrics.csv`` up to the first that is none, if there are any."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    whole = text[: text.rfind("\n") + 1].splitlines()
    for values in csv.reader(whole[1:]):
        try:
            yield dict(zip(METRICS, map(float, values), strict=True))
        except ValueError:
            return


def now() -> str:
    """Return the time as UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "gnbench": _gnbench_version(),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }


def _gnbench_version() -> str:
    """Return the version, in a checkout with its commit: ``0.1.0+g1a2b3c4`` or ``….dirty``."""
    try:
        version = importlib.metadata.version("gnbench")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout without installing it
        version = "0"
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return version
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=.dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository it trusts
        return version
    return f"{version}+g{described.stdout.strip()}"


def _save(path: Path, state: Mapping[str, Any]) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    replace(path, buffer.getbuffer())


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there.

    Raises:
        WriteError: if it cannot be made.
    """
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write beside ``path``, flush to the disk and rename: readers see the old file or the new.

    Raises:
        WriteError: with the old file as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with explained(path):
        try:
            with partial.open("wb") as file:
                _write(file, data)
            partial.replace(path)
            _flush_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Have a rename survive a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def _csv(rows: Iterable[Mapping[str, Any]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
