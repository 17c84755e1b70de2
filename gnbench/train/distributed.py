"""One run on several processes, started by torchrun: who this process is, and what all agree on."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who this process is must be known without torch, too
    import torch
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

AGREE_SECONDS = 1.0  # between two times that the processes ask each other whether to stop
AGREE_STEPS = 128  # but never more steps than these


class ProcessGroup:
    """The processes that train a run together: ``size`` of them, this one being ``rank``.

    Rank 0 leads: it alone reads and writes the run directory. A process alone is a group of one,
    which never communicates.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._others_wait = size > 1
        self._until_agreement = 1  # steps
        self._interval = 1  # steps between two agreements
        self._last_agreement = time.monotonic()

    @property
    def leads(self) -> bool:
        """Whether this process reads and writes the run directory."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """Return this process's part of the positions ``start`` to ``stop``: as equal as can be."""
        each, more = divmod(stop - start, self.size)
        begin = start + self.rank * each + min(self.rank, more)
        return begin, begin + each + (self.rank < more)

    def begin_training(self, state: Any) -> None:
        """By rank 0: have the others train too, from ``state`` (None: from the start)."""
        self._tell_the_others((True, state))

    def skip_training(self, record: Any) -> None:
        """By rank 0: give the record of the run to those who still wait to begin, if they do."""
        self._tell_the_others((False, record))

    def wait_to_begin(self) -> tuple[bool, Any]:
        """By the others: return whether to train, and rank 0's state or record."""
        import torch.distributed as dist

        message: list[Any] = [None]
        dist.broadcast_object_list(message, src=0)
        train, content = message[0]
        return train, content

    def _tell_the_others(self, message: tuple[bool, Any]) -> None:
        if self._others_wait:
            import torch.distributed as dist

            self._others_wait = False
            dist.broadcast_object_list([message], src=0)

    def gather(self, item: Any) -> list[Any]:
        """Return what every process passes, by rank."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def add(self, values: Tensor) -> Tensor:
        """Return the sum of what every process passes."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        total = values.clone()
        dist.all_reduce(total)
        return total

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def agree(self, stop: int | None, save: bool) -> tuple[int | None, bool]:
        """Return the signal that any process received, and whether rank 0 wants to save.

        To be called after every step. Alone, the answer is immediate; else the processes ask each
        other about every `AGREE_SECONDS`, all after the same step.
        """
        if self.size == 1:
            return stop, save
        self._until_agreement -= 1
        if self._until_agreement:
            return None, False
        answers = self.gather((stop, save, time.monotonic() - self._last_agreement))
        # Rank 0's clock counts, so that all take the same number of steps to the next agreement.
        _, save, elapsed = answers[0]
        steps = round(self._interval * AGREE_SECONDS / max(elapsed, 1e-6))
        self._interval = self._until_agreement = max(1, min(AGREE_STEPS, steps))
        self._last_agreement = time.monotonic()
        return next((number for number, *_ in answers if number is not None), None), save


def world_size() -> int:
    """Return how many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among those on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return how many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def process_group(device: torch.device) -> ProcessGroup:
    """Return the group of this process, meeting the others at the first call.

    They communicate by NCCL on GPUs and by gloo on CPUs.
    """
    if world_size() == 1:
        return ProcessGroup()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # They wait for rank 0 while it waits for a run's lock, or for the data.
        patience = timedelta(days=7)
        store, _, _ = next(rendezvous("env://", timeout=patience))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=patience,
            store=_store_of_the_living(store),
            rank=rank(),
            world_size=world_size(),
        )
        atexit.register(dist.destroy_process_group)
    return ProcessGroup(rank(), world_size())


def abandon() -> None:
    """Have this process end without the others, who may be waiting for it.

    To destroy a group of NCCL takes all of them, so that torchrun would never see one end that an
    error has ended, and never stop the others.
    """
    if world_size() > 1:
        import torch.distributed as dist

        atexit.unregister(dist.destroy_process_group)


def _store_of_the_living(store: Store) -> Store:
    """Return a part of ``store`` that only the processes which are alive now know.

    torchrun keeps the store when it starts processes again. One of them could find there the
    address of one that was killed, and fail to connect to it. torchrun's count of restarts cannot
    name the part, since every machine has a count of its own. So each process other than rank 0
    registers under a fresh name, rank 0 answers to that name with the name of the part, and waits
    until every rank has confirmed it: a name left by a dead process confirms nothing.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    name = uuid.uuid4().hex
    if rank():
        store.set(f"present/{rank()}", name)
        part = store.get(f"answer/{name}").decode()  # waits
        store.set(f"answered/{part}/{rank()}", "")
        return PrefixStore(part, store)
    awaited = set(range(1, world_size()))
    while awaited:
        for other in awaited:
            if store.check([f"present/{other}"]):
                store.set(f"answer/{store.get(f'present/{other}').decode()}", name)
        time.sleep(0.01)
        awaited = {other for other in awaited if not store.check([f"answered/{name}/{other}"])}
    return PrefixStore(name, store)
