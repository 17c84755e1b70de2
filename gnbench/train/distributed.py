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

AGREE_SECONDS = 1.0  # between two times that the processes tell each other whether to stop
AGREE_STEPS = 128  # but never more steps than these


class Crew:
    """The processes that train a run together: ``size`` of them, this one being ``rank``.

    Rank 0 leads: it alone reads and writes the run directory. A crew of one asks nobody.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._begun = False
        self._countdown = 1
        self._last = time.monotonic()
        self._interval = 1

    @property
    def leads(self) -> bool:
        """Whether this process reads and writes the run directory."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """Return this process's part of the positions ``start`` to ``stop``: as equal as can be."""
        each, more = divmod(stop - start, self.size)
        begin = start + self.rank * each + min(self.rank, more)
        return begin, begin + each + (self.rank < more)

    def begin(self, state: Any) -> None:
        """Have the others train too, from ``state`` (None: from the start)."""
        self._tell((True, state))

    def dismiss(self, record: Any) -> None:
        """Send away those who still wait for the word to begin, with the record of the run."""
        if not self._begun:
            self._tell((False, record))

    def orders(self) -> tuple[bool, Any]:
        """Wait for rank 0; return whether to train, and the state or the record."""
        order: tuple[bool, Any] = self._tell(None)
        return order

    def _tell(self, message: Any) -> Any:
        self._begun = True
        if self.size == 1:
            return message
        import torch.distributed as dist

        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

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

    def adopt(self, buffers: list[Tensor]) -> None:
        """Overwrite ``buffers`` by those of rank 0."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for buffer in buffers:
            dist.broadcast(buffer, src=0)

    def agree(self, stop: int | None, save: bool) -> tuple[int | None, bool]:
        """Return the signal that any process received, and whether rank 0 wants to save.

        To be called after every step. Alone, the answer is immediate; else the processes ask each
        other about every `AGREE_SECONDS`, all after the same step.
        """
        if self.size == 1:
            return stop, save
        self._countdown -= 1
        if self._countdown:
            return None, False
        answers = self.gather((stop, save, time.monotonic() - self._last))
        _, save, elapsed = answers[0]
        # Rank 0's clock counts, so that all count down from the same number.
        pace = AGREE_SECONDS / max(elapsed, 1e-6)
        self._interval = max(1, min(AGREE_STEPS, round(self._interval * pace)))
        self._countdown, self._last = self._interval, time.monotonic()
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


def crew(device: torch.device) -> Crew:
    """Return the crew of this process, meeting the others at the first call.

    They talk by NCCL on GPUs and by gloo on CPUs.
    """
    if world_size() == 1:
        return Crew()
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
            store=_of_the_living(store),
            rank=rank(),
            world_size=world_size(),
        )
        atexit.register(dist.destroy_process_group)
    return Crew(rank(), world_size())


def _of_the_living(store: Store) -> Store:
    """Return a part of ``store`` that only the processes which are alive now know.

    torchrun keeps the store when it starts processes again, so that one of them can find there the
    address of one that was killed, and fail to connect to it. Its count of restarts is no name for
    that part: every machine has a count of its own.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    name = uuid.uuid4().hex
    if rank():
        store.set(f"present/{rank()}", name)
        answer = store.get(f"answer/{name}").decode()  # waits
        store.set(f"answered/{answer}/{rank()}", "")
        return PrefixStore(answer, store)
    awaited = set(range(1, world_size()))
    while awaited:
        for other in awaited:
            if store.check([f"present/{other}"]):
                store.set(f"answer/{store.get(f'present/{other}').decode()}", name)
        time.sleep(0.01)
        awaited = {other for other in awaited if not store.check([f"answered/{name}/{other}"])}
    return PrefixStore(name, store)
