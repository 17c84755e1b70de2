"""One optimizer step, many times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.batches import EpochPlan, ResidentData
from gnbench.schedules import Schedule

EVALUATION_CHUNK = 500  # images a forward pass; fixed, so that the test error is reproducible


class EagerEngine:
    """The loop anybody would write over resident data, and the reference for any faster one.

    Nothing in a step asks the device for a value: loss and errors add up in ``loss_sum``
    (float64) and ``wrong`` (int64) until `take_totals`.
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
    ) -> None:
        self.model = model
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
        inputs, labels = data.batch(plan, start, stop)
        with self._autocast():
            logits = self.model(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._count(loss.detach() * len(labels), logits.detach(), labels)

    @torch.inference_mode()
    def evaluate(self, data: ResidentData) -> tuple[float, int]:
        """Return the summed loss and the number of errors over every image once, in eval mode."""
        self.model.eval()
        for start in range(0, len(data), EVALUATION_CHUNK):
            inputs, labels = data.chunk(start, start + EVALUATION_CHUNK)
            with self._autocast():
                logits = self.model(inputs)
            self._count(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)
        self.model.train()
        return self.take_totals()

    def totals(self) -> tuple[float, int]:
        """Return the summed loss and the number of errors so far; waits for the device."""
        return self.loss_sum.item(), int(self.wrong.item())

    def take_totals(self) -> tuple[float, int]:
        """Return `totals` and start again from zero."""
        totals = self.totals()
        self.set_totals(0.0, 0)
        return totals

    def set_totals(self, loss_sum: float, wrong: int) -> None:
        """Continue counting from these values."""
        self.loss_sum.fill_(loss_sum)
        self.wrong.fill_(wrong)

    def _count(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss_sum += loss_sum
        self.wrong += (logits.argmax(dim=1) != labels).sum()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
