"""One optimizer step, many times."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gnbench.batches import EpochPlan, ResidentData
from gnbench.distributed import Crew
from gnbench.schedules import Schedule

EVALUATION_CHUNK = 500  # images a forward pass; fixed, so that the test error is reproducible


class EagerEngine:
    """The loop anybody would write over resident data, and the reference for any faster one.

    Nothing in a step asks the device for a value: loss and errors add up in ``loss_sum``
    (float64) and ``wrong`` (int64) until `take_totals`. In a crew of several processes each takes
    its share of a batch, and the gradients are those of the mean over the whole batch.
    """

    name = "eager"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        base_lr: float,
        schedule: Schedule,
        precision: str,
        device: torch.device,
        crew: Crew | None = None,
    ) -> None:
        self.model = model
        self.crew = crew or Crew()
        self._network = model if self.crew.size == 1 else _averaging_gradients(model)
        self.optimizer = optimizer
        self.base_lr = base_lr
        self.schedule = schedule
        self.device = device
        self.bf16 = precision == "bf16"
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the ``step``-th step of the training (from 0)."""
        return self.base_lr * self.schedule(step)

    def train_step(
        self, data: ResidentData, plan: EpochPlan, start: int, stop: int, step: int
    ) -> None:
        """Take step ``step`` on the positions ``start`` to ``stop`` of the epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        inputs, labels = data.batch(plan, *self.crew.share(start, stop))
        with self._autocast():
            logits = self._network(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        # The processes' gradients are averaged: weighted so, every image counts the same.
        weight = self.crew.size * len(labels) / (stop - start)
        (loss if weight == 1 else weight * loss).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._count(loss.detach() * len(labels), logits.detach(), labels)

    @torch.inference_mode()
    def evaluate(self, data: ResidentData) -> tuple[float, int]:
        """Return the summed loss and the number of errors over every image once, in eval mode.

        Several processes share the chunks, all with the running statistics of rank 0.
        """
        self.crew.adopt(list(self.model.buffers()))
        self.model.eval()
        first, every = self.crew.rank * EVALUATION_CHUNK, self.crew.size * EVALUATION_CHUNK
        for start in range(first, len(data), every):
            inputs, labels = data.chunk(start, start + EVALUATION_CHUNK)
            with self._autocast():
                logits = self.model(inputs)
            self._count(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)
        self.model.train()
        return self.take_totals()

    def totals(self) -> tuple[float, int]:
        """Return the summed loss and the number of errors so far; waits for the device."""
        return self.crew.add(self.loss_sum).item(), int(self.crew.add(self.wrong).item())

    def take_totals(self) -> tuple[float, int]:
        """Return `totals` and start again from zero."""
        totals = self.totals()
        self.set_totals(0.0, 0)
        return totals

    def set_totals(self, loss_sum: float, wrong: int) -> None:
        """Have this process continue counting from these values."""
        self.loss_sum.fill_(loss_sum)
        self.wrong.fill_(wrong)

    def _count(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss_sum += loss_sum
        self.wrong += (logits.argmax(dim=1) != labels).sum()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def _averaging_gradients(model: nn.Module) -> DistributedDataParallel:
    """Wrap ``model`` so that the processes average their gradients; buffers stay each one's own."""
    # Newer releases of torch have another word for it.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, **options)
