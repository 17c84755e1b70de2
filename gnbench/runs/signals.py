"""Signals that end a run: heeded after the step at hand, so that nothing is cut in two."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from gnbench.errors import Interrupted

REQUEUE = getattr(signal, "SIGUSR2", None)  # Windows has none
# Seconds: a signal to a group reaches a worker and is passed on to it as well; Slurm repeats it.
ECHO = 2.0


@dataclass
class Stop:
    """A signal that arrived, and whether to wait for the end of the step."""

    number: int | None = None
    gentle: int = 0  # runs under way that heed it after the step, or the file, at hand
    since: float = 0.0


@contextmanager
def heeded() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into `Interrupted`: at once, or while ``gentle`` only noted.

    The same signal again, but not its echo, raises at once; one that is ignored stays so. SIGUSR2
    interrupts too where somebody listens to it, who is handed it at the end: submitit requeues the
    job then, also after a SIGTERM that says that it is being preempted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def handler(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = stop.number == number
        if again and now - stop.since < ECHO:
            return
        if stop.number != REQUEUE:  # which Slurm may send after SIGTERM, or before
            stop.number, stop.since = number, now
        if again or not stop.gentle:
            raise Interrupted(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    if REQUEUE is not None and callable(signal.getsignal(REQUEUE)):
        numbers.append(REQUEUE)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        if REQUEUE in before and stop.number in (REQUEUE, signal.SIGTERM):
            state, preempted = _job()
            if state in ("RUNNING", "") and (stop.number == REQUEUE or preempted):
                signal.raise_signal(REQUEUE)


def _job() -> tuple[str, bool]:
    """Ask Slurm for the state of this job, and whether it has its grace time before preemption.

    Slurm requeues a preempted job only if that stays until it is killed, so who heeds the signal
    has to be requeued here. A job that is being cancelled must not be: it would come back to life.
    It is COMPLETING, as is one that Slurm requeues itself. The state is empty if Slurm is silent.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # whose number is also that of one task
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["squeue", "--noheader", f"--jobs={job}", "--Format=State,Requeue,PreemptTime"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        answer = done.stdout.split()
        return "".join(answer[:1]), answer[1:2] == ["1"] and answer[2:] not in ([], ["N/A"])
    return "", False
