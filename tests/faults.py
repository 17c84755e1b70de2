"""Faults on purpose: commands in forked processes that die, or find no disk, at a chosen moment.

The processes are forked from one that has imported torch: hundreds of them take minutes, not hours.
"""

import errno
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import torch

import gnbench.__main__
from gnbench import files
from gnbench.check import compose
from gnbench.datasets import cache
from gnbench.runs import runner  # noqa: F401  (the forks need it)
from tests import tiny

torch.set_num_threads(1)
compose(*tiny.OVERRIDES, "norm=bn")  # has torch import what the forks would each import again

# How often the random faults are caused; the figures of docs/reliability.md are those of 10.
REPEAT = int(os.environ.get("GNBENCH_FAULTS", "1"))
LOCK = threading.Lock()  # every start asks after all children, and only one may ask after each
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults"])
# Python 3.11 does not tell its fork server where to import that from.
os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"


class Disk:
    """Counts what a process does to the files of a folder; at number ``at`` the fault happens.

    ``kill``: SIGKILL, a write being cut in half. ``full``: from there on nothing more fits.
    ``read-only``: from there on nothing can be changed.
    """

    def __init__(self, folder, fault, at):
        self.folder = str(folder)
        self.fault = fault
        self.at = at
        self.count = itertools.count(1)
        self.main = threading.main_thread()
        write, fsync = files.write, os.fsync

        def cut(file, data):
            if callable(data):
                buffer = io.BytesIO()
                data(buffer)
                data = buffer.getbuffer()
            if self.strikes(removes=False):
                os.write(file.fileno(), bytes(data[: len(data) // 2]))
                self.strike(file.name)
            write(file, data)

        def flush(descriptor):
            if self.strikes(removes=False):
                self.strike(self.folder)
            fsync(descriptor)

        files.write, os.fsync = cut, flush
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        changes = event in ("os.rename", "os.remove", "os.mkdir") or (
            event == "open"
            and arguments[2] is not None
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if not changes or not str(arguments[0]).startswith(self.folder):
            return
        if self.strikes(removes=event == "os.remove"):
            self.strike(arguments[0])

    def strikes(self, removes):
        if threading.current_thread() is not self.main:
            return False  # the signs of life come by the clock
        number = next(self.count)
        if self.fault == "full" and removes:
            return False
        return number == self.at or (self.fault != "kill" and number > self.at)

    def strike(self, path):
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = {"full": errno.ENOSPC, "read-only": errno.EROFS}[self.fault]
        raise OSError(number, os.strerror(number), str(path))


def _gnbench(arguments, folder, fault, at, memory, output):
    """In the forked process: what ``python -m gnbench`` does."""
    with Path(output).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv = ["gnbench", *arguments]
    disk = None if fault is None else Disk(Path(folder) / "outputs", fault, at)
    if memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    try:
        gnbench.__main__.main()
    finally:
        if disk is not None:
            print("changes", next(disk.count) - 1)
        sys.stdout.flush()
        if loky := sys.modules.get("joblib.externals.loky"):
            loky.get_reusable_executor().shutdown()  # a process that is forked waits for its own


def start(arguments, folder, fault=None, at=0, memory=None, output=None):
    """Start a command in ``folder``; its output goes to the file ``output``."""
    output = output or Path(folder) / "output"
    process = FORKS.Process(
        target=_gnbench, args=(list(arguments), str(folder), fault, at, memory, str(output))
    )
    with LOCK:
        process.start()
    return process


def end(process, seconds=300):
    """Wait for the end of a process; return its exit code, None if it still runs."""
    multiprocessing.connection.wait([process.sentinel], seconds)
    with LOCK:
        process.join(0)
        return process.exitcode


def command(*arguments, **options):
    """Run a command to its end; return its exit code, that of a signal as -number."""
    code = end(start(*arguments, **options))
    assert code is not None, "it hangs"
    return code


def fetch(root, arrays, checksums, at):
    """Load a dataset whose source leaves a file in its working folder; die at change ``at``."""

    def source(_, work):
        (work / "download").write_bytes(b"x" * 1000)
        return arrays

    if at is not None:
        Disk(root, "kill", at)
    return cache.load(cache.Known("toy", checksums, [("a source", source)], ""), root)
