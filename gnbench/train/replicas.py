"""Several trainings of one process whose steps are replayed side by side, as one graph."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from gnbench.errors import RecordingError
from gnbench.train import cuda_graphs
from gnbench.train.cuda_graphs import CudaGraphs, Program, Work

log = logging.getLogger(__name__)

MOST_REPLICAS = 16  # of a graph; more would take up memory, and torch has 32 streams for them


class Replica(Protocol):
    """A training of a `ReplicaGroup`."""

    def state(self) -> list[Tensor]:
        """Return all tensors that its work changes."""
        ...


def replica_group(device: torch.device) -> ReplicaGroup | None:
    """Return what replays steps on the device, or None if there are no graphs on it."""
    recorder = cuda_graphs.recorder(device)
    return ReplicaGroup(recorder, device) if recorder else None


class ReplicaGroup:
    """The trainings whose work becomes branches of one graph.

    What a replica asks for is done as soon as all have asked, or when it asks for more or wants to
    see the outcome (`settle`). So a graph has as many branches as there are replicas in step.
    Works of different ``key`` go into graphs of their own, and so does what does not fit into one
    (``divided`` then says so). An error in the midst of a work ends all who had asked for some: how
    far it came nobody knows.
    """

    def __init__(self, recorder: CudaGraphs, device: torch.device) -> None:
        self.recorder = recorder
        self.divided = False
        self._device = device
        self._replicas: list[Replica] = []
        self._asked: dict[Replica, tuple[Hashable, Work]] = {}
        self._refused: dict[Replica, str] = {}  # for which reason
        self._ended: dict[Replica, BaseException] = {}  # by what
        self._programs: dict[tuple[Hashable, tuple[Replica, ...]], Program] = {}

    @property
    def size(self) -> int:
        """How many replicas it has."""
        return len(self._replicas)

    def join(self, replica: Replica) -> None:
        """Take in another training."""
        self._replicas.append(replica)

    def leave(self, replica: Replica) -> None:
        """Have no more to do with it."""
        self._replicas = [other for other in self._replicas if other is not replica]
        for waiting in (self._asked, self._refused, self._ended):
            waiting.pop(replica, None)
        self.forget()

    def forget(self) -> None:
        """Let go of all graphs, also those of the others, which are captured anew.

        They cannot outlive one another; see `CudaGraphs`.
        """
        self._programs = {}
        self.recorder.renew()

    def ask(self, replica: Replica, key: Hashable, work: Work) -> None:
        """Have the work of a replica that has settled done when it settles again, at the latest."""
        self._asked[replica] = (key, work)
        if len(self._asked) == len(self._replicas):
            self._do_all()

    def settle(self, replica: Replica) -> None:
        """Do what it has asked for, together with what the others have.

        Raises:
            RecordingError: if this work cannot be replayed; it has not been done.
            BaseException: the one that interrupted this work.
        """
        if replica in self._ended:
            raise self._ended[replica]
        if replica in self._asked:
            self._do_all()
        if replica in self._refused:
            raise RecordingError(self._refused.pop(replica))

    def do_alone(self, replica: Replica, key: Hashable, work: Work) -> None:
        """Do the work of a replica that has settled now, whatever the others have asked for.

        Raises:
            RecordingError: if it cannot be replayed; it has not been done.
        """
        self._do(key, {replica: work})
        self.settle(replica)

    def _do_all(self) -> None:
        asked, self._asked = self._asked, {}
        try:
            for key in dict.fromkeys(key for key, _ in asked.values()):
                together = [r for r in self._replicas if r in asked and asked[r][0] == key]
                self._do(key, {replica: asked[replica][1] for replica in together})
        except BaseException as error:
            self._ended |= dict.fromkeys(asked, error)
            raise

    def _do(self, key: Hashable, works: Mapping[Replica, Work]) -> None:
        """Do these replicas' work now, side by side; note for whom that is not possible."""
        replicas = tuple(works)
        proven = (key, replicas) in self._programs
        if not proven:
            self._programs[key, replicas] = Program(
                self.recorder.side_by_side(list(works.values())),
                self.recorder,
                lambda: [tensor for replica in replicas for tensor in replica.state()],
                self._device,
            )
        try:
            self._programs[key, replicas]()
            return
        except RecordingError as error:
            reason = str(error)  # the error itself would keep what the step has allocated
        if not proven:  # a graph that did not stand its proof is gone, and with it all others
            self._programs = {
                k: program for k, program in self._programs.items() if program.refused
            }
        if len(replicas) == 1:
            self._refused[replicas[0]] = reason
            return
        if not self.divided:
            self.divided = True
            log.warning(
                "%d replicas at once: %s; each has graphs of its own", len(replicas), reason
            )
        for replica in replicas:
            self._do(key, {replica: works[replica]})
