"""Work on fixed tensors that is recorded, and replayed after proof that it repeats."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from gnbench.errors import RecordingError
from gnbench.train.devices import is_out_of_memory

Work = Callable[[], None]


def recorder(device: torch.device) -> CudaGraphs | None:
    """Return what records work on the device, or None if there are no graphs on it."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """CUDA graphs that share their memory and are never replayed at once.

    Everything is warmed up and captured on one side stream: workspaces, of cuBLAS for one, belong
    to a stream, and a graph keeps the address of the one that it was captured with. The tests put
    a recorder of their own in its place on a CPU.
    """

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
                torch.cuda.device(self._device),
                torch.cuda.stream(current),  # which a capture that failed may not come back to
                torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ),
            ):
                noting_errors()
        except BaseException:
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
