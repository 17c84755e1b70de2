"""Work on fixed tensors that is recorded, and replayed after proof that it repeats."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from gnbench.errors import RecordingError
from gnbench.train.devices import is_out_of_memory

Work = Callable[[], None]


def recorder(device: torch.device) -> CudaGraphs | None:
    """Return what records work on the device, or None if there are no graphs on it."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """CUDA graphs that share their memory and are never replayed at once.

    Everything is warmed up and captured on one side stream, with its branches on streams of their
    own. A graph keeps the addresses of the workspaces that cuBLAS had on them, so these are made
    anew within each capture, in the graphs' own memory. One graph must still not be replayed once
    another one has been destroyed, which clears what cuBLAS has on its stream (pytorch#193402): let
    go of all together. The tests put a recorder of their own in its place on a CPU.
    """

    failed = False  # a capture of this process

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device, 0)
        self.renew()

    def renew(self) -> None:
        """Take other memory for the graphs to come."""
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work, strictly: bool = False) -> None:
        """Do the work on the side stream; if ``strictly``, raise where it waits for the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(self._stream),
                _no_waiting() if strictly else nullcontext(),
            ):
                work()
        finally:
            current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Capture the work, which is not done; what is returned replays it, without its Python."""
        if CudaGraphs.failed and _fails_for_good():
            raise RuntimeError(
                "one has failed in this process, after which torch 2.11 has no other"
            )
        graph = torch.cuda.CUDAGraph()
        causes: list[BaseException] = []

        def noting_errors() -> None:
            try:
                work()
            except BaseException as error:
                causes.append(error)  # the end of a capture that failed raises another one
                raise

        current = torch.cuda.current_stream(self._device)
        try:
            with (
                _undisturbed(),
                torch.cuda.device(self._device),
                torch.cuda.stream(current),  # which a capture that failed may not come back to
                torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ),
            ):
                noting_errors()
        except BaseException:
            CudaGraphs.failed = True
            self.renew()
            if causes:
                raise causes.pop() from None  # kept, it would keep what the step has allocated
            raise
        return graph.replay

    def side_by_side(self, works: Sequence[Work]) -> Work:
        """Return what does each work on a stream of its own; captured, a branch of the graph."""
        if len(works) == 1:
            return works[0]
        streams = [_side_stream(self._device, 1 + branch) for branch in range(len(works))]

        def fork_and_join() -> None:
            current = torch.cuda.current_stream(self._device)
            for stream in streams:  # before any work, or the second would wait for the first
                stream.wait_stream(current)
            try:
                for stream, work in zip(streams, works, strict=True):
                    with torch.cuda.stream(stream):
                        work()
            except BaseException:
                with suppress(Exception):  # in a capture that has failed
                    join(current)
                raise
            join(current)

        def join(current: torch.cuda.Stream) -> None:
            for stream in streams:
                current.wait_stream(stream)

        return fork_and_join


def empty_cache() -> None:
    """Give back the memory on a GPU that nothing uses."""
    # A failed capture leaves torch 2.11 asserting that there is none under way (pytorch#180395).
    with suppress(RuntimeError) if CudaGraphs.failed and _fails_for_good() else nullcontext():
        torch.cuda.empty_cache()


def _fails_for_good() -> bool:
    """Tell whether this torch takes a capture that has failed for one under way."""
    return TorchVersion(torch.__version__) < "2.12"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep out of a capture what would spoil it: the collector, and cuBLAS's older workspaces.

    A graph that the collector destroys invalidates the capture under way (pytorch#161037). The
    workspaces go afterwards as well, or work outside of the graph would use its memory.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        torch._C._cuda_clearCublasWorkspaces()
        try:
            yield
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Have torch raise an error where the CPU waits for a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not know all such places
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def _side_stream(device: torch.device, branch: int) -> torch.cuda.Stream:
    """Return the stream of a branch; of this process, since each stream has workspaces."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Snapshot:
    """The values of some tensors, and of the generator of random numbers of their device."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._values = [tensor.detach().clone() for tensor in tensors]
        cuda = device.type == "cuda"
        self._generator = (
            torch.cuda.default_generators[device.index] if cuda else torch.default_generator
        )
        self._drawn = self._generator.get_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tensors and the generator their values again."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        self._generator.set_state(self._drawn)

    def holds(self) -> bool:
        """Tell whether the values are the same now, bit for bit, but every NaN as every other."""
        return torch.equal(self._drawn, self._generator.get_state()) and all(
            torch.equal(now, then) or torch.allclose(now, then, rtol=0, atol=0, equal_nan=True)
            for now, then in zip(self._tensors, self._values, strict=True)
        )


class Program:
    """Work that is replayed once it has proven to repeat itself.

    The first time it is done both ways from the same state, which must come out the same to the
    bit. That finds out a kernel that does not repeat itself, and a value of Python's that changes
    from one time to the next (not one that changes only later). ``state`` returns the tensors that
    the work changes; the generator of random numbers of ``device`` is taken care of. What the work
    keeps in Python is not put back. Whatever is set up at its first use (moments, workspaces) must
    be there already.
    """

    def __init__(
        self,
        work: Work,
        recorder: CudaGraphs,
        state: Callable[[], list[Tensor]],
        device: torch.device,
    ) -> None:
        self._work = work
        self._recorder = recorder
        self._state = state
        self._device = device
        self._replay: Work | None = None
        self._refusal: str | None = None

    @property
    def refused(self) -> bool:
        """Whether it has been found that the work cannot be replayed."""
        return self._refusal is not None

    def __call__(self) -> None:
        """Do the work once.

        Raises:
            RecordingError: if it cannot be replayed, from then on every time; it is not done.
        """
        if self._replay is not None:
            self._replay()
        elif self._refusal is None:
            self._prove()
        if self._refusal is not None:
            raise RecordingError(self._refusal)

    def _prove(self) -> None:
        """Do the work, plainly and replayed; if anything fails, put back what was before."""
        before = None
        try:
            before = Snapshot(self._state(), self._device)
            # A capture that fails leaves traces in torch: what would make it fail is tried first.
            self._recorder.run(self._work, strictly=True)
            plain = Snapshot(self._state(), self._device)
            before.restore()
            replay = self._recorder.record(self._work)
            before.restore()
            replay()
            if plain.holds():
                self._replay = replay
            else:
                self._refusal = "a replayed step does not repeat what the step itself does"
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            self._refusal = f"a step cannot be captured ({first_line})"
            if is_out_of_memory(error):
                self._refusal = "no memory for a graph"
        finally:
            if self._replay is None:
                if before is not None:
                    before.restore()
                self._recorder.renew()  # memory that a lost graph has left cannot be shared
