"""The run directory: metrics, status, checkpoint, weights, lock."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
STATUSES = (*FINISHED, "running", "out_of_memory", "interrupted", "failed")
REPORTED_EPOCHS = 5  # the reported error is the median of the last five (Wu & He 2018, 4.1)


class LockedError(OSError):
    """Another process is at work on this run."""


class DamagedError(ValueError):
    """A file of a run that cannot be read."""


class Run:
    """The directory of one run. Every file but the log is replaced whole or appended by the line.

    Only the process in `locked` may write.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.record_path = self.directory / "run.json"
        self.metrics_path = self.directory / "metrics.csv"
        self.log_path = self.directory / "gnbench.log"
        self.model_path = self.directory / "model.pt"
        self.checkpoint_path = self.directory / "checkpoint.pt"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory's lock, making the directory if need be.

        Raises:
            LockedError: at once, if another process holds it.
        """
        from filelock import FileLock, Timeout

        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.directory / ".lock", timeout=0):
                yield
        except Timeout:
            raise LockedError(
                f"{self.directory} is being trained by another process; wait for it to end"
            ) from None

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
        _replace(self.record_path, text.encode())

    def rows(self) -> list[dict[str, float]]:
        """Return the whole rows of ``metrics.csv``; a row cut short by a crash does not count."""
        return list(read_metrics(self.metrics_path))

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.csv``."""
        new = not self.metrics_path.exists() or self.metrics_path.stat().st_size == 0
        with self.metrics_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, METRICS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def keep_epochs(self, epochs: int) -> None:
        """Cut ``metrics.csv`` down to the first ``epochs`` epochs, atomically."""
        if epochs == 0:
            self.metrics_path.unlink(missing_ok=True)
            return
        text = self.metrics_path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        _replace(self.metrics_path, "".join(lines[: epochs + 1]).encode())

    def clear(self) -> None:
        """Remove what an earlier training left, except the log."""
        for path in (self.checkpoint_path, self.model_path, self.metrics_path, self.record_path):
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

        try:
            state: dict[str, Any] = torch.load(
                self.checkpoint_path, map_location="cpu", weights_only=True
            )
            return state
        except FileNotFoundError:
            return None
        except Exception as error:  # torch raises many kinds for a damaged file
            raise DamagedError(
                f"{self.checkpoint_path} is not a whole checkpoint ({type(error).__name__})"
            ) from error

    def save_model(self, model_state: Mapping[str, Any]) -> None:
        """Replace ``model.pt`` atomically."""
        _save(self.model_path, model_state)

    def remove_checkpoint(self) -> None:
        """Remove the checkpoint of a run whose record says that it is complete."""
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
    """Yield the whole rows of a ``metrics.csv``; none if there is no file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    whole = text[: text.rfind("\n") + 1].splitlines()
    for values in csv.reader(whole[1:]):
        if len(values) == len(METRICS):
            row = dict(zip(METRICS, map(float, values), strict=True))
            yield row


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
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return version
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=.dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository it trusts
        return version
    return f"{version}+g{described.stdout.strip()}"


def _save(path: Path, state: Mapping[str, Any]) -> None:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    _replace(path, buffer.getbuffer())


def _replace(path: Path, data: bytes | memoryview) -> None:
    """Write beside ``path``, flush to the disk and rename: readers see the old file or the new."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
