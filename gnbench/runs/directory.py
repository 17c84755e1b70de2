"""The run directory: record, metrics, checkpoint, weights, lock."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import io
import json
import logging
import math
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gnbench import files, zipped
from gnbench.errors import DamagedError
from gnbench.files import explained
from gnbench.runs.lock import Heartbeat, hold
from gnbench.train.row import COLUMNS, LAST_EPOCHS, METRICS

log = logging.getLogger(__name__)

FINISHED = ("completed", "diverged")  # such a run is not trained again unless asked
STATUSES = (*FINISHED, "running", "interrupted", "failed", "out_of_memory")


class RunDirectory:
    """The directory of one run. Every file but the log is replaced whole or appended by the line.

    Only the process in `locked` may write. What cannot be written raises `WriteError` and leaves
    the file as it was, but for a row of ``metrics.csv`` cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record_path = self.path / "run.json"
        self.metrics_path = self.path / "metrics.csv"
        self.log_path = self.path / "gnbench.log"
        self.model_path = self.path / "model.pt"
        self.correct_path = self.path / "correct.npy"
        self.as_published_path = self.path / "as_published.csv"
        self.checkpoint_path = self.path / "checkpoint.pt"

    @contextmanager
    def locked(self, wait: bool = False) -> Iterator[Heartbeat]:
        """Hold the directory's lock and keep its heartbeat, making the directory if need be.

        Raises:
            LockedError: at once, if another process holds it and ``wait`` is false.
            WriteError: if the directory cannot be made or written.
        """
        with ExitStack() as stack:
            files.make_folder(self.path)
            with explained(self.path):
                heartbeat = stack.enter_context(hold(self.path, wait))
                files.remove_partial(self.path)
            yield heartbeat

    def record(self) -> dict[str, Any] | None:
        """Return the contents of ``run.json``, or None if there is none.

        Raises:
            DamagedError: if it is not a record.
        """
        try:
            return read_record(self.record_path)
        except FileNotFoundError:
            return None

    def is_finished(self) -> bool:
        """Tell whether the run has its result, as far as the record can be read."""
        try:
            record = self.record()
        except DamagedError:
            return False
        return record is not None and record["status"] in FINISHED

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace ``run.json`` atomically."""
        text = json.dumps(record, indent=2, allow_nan=True) + "\n"
        files.replace(self.record_path, text.encode())

    def rows(self) -> list[dict[str, float]]:
        """Return the whole rows of ``metrics.csv``; a row cut short by a crash does not count."""
        return list(read_metrics(self.metrics_path))

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.csv`` and flush it to the disk."""
        new = not self.metrics_path.exists() or self.metrics_path.stat().st_size == 0
        files.append(self.metrics_path, _csv([row], header=new).encode())

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
        files.replace(self.metrics_path, expected)

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
        for path in (
            self.checkpoint_path,
            self.record_path,
            self.metrics_path,
            self.as_published_path,
            self.correct_path,
            self.model_path,
        ):
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

        from gnbench.train.devices import is_out_of_memory

        state: Any

        try:
            state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (OSError, MemoryError):  # says nothing of the file
            raise
        except Exception as error:  # torch raises many kinds for a damaged file
            if is_out_of_memory(error):
                raise
            raise DamagedError(
                f"{self.checkpoint_path} is not a whole checkpoint ({type(error).__name__})"
            ) from error
        if not isinstance(state, dict):
            raise DamagedError(f"{self.checkpoint_path} is not a checkpoint")
        return state

    def save_correct(self, correct: npt.NDArray[np.bool_]) -> None:
        """Replace ``correct.npy`` atomically: a bit a test image, eight to a byte."""
        buffer = io.BytesIO()
        np.save(buffer, np.packbits(correct), allow_pickle=False)
        files.replace(self.correct_path, buffer.getbuffer())

    def save_as_published(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace ``as_published.csv`` atomically, with a row for each epoch so far."""
        files.replace(self.as_published_path, _csv(rows, header=True).encode() if rows else b"")

    def save_model(self, weights: Mapping[str, Any]) -> None:
        """Replace ``model.pt`` atomically, with tensors that any machine can load."""
        _save(self.model_path, {name: tensor.cpu() for name, tensor in weights.items()})

    def remove_checkpoint(self) -> None:
        """Remove the checkpoint of a run whose record says that it is complete."""
        with explained(self.checkpoint_path):
            self.checkpoint_path.unlink(missing_ok=True)


def result(rows: Sequence[Mapping[str, float]], diverged: bool) -> dict[str, float] | None:
    """Return what a run reports: the median test error of the last epochs, and the last one's.

    The validation error, if there is one, in the same way. A diverged run reports its last error:
    the epochs before it say nothing of where it ended.
    """
    found: dict[str, float] = {}
    for name in ("test_error", "val_error"):
        measured = [row.get(name, math.nan) for row in rows[-LAST_EPOCHS:]]
        errors = [error for error in measured if not math.isnan(error)]
        if errors:
            found[name] = errors[-1] if diverged else statistics.median(errors)
            found[f"{name}_final"] = errors[-1]
    return {**found, "epochs": len(rows)} if "test_error" in found else None


def balanced_error(correct: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]) -> float:
    """Return the mean of the error rates of the classes (those of ``labels``), in percent.

    Added up as fractions: of classes of one size it is the error itself, to the bit.
    """
    counts = np.bincount(labels)
    wrong = np.bincount(labels[~correct], minlength=len(counts))
    pairs = zip(wrong.tolist(), counts.tolist(), strict=True)
    rates = [Fraction(w, n) for w, n in pairs if n]
    return float(100 * sum(rates, Fraction()) / len(rates))


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a ``run.json``.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if it is not a record.
    """
    try:
        record = json.loads(zipped.read_bytes(Path(path)))
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is not JSON ({error})") from error
    if (
        not isinstance(record, dict)
        or record.get("status") not in STATUSES
        or not isinstance(record.get("config"), dict)
    ):
        raise DamagedError(f"{path} is not the record of a run")
    return record


def read_correct(path: str | Path, total: int) -> npt.NDArray[np.bool_]:
    """Read a ``correct.npy``: for each of ``total`` test images whether the run was right (bool).

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if it is not one of so many images.
    """
    try:
        packed = np.load(io.BytesIO(zipped.read_bytes(Path(path))), allow_pickle=False)
        if packed.dtype != np.uint8 or packed.shape != (-(-total // 8),):
            raise ValueError(f"it is {packed.dtype} {packed.shape}")
    except OSError:
        raise
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise DamagedError(f"{path} does not hold {total} bits ({error})") from error
    return np.unpackbits(packed, count=total).astype(bool)


def read_metrics(path: str | Path) -> Iterator[dict[str, float]]:
    """Yield the whole rows of a ``metrics.csv`` up to the first that is none, if there are any."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    header, *whole = csv.reader(text[: text.rfind("\n") + 1].splitlines() or [""])
    names = header if tuple(header) == COLUMNS else METRICS
    for values in whole:
        try:
            numbers = [float(value or "nan") for value in values]
            yield dict(zip(names, numbers, strict=True))
        except ValueError:
            return


def now() -> str:
    """Return the time as UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that a result depends on; of packages those that are installed."""
    found = {"gnbench": _gnbench_version()}
    for package in ("torch", "torchvision", "timm", "pillow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"python": platform.python_version()}


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

    buffer = io.BytesIO()  # what torch cannot write to a full disk, it reports in its own words
    torch.save(dict(state), buffer)
    files.replace(path, buffer.getbuffer())


def _csv(rows: Sequence[Mapping[str, Any]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
