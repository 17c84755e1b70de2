"""The device of a run: which one, what it is called and can do, how much memory the run took."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from gnbench.errors import BusyError, ConfigError
from gnbench.train import distributed

log = logging.getLogger(__name__)

# What those say that do not raise torch.OutOfMemoryError: the CPU, CUDA itself, cuBLAS and cuDNN.
ALLOCATION_FAILURES = (
    "can't allocate memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "_ALLOCATION_FAILED",  # of cuDNN from its ninth version on
)
TRIAL_SIZE = 256  # rows and columns of the matrices on which bf16 is tried
HARDWARE_QUEUES = "32"  # the most there are; of the 8 by default replicas would share some
MPS_FOLDER = "/tmp/nvidia-mps"  # of NVIDIA's Multi-Process Service, unless the environment says
# Of control groups, versions 2 and 1: the limit, what is in use, and of which what can be let go.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
SLOWEST_BF16 = 4  # times as long as fp32; emulated by torch it takes some 90 times as long


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Under torchrun, ``auto`` and ``cuda`` are the GPU of this process. CUDA, which starts later,
    is to give each replica a queue of its own, unless the environment says otherwise. The clients
    of NVIDIA's Multi-Process Service share those of the GPU, and it would turn others away.

    Raises:
        ConfigError: if this machine has no such device.
    """
    if not Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or MPS_FOLDER, "control").exists():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", HARDWARE_QUEUES)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        processes = distributed.local_world_size()
        if processes > 1 and (found > 1 if ":" in name else processes > found):  # said by all alike
            raise ConfigError(
                f"device={name}: {processes} processes on this machine need a GPU each, and it has "
                f"{found}: use device=cuda with --nproc-per-node={max(1, found)}, or device=cpu"
            )
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
        BusyError: if others hold the device.
    """
    device = choose_device(name)
    chosen = device.type != "cuda" or ":" in name or distributed.world_size() > 1
    if chosen or torch.cuda.device_count() == 1:
        _open(device)
        yield device
        return
    lock, index = _claim(torch.cuda.device_count())
    try:
        device = torch.device("cuda", index)
        _open(device)
        yield device
    finally:
        lock.release()


def _open(device: torch.device) -> None:
    """Raise BusyError if others hold the device, or all its memory."""
    try:
        torch.zeros((), device=device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "busy or unavailable" not in reason and not is_out_of_memory(error):
            raise
        raise BusyError(
            f"device={device}: {reason}: wait for those who use it (nvidia-smi names them), have "
            "fewer processes share it (hydra.launcher.n_jobs), or choose another"
        ) from error


def _claim(gpus: int) -> tuple[FileLock, int]:
    """Take the first lock that is free: one for every GPU before a second for any."""
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


@functools.cache
def has_native_bf16(device: torch.device) -> bool:
    """Tell whether the device itself computes in bf16, so that ``precision=bf16`` is of use.

    A GPU does from compute capability 8 on. A processor is tried: on one without, or where oneDNN
    is told not to use it, torch emulates bf16 number by number.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    fp32, bf16 = (
        torch.ones(TRIAL_SIZE, TRIAL_SIZE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    return min(map(_seconds, 3 * [bf16])) < SLOWEST_BF16 * min(map(_seconds, 3 * [fp32]))


def _seconds(matrix: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - began


def has_tf32(device: torch.device) -> bool:
    """Tell whether the device computes in TF32: GPUs from compute capability 8 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def set_float32_products(precision: str) -> None:
    """Have GPUs compute convolutions and matrix products of float32 numbers in TF32, or in float32.

    In TF32, which keeps 10 of the 23 bits, where ``precision`` says so.
    """
    # By torch's newer settings: the older ``allow_tf32`` warns on some releases.
    products = "tf32" if precision == "tf32" else "ieee"
    # All of cuDNN's alike. Who reads the older settings may get an error: of torch that is only the
    # search for the fastest kernels of a compiled network, which is not asked for.
    torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = products  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = products


def set_defaults() -> None:
    """Have numbers be float32 on a CPU, and products of them computed as such.

    Whatever a part of one's own chose in a run that this process carried out before.
    """
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]


def flush_denormals() -> None:
    """Have this thread, and the threads that torch starts from now on, take 0 for denormal numbers.

    Adam's moments of a unit that no longer learns fade until they are denormal (in float32 below
    1.2e-38), and an x86 core computes many times slower with those. Beside ε such a moment counts
    for nothing: the weights stay the same. Threads that torch has started before stay as they are.
    """
    torch.set_flush_denormal(True)


def describe_device(device: torch.device) -> str:
    """Name the device that did the work, for the record."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    processor = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return f"cpu ({processor}, {torch.get_num_threads()} threads)"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory in use since the run began: allocated on a GPU, resident on a CPU.

    None on a CPU without Linux's ``/proc``.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kib = _field("/proc/self/status", "VmHWM")
    return None if kib is None else 1024 * int(kib.split()[0])


def free_memory_bytes() -> int | None:
    """Return what this machine, or the control group of this process, has left for it to take.

    None without Linux's ``/proc``.
    """
    kib = _field("/proc/meminfo", "MemAvailable")
    found = [] if kib is None else [1024 * int(kib.split()[0])]
    for limit, used, kept in CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            most = int(Path(limit).read_text())
            taken = int(Path(used).read_text())
            reclaimable = int(_field(str(Path(used).with_name("memory.stat")), kept, " ") or 0)
            found.append(max(0, most - taken + reclaimable))
    return min(found, default=None)


def reset_peak_memory(device: torch.device) -> None:
    """Have `peak_memory_bytes` start again."""
    if device.type == "cuda":
        # What came before may not have needed the device, and the statistics do not start it.
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


def _field(path: str, name: str, mark: str = ":") -> str | None:
    """Return what the first line ``name: …`` of a file of Linux's says; ``mark`` for the colon."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(mark) for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), None)
