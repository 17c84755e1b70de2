"""Who is at work on a run: the one process that holds its lock, and its heartbeat."""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gnbench import files
from gnbench.errors import LockedError, TakenOverError

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
# Without a heartbeat for so long a run counts as dead. The clocks of machines that share a folder
# must not differ by more than that.
SILENCE_SECONDS = 60.0
EXITING = 0x4  # Linux's PF_EXITING, in the flags of /proc/<pid>/stat
LOCK, HEARTBEAT = ".lock", ".alive"


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of the process that holds a run.

    ``pid`` means something on ``machine`` only (a boot and a process namespace); ``beat`` is its
    time in seconds since 1970; ``step`` of ``total_steps`` were taken by then.
    """

    host: str
    machine: str
    pid: int
    since: str
    beat: float
    step: int = 0
    total_steps: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_fresh(self) -> bool:
        """Tell whether its process can be taken to be alive."""
        if time.time() - self.beat > SILENCE_SECONDS:
            return False
        return self.machine != _machine() or _exists(self.pid)


class Heartbeat:
    """What the holder of a run shows the world: keep ``step`` and ``total_steps`` up to date."""

    def __init__(self, run_dir: Path) -> None:
        self.step = 0
        self.total_steps = 0
        self._path = run_dir / HEARTBEAT
        self._seen = False  # by others: it was written
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._first = Beat(socket.gethostname(), _machine(), os.getpid(), since, beat=0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="gnbench-alive", daemon=True)

    def begin(self) -> None:
        """Beat for the first time, and go on until `end`."""
        self._beat()
        self._thread.start()

    def end(self) -> None:
        """Stop; nobody holds the run any more."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self.check()
            self._path.unlink(missing_ok=True)

    def check(self) -> bool:
        """Make sure that no other process holds the run; tell whether this one's heartbeat is seen.

        One that was suspended may have been taken for dead, where a lock is kept to one machine.

        Raises:
            TakenOverError: if another process holds it.
        """
        heard = read_heartbeat(self._path.parent) if self._seen else None
        if heard and replace(heard, beat=0.0, step=0, total_steps=0) != self._first:
            raise taken_over(self._path.parent, str(heard))
        return heard is not None

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        beat = replace(self._first, beat=time.time(), step=self.step, total_steps=self.total_steps)
        with suppress(OSError):  # a full disk, or a run taken over: what matters will say so
            self.check()
            files.replace(self._path, json.dumps(asdict(beat)).encode())
            self._seen = True


def taken_over(run_dir: Path, who: str) -> TakenOverError:
    """Say that ``who`` holds a run which this process held."""
    return TakenOverError(f"{run_dir} was taken over by {who}; this process leaves it")


@contextmanager
def hold(run_dir: Path, wait: bool = False) -> Iterator[Heartbeat]:
    """Hold the lock of a run and keep its heartbeat.

    The lock frees itself at once when its process dies, which a lease in a file would not; the
    heartbeat is for other machines, which may not see the lock, and tells how far the run is.

    Raises:
        LockedError: at once, if another process holds it and ``wait`` is false.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"{run_dir} is being trained by {read_heartbeat(run_dir) or 'another process'}"
        if not wait:
            raise LockedError(f"{message}; wait=true waits for it") from None
        log.info("%s; waiting for it", message)
        lock.acquire()
    try:
        _listen_for_others(run_dir, wait)
        heartbeat = Heartbeat(run_dir)
        heartbeat.begin()
        try:
            yield heartbeat
        finally:
            heartbeat.end()
    finally:
        lock.release()


def read_heartbeat(run_dir: Path) -> Beat | None:
    """Return the last heartbeat of a run's holder, or None if it has none (any more)."""
    try:
        entries: dict[str, Any] = json.loads((run_dir / HEARTBEAT).read_bytes())
        beat = Beat(**entries)
        return beat if isinstance(beat.pid, int) and isinstance(beat.beat, int | float) else None
    except (OSError, ValueError, TypeError):
        return None


def _listen_for_others(run_dir: Path, wait: bool) -> None:
    """Make sure that nobody on another machine holds the run although its lock was free.

    Network file systems may keep locks to one machine. A heartbeat that goes on changing has a
    holder; one that does not was left by a process that died.
    """
    heard = read_heartbeat(run_dir)
    if heard is None or heard.machine == _machine() or not heard.is_fresh():
        return
    log.info("%s: %s may still be at work; listening for it", run_dir, heard)
    silent_since = time.monotonic()
    while time.monotonic() - silent_since < 2.5 * BEAT_SECONDS:
        time.sleep(BEAT_SECONDS / 10)
        latest = read_heartbeat(run_dir)
        if latest is None:
            return
        if latest != heard:
            if not wait:
                raise LockedError(f"{run_dir} is being trained by {latest}; wait=true waits for it")
            heard, silent_since = latest, time.monotonic()


@functools.cache
def _machine() -> str:
    """Name the boot and the process namespace that a pid belongs to."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _exists(pid: int) -> bool:
    if os.name == "nt":  # where a signal of 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    try:  # killed, but its end, or that its parent hears of it, takes a while
        flags = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]
        return not int(flags) & EXITING
    except OSError:
        return not Path("/proc/self/stat").exists()  # else it has just ended
