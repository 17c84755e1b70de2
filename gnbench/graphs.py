"""Work on fixed tensors that is recorded once and replayed, after proof that it repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gnbench.devices import is_out_of_memory

Work = Callable[[], None]


class RecordingError(RuntimeError):
    """Work cannot be replayed; the message says why. It has been done nevertheless, plainly."""


class Recorder(Protocol):
    """Whatever can replay work: `CudaGraphs`, and on a CPU what the tests put in its place."""

    def run(self, work: Work) -> None:
        """Do the work now."""
        ...

    def record(self, work: Work) -> Work:
        """Return what does the work again on the same tensors, without any of its Python."""
        ...


class CudaGraphs:
    """CUDA graphs of one training, which share their memory and are never replayed at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        """Do the work on the stream of the recording, so that nothing is bound to another one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Capture the work, which is not done; what is returned launches it as one graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Program:
    """Work that is done plainly the first time and replayed from the third time on.

    The second time it is done both ways from the same state, which must come out the same to the
    bit: a value that Python computes, or a kernel that does not repeat itself, is found out. So
    there are no steps for warming up that would have to be undone. ``state`` returns the tensors
    that the work changes; of random numbers the generator of ``device`` is taken care of.
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
            replay = self._recorder.record(self._work)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._restore(before)
            self._recorder.run(self._work)
            reason = str(error).partition("\n")[0]
            raise RecordingError(f"a step cannot be captured ({reason})") from error
        self._restore(before)
        self._recorder.run(self._work)
        plain = self._snapshot()
        self._restore(before)
        replay()
        replayed = self._snapshot()
        if not all(map(_same, plain, replayed)):
            self._restore(plain)
            raise RecordingError("a replayed step does not repeat what the step itself does")
        return replay

    def _snapshot(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in [*self._state(), self._generator()]]

    @torch.no_grad()
    def _restore(self, snapshot: list[Tensor]) -> None:
        *tensors, generator = snapshot
        for tensor, value in zip(self._state(), tensors, strict=True):
            tensor.copy_(value)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(generator, self._device)
        else:
            torch.set_rng_state(generator)

    def _generator(self) -> Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit, but every NaN with every other."""
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
