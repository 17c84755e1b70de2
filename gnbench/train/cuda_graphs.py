"""Work on fixed tensors that is recorded, and replayed after proof that it repeats."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Protocol

import torch
from torch import Tensor

from gnbench.train.devices import is_out_of_memory

log = logging.getLogger(__name__)

Work = Callable[[], None]

MOST_BRANCHES = 16  # of a graph; more would take up memory, and torch has 32 streams for them


class RecordingError(RuntimeError):
    """Work cannot be replayed; the message says why. It has not been done."""


class Recorder(Protocol):
    """Whatever can replay work: `CudaGraphs`, and on a CPU what the tests put in its place."""

    def run(self, work: Work, strictly: bool = False) -> None:
        """Do the work now; if ``strictly``, raise where it waits for the device."""
        ...

    def record(self, work: Work) -> Work:
        """Return what does the work again on the same tensors, without any of its Python."""
        ...

    def side_by_side(self, works: Sequence[Work]) -> Work:
        """Return what does all the works, none of which waits for another."""
        ...

    def renew(self) -> None:
        """Have no more to do with what was recorded before."""
        ...


def recorder(device: torch.device) -> Recorder | None:
    """Return what replays work on the device, or None if there are no graphs on it."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """CUDA graphs that share their memory and are never replayed at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device, 0)
        self.renew()

    def renew(self) -> None:
        """Take other memory for the graphs to come."""
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work, strictly: bool = False) -> None:
        """Do the work on the stream of the recording, so that nothing is bound to another one."""
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
        """Capture the work, which is not done; what is returned launches it as one graph."""
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
    """Return a stream on which all runs of this process record: each stream has its workspaces."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Snapshot:
    """The values of some tensors, and of the generator of random numbers of their device."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._values = [tensor.detach().clone() for tensor in tensors]
        self._generator = self._draws()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the tensors and the generator their values again."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._generator, self._device)
        else:
            torch.set_rng_state(self._generator)

    def holds(self) -> bool:
        """Tell whether the values are the same now, bit for bit, but every NaN as every other."""
        return torch.equal(self._generator, self._draws()) and all(
            torch.equal(now, then) or torch.allclose(now, then, rtol=0, atol=0, equal_nan=True)
            for now, then in zip(self._tensors, self._values, strict=True)
        )

    def _draws(self) -> Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()


class Program:
    """Work that is replayed once it has proven to repeat itself.

    The first time it is done both ways from the same state, which must come out the same to the
    bit: a kernel that does not repeat itself is found out, and so is a value of Python's that
    changes from one time to the next (not one that changes only later). ``state`` returns the
    tensors that the work changes; of random numbers the generator of ``device`` is taken care of.
    What the work keeps in Python is not put back. Whatever is set up at its first use (moments,
    workspaces) must be there already.
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
        self._replay: Work | None = None
        self._refusal: str | None = None

    def __call__(self) -> None:
        """Do the work once.

        Raises:
            RecordingError: if it cannot be replayed, from then on every time; it is not done.
        """
        if self._refusal is not None:
            raise RecordingError(self._refusal)
        if self._replay is not None:
            self._replay()
            return
        try:
            self._replay = self._proven()
        except RecordingError as error:
            self._refusal = str(error)
            raise

    def _proven(self) -> Work:
        """Do the work and return its recording; if anything fails, put back what was before."""
        try:
            before = self._snapshot()
        except Exception as error:
            raise RecordingError(_reason(error)) from error
        try:
            # A capture that fails leaves traces in torch: what would make it fail is tried first.
            self._recorder.run(self._work, strictly=True)
            plain = self._snapshot()
            before.restore()
            replay = self._recorder.record(self._work)
            before.restore()
            replay()
            if not plain.holds():
                raise RecordingError("a replayed step does not repeat what the step itself does")
        except BaseException as error:
            before.restore()
            self._recorder.renew()  # memory that a lost graph has left behind cannot be shared
            if isinstance(error, RecordingError) or not isinstance(error, Exception):
                raise
            raise RecordingError(_reason(error)) from error
        return replay

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._state(), self._device)


class Member(Protocol):
    """A training of a `Pack`."""

    def state(self) -> list[Tensor]:
        """Return all tensors that its work changes."""
        ...

    def refuse(self, reason: str, work: Work) -> None:
        """Learn that this work cannot be replayed, and is left to do."""
        ...


class Pack:
    """Trainings of one process whose work is replayed side by side, as branches of one graph.

    What a member asks for is done as soon as all have asked, or when it asks for more or wants to
    see what has become of it (`settle`). So a graph has as many branches as there are members in
    step. Works of different ``key`` go into graphs of their own, and so does what does not fit into
    one (``divided`` then says so). What interrupts a work ends all who had asked for some: how far
    it came nobody knows.
    """

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self.recorder = recorder
        self.divided = False
        self._device = device
        self._members: list[Member] = []
        self._asked: dict[Member, tuple[Hashable, Work]] = {}
        self._ended: dict[Member, BaseException] = {}  # by what
        self._programs: dict[tuple[Hashable, tuple[Member, ...]], Program] = {}

    def join(self, member: Member) -> None:
        """Take in another training."""
        self._members.append(member)

    def leave(self, member: Member) -> None:
        """Have no more to do with it."""
        self._members = [other for other in self._members if other is not member]
        self._asked.pop(member, None)
        self._ended.pop(member, None)
        self.forget(member)

    def forget(self, member: Member) -> None:
        """Let go of the graphs that it has a part in."""
        self._programs = {
            (key, members): program
            for (key, members), program in self._programs.items()
            if member not in members
        }
        self.recorder.renew()

    @property
    def size(self) -> int:
        """How many members it has."""
        return len(self._members)

    def ask(self, member: Member, key: Hashable, work: Work) -> None:
        """Have the work of a member that has settled done when it settles again, at the latest."""
        self._asked[member] = (key, work)
        if len(self._asked) == len(self._members):
            self._do_all()

    def settle(self, member: Member) -> None:
        """Do what it has asked for, together with what the others have.

        Raises:
            BaseException: the one that interrupted this work.
        """
        if member in self._ended:
            raise self._ended[member]
        if member in self._asked:
            self._do_all()

    def _do_all(self) -> None:
        asked, self._asked = self._asked, {}
        try:
            for key in {key: None for key, _ in asked.values()}:
                together = [m for m in self._members if m in asked and asked[m][0] == key]
                self.do(key, {member: asked[member][1] for member in together})
        except BaseException as error:
            self._ended |= dict.fromkeys(asked, error)
            raise

    def do(self, key: Hashable, works: Mapping[Member, Work]) -> None:
        """Do these members' work now, side by side; what cannot be replayed they are refused."""
        members = tuple(works)
        if (key, members) not in self._programs:
            self._programs[key, members] = Program(
                self.recorder.side_by_side(list(works.values())),
                self.recorder,
                lambda: [tensor for member in members for tensor in member.state()],
                self._device,
            )
        try:
            self._programs[key, members]()
            return
        except RecordingError as error:
            reason = str(error)  # the error itself would keep what the step has allocated
        if len(works) > 1 and not self.divided:
            self.divided = True
            log.warning("%d replicas at once: %s; each has graphs of its own", len(works), reason)
        for member, work in works.items():
            if len(works) > 1:
                self.do(key, {member: work})
            else:
                member.refuse(reason, work)


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "no memory for a graph"
    line = str(error).partition("\n")[0]
    return f"a step cannot be captured ({line})"
