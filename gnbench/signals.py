"""Signals that end a run: heeded after the step at hand, so that nothing is cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

REQUEUE = getattr(signal, "SIGUSR2", None)  # Windows has none


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, which can be resumed. ``exit_code`` is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        """Let a worker hand it to the command that launched it."""
        return type(self), (self.exit_code - 128,)


@dataclass
class Stop:
    """A signal that arrived, and whether to wait for the end of the step."""

    number: int | None = None
    gentle: bool = False


@contextmanager
def heeded() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into `Interrupted`: at once, or while ``gentle`` only noted.

    The same signal again raises at once; one that is ignored stays so. SIGUSR2 interrupts too where
    somebody listens to it, who is handed it at the end: submitit requeues the job then.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def handler(number: int, frame: FrameType | None) -> None:
        again = stop.number == number
        if stop.number != REQUEUE:  # which Slurm may send after SIGTERM, or before
            stop.number = number
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
        if REQUEUE is not None and stop.number == REQUEUE:
            signal.raise_signal(REQUEUE)
