"""The device of a run: which one, what it is called, how much memory the run took."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from gnbench.config import ConfigError
from gnbench.train import distributed

log = logging.getLogger(__name__)

# What those say that do not raise torch.OutOfMemoryError: the CPU, CUDA itself, cuBLAS and cuDNN.
ALLOCATION_FAILURES = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Under torchrun, ``auto`` and ``cuda`` are the GPU of this process.

    Raises:
        ConfigError: if this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        index = distributed.local_rank() if device.index is None else device.index
        if index >= found:
            raise ConfigError(
                f"device={name}: this machine has {found} CUDA devices; use device=cpu or auto"
            )
        device = torch.device("cuda", index)
    return device


@contextmanager
def claimed(name: str) -> Iterator[torch.device]:
    """Yield the device of a run: of several GPUs, unless one is named, the one with fewest runs.

    Every run holds a file lock, named after its GPU, in the folder for temporary files.

    Raises:
        ConfigError: as `choose_device`.
    """
    device = choose_device(name)
    chosen = device.type != "cuda" or ":" in name or distributed.world_size() > 1
    if chosen or torch.cuda.device_count() == 1:
        yield device
        return
    lock, index = _seat(torch.cuda.device_count())
    try:
        yield torch.device("cuda", index)
    finally:
        lock.release()


def _seat(gpus: int) -> tuple[FileLock, int]:
    """Take the first free seat: one on every GPU before a second on any."""
    masked = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    names = masked if len(masked) == gpus else range(gpus)
    for row in itertools.count():
        for index, gpu in enumerate(names):
            name = f"gnbench-{os.getuid()}-gpu{gpu}-{row}.lock"
            lock = FileLock(Path(tempfile.gettempdir(), name))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return lock, index
    raise AssertionError("unreachable")


def flush_denormals() -> None:
    """Have this thread, and the threads that torch starts from now on, take 0 for denormal numbers.

    Of a unit that no longer learns, Adam's moments fade until they are denormal (in float32 below
    1.2e-38), and an x86 core computes many times slower with those. Beside ε such a moment counts
    for nothing: the weights stay the same. What torch's threads did before is left to them.
    """
    torch.set_flush_denormal(True)


def describe_device(device: torch.device) -> str:
    """Name the device that did the work, for the record."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({_processor()}, {torch.get_num_threads()} threads)"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory in use since the run began: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak_memory(device: torch.device) -> None:
    """Have `peak_memory_bytes` start again."""
    if device.type == "cuda":
        # Nothing before needed the device, and the statistics do not start it.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again
        except OSError:
            log.debug("peak memory is that of the whole process on this system")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether the device, or the machine, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(failure in str(error) for failure in ALLOCATION_FAILURES)
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
