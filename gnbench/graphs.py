"""Work on fixed tensors that is recorded once and replayed, after proof that it repeats."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from gnbench.devices import is_out_of_memory

Work = Callable[[], None]


class RecordingError(RuntimeError):
    """Work cannot be replayed; the message says why. It has been done nevertheless, plainly."""


class Recorder(Protocol):
    """Whatever can replay work: `CudaGraphs`, and on a CPU what the tests put in its place."""

    def run(self, work: Work, strictly: bool = False) -> None:
        """Do the work now; if ``strictly``, raise where it waits for the device."""
        ...

    def record(self, work: Work) -> Work:
        """Return what does the work again on the same tensors, without any of its Python."""
        ...

    def renew(self) -> None:
        """Have no more to do with what was recorded before."""
        ...


class CudaGraphs:
    """CUDA graphs of one training, which share their memory and are never replayed at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device)
        self.renew()

    def renew(self) -> None:
        """Take other memory for the graphs to come."""
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work, strictly: bool = False) -> None:
        """Do the work on the stream of the recording, so that nothing is bound to another one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            _no_waiting() if strictly else nullcontext(),
        ):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Capture the work, which is not done; what is returned launches it as one graph."""
        graph = torch.cuda.CUDAGraph()
        causes = []

        def noting_errors() -> None:
            try:
                work()
            except Exception as error:
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
        except Exception:
            if causes:
                raise causes[0] from None
            raise
        return graph.replay


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
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream on which all runs of this process record: each has its workspaces."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Snapshot:
    """The values of some tensors, and of the generator of random numbers of their device."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._values = [tensor.detach().clone() for tensor in tensors]
        cuda = device.type == "cuda"
        self._generator = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tensors and the generator their values again."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._generator, self._device)
        else:
            torch.set_rng_state(self._generator)

    def equals(self, other: Snapshot) -> bool:
        """Compare bit for bit, but every NaN with every other."""
        pairs = zip(
            [*self._values, self._generator], [*other._values, other._generator], strict=True
        )
        return all(
            torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            for a, b in pairs
        )


class Program:
    """Work that is done plainly the first time and replayed from the third time on.

    The second time it is done both ways from the same state, which must come out the same to the
    bit: a kernel that does not repeat itself is found out, and so is a value of Python's that
    changes from one time to the next (not one that changes only later). So there are no steps for
    warming up that would have to be undone. ``state`` returns the tensors that the work changes; of
    random numbers the generator of ``device`` is taken care of. What the work keeps in Python is
    not put back.
    """

    def __init__(
        self,
        work: Work,
        recorder: Recorder,
        state: Callable[[], list[Tensor]],
        device: torch.device,
    ) -> None:
        self._work = work
        self._recorder = recorder
        self._state = state
        self._device = device
        self._warm = False
        self._replay: Work | None = None

    @property
    def trusted(self) -> bool:
        """Whether the work is replayed by now."""
        return self._replay is not None

    def __call__(self) -> None:
        """Do the work once.

        Raises:
            RecordingError: if it cannot be replayed. It has been done; do it otherwise next time.
        """
        if self._replay is not None:
            self._replay()
        elif not self._warm:
            self._recorder.run(self._work)
            self._warm = True
        else:
            self._replay = self._proven()

    def _proven(self) -> Work:
        before = self._snapshot()
        try:
            # A capture that fails leaves traces in torch: what would make it fail is tried first.
            self._recorder.run(self._work, strictly=True)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            before.restore()
            self._recorder.run(self._work)
            raise RecordingError(_reason(error)) from error
        plain = self._snapshot()
        try:
            before.restore()
            replay = self._recorder.record(self._work)
            before.restore()
            replay()
            repeats = self._snapshot().equals(plain)
        except Exception as error:
            reason = "no memory for a graph" if is_out_of_memory(error) else _reason(error)
        else:
            if repeats:
                return replay
            reason = "a replayed step does not repeat what the step itself does"
        plain.restore()
        raise RecordingError(reason)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._state(), self._device)


def _reason(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return f"a step cannot be captured ({line})"
