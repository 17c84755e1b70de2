"""Where runs stand, told by their files alone, and the exit code that follows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from gnbench.errors import AT_WORK, DONE, FAILED, DamagedError
from gnbench.runs.directory import FINISHED, STATUSES, RunDirectory
from gnbench.runs.lock import read_heartbeat

# What `run_state` says beside the statuses of a record.
MISSING, STALE, DAMAGED = "missing", "stale", "damaged"
STATES = (*STATUSES, MISSING, STALE, DAMAGED)


@dataclass(frozen=True)
class RunState:
    """Where a run stands: ``state`` is a status, ``missing``, ``stale`` or ``damaged``.

    ``stale`` is a run whose process died without a word. ``test_error`` in percent.
    """

    run_dir: Path
    state: str
    test_error: float | None = None
    message: str = ""

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return self.state in FINISHED

    @property
    def running(self) -> bool:
        """Whether a process is at work on it."""
        return self.state == "running"

    @property
    def needs_attention(self) -> bool:
        """Whether somebody should look: it was begun, has no result, and nobody is at work."""
        return not (self.finished or self.running or self.state == MISSING)


def run_state(run_dir: Path) -> RunState:
    """Tell where a run stands, from any machine that sees its files."""
    heartbeat = read_heartbeat(run_dir)
    alive = heartbeat is not None and heartbeat.is_fresh()
    try:
        record = RunDirectory(run_dir).record()
    except (DamagedError, OSError) as error:
        return RunState(run_dir, "running" if alive else DAMAGED, message=str(error))
    status = record["status"] if record else None
    result = record.get("result") if record else None
    reported = result.get("test_error") if isinstance(result, dict) else None
    test_error = float(reported) if isinstance(reported, int | float) else None
    if status in FINISHED:
        return RunState(run_dir, status, test_error)  # though somebody may be looking at it
    if heartbeat is not None and alive:
        step, total = heartbeat.step, heartbeat.total_steps
        progress = f"step {step:,} of {total:,} ({step / total:.0%})" if total else "starting"
        age = max(0.0, time.time() - heartbeat.beat)
        message = f"{progress}, {heartbeat}, last heartbeat {age:.0f} s ago"
        return RunState(run_dir, "running", test_error, message)
    if status is None and heartbeat is None:
        return RunState(run_dir, MISSING)
    if record is None or status == "running":
        message = f"{heartbeat or 'its process'} died; the same command resumes it"
        return RunState(run_dir, STALE, test_error, message)
    message = str(record.get("error") or "").partition("\n")[0]
    return RunState(run_dir, record["status"], test_error, message)


def table(states: Iterable[RunState]) -> str:
    """Put runs into words, a line each and one below for what there is to say."""
    rows = [
        (
            run.state,
            "–" if run.test_error is None else f"{run.test_error:.2f} %",
            f"{run.run_dir}\n{run.message}" if run.message else str(run.run_dir),
        )
        for run in states
    ]
    headers = ("status", "test error", "run directory")
    aligned = ("left", "right", "left") if rows else None
    return tabulate(rows, headers, "plain", colalign=aligned, disable_numparse=True)


def exit_code(states: Sequence[RunState]) -> int:
    """Return 0 if every run has its result, 3 while some process is at work on one, else 1."""
    if any(run.running for run in states):
        return AT_WORK
    return DONE if all(run.finished for run in states) else FAILED
