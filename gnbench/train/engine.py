"""One optimizer step, many times."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gnbench.schedules import Schedule
from gnbench.train.batches import EpochPlan, ResidentData
from gnbench.train.cuda_graphs import Pack, Snapshot, Work
from gnbench.train.devices import is_out_of_memory
from gnbench.train.distributed import Crew

log = logging.getLogger(__name__)

EVALUATION_CHUNK = 500  # images a forward pass; fixed, so that the test error is reproducible
STEPS_A_GRAPH = 16  # a signal waits for so many; a divisor of training.DIVERGENCE_CHECK


@dataclass(frozen=True, eq=False)
class Epoch:
    """What an epoch trains on: ``steps`` batches, the first of which is ``first_step`` of all."""

    data: ResidentData
    plan: EpochPlan
    batch_size: int
    first_step: int
    steps: int

    def span(self, at: int) -> tuple[int, int]:
        """Return the positions at which the ``at``-th batch begins and ends."""
        start = at * self.batch_size
        return start, min(start + self.batch_size, len(self.data))


class EagerEngine:
    """The loop anybody would write over resident data, and the reference for any faster one.

    Nothing in a step asks the device for a value: loss and errors add up in ``loss_sum``
    (float64) and ``wrong`` (int64) until `take_totals`. In a crew of several processes each takes
    its share of a batch, and the gradients are those of the mean over the whole batch.

    With ``compiled`` the network goes through torch.compile for its training steps. If that fails
    for a size of batch the training goes on without, and one line says why. Evaluation is never
    compiled.
    """

    kind = "eager"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        base_lr: float,
        schedule: Schedule,
        precision: str,
        device: torch.device,
        *,
        crew: Crew | None = None,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.crew = crew or Crew()
        self._network = model if self.crew.size == 1 else _averaging_gradients(model)
        self._compiled = _compile(model) if compiled else None
        self._compiled_sizes: set[int] = set()  # of batches, for which it has succeeded
        self.optimizer = optimizer
        self.base_lr = base_lr
        self.schedule = schedule
        self.device = device
        self.bf16 = precision == "bf16"
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def name(self) -> str:
        """What the engine is called in the record of a run."""
        return self.kind if self._compiled is None else f"{self.kind} compiled"

    @property
    def companions(self) -> int:
        """How many trainings of this process stand still while one of them does, this included."""
        return 1

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the ``step``-th step of the training (from 0)."""
        return self.base_lr * self.schedule(step)

    def train_steps(self, epoch: Epoch, at: int, most: int) -> int:
        """Take from the ``at``-th step of the epoch on at most ``most``; return how many it took.

        At least one, and here not more.
        """
        start, stop = epoch.span(at)
        # In float32, as a fused step on a GPU reads it.
        lr = float(np.float32(self.learning_rate(epoch.first_step + at)))
        inputs, labels = epoch.data.batch(epoch.plan, slice(*self.crew.share(start, stop)))
        # The processes' gradients are averaged: weighted so, every image counts the same.
        self._learn(inputs, labels, lr, weight=self.crew.size * len(labels) / (stop - start))
        return 1

    def evaluate(self, data: ResidentData) -> tuple[float, int]:
        """Return the summed loss and the number of errors over every image once, in eval mode.

        Several processes share the chunks, all with the running statistics of rank 0.
        """
        self._evaluate(data)
        return self.take_totals()

    @torch.inference_mode()
    def _evaluate(self, data: ResidentData) -> None:
        self.crew.adopt(list(self.model.buffers()))
        self.model.eval()
        first, every = self.crew.rank * EVALUATION_CHUNK, self.crew.size * EVALUATION_CHUNK
        for start in range(first, len(data), every):
            inputs, labels = data.chunk(start, start + EVALUATION_CHUNK)
            with self._autocast():
                logits = self.model(inputs)
            self._count(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)
        self.model.train()

    def totals(self) -> tuple[float, int]:
        """Return the summed loss and the number of errors so far; waits for the device."""
        return self.crew.add(self.loss_sum).item(), int(self.crew.add(self.wrong).item())

    def own_totals(self) -> tuple[float, int]:
        """Return of `totals` what this process has added; the others need not ask for theirs."""
        return self.loss_sum.item(), int(self.wrong.item())

    def take_totals(self) -> tuple[float, int]:
        """Return `totals` and start again from zero."""
        totals = self.totals()
        self.set_totals(0.0, 0)
        return totals

    def set_totals(self, loss_sum: float, wrong: int) -> None:
        """Have this process continue counting from these values."""
        self.loss_sum.fill_(loss_sum)
        self.wrong.fill_(wrong)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of model and optimizer."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of any engine: settings are the own optimizer's."""
        self.model.load_state_dict(state["model"])
        own = self.optimizer.state_dict()
        moments = copy.deepcopy(state["optimizer"]["state"])  # torch would take the very tensors
        self.optimizer.load_state_dict({**own, "state": moments})

    def close(self) -> None:
        """Let go of what only a training under way needs."""

    def _learn(self, inputs: Tensor, labels: Tensor, lr: float | Tensor, weight: float = 1) -> None:
        """Take a step on a batch: forward, loss, backward, optimizer, totals."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logits, loss = self._differentiate(inputs, labels, weight)
        self.optimizer.step()
        self._count(loss * len(labels), logits, labels)

    def _differentiate(
        self, inputs: Tensor, labels: Tensor, weight: float = 1
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the weighted loss; return logits and loss."""
        if self._compiled is None:
            return self._pass(self._network, inputs, labels, weight)
        if len(labels) in self._compiled_sizes:
            return self._pass(self._compiled, inputs, labels, weight)
        # Forwards and backwards are compiled one after the other, perhaps in several parts.
        before = Snapshot(list(self.model.buffers()), self.device)
        try:
            outcome = self._pass(self._compiled, inputs, labels, weight)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = " ".join(lines[:2]) or type(error).__name__
            log.warning("compile=true: %s; going on without", reason)
        else:
            self._compiled_sizes.add(len(labels))
            return outcome
        self._compiled = None
        before.restore()
        return self._pass(self._network, inputs, labels, weight)

    def _pass(
        self, network: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        with self._autocast():
            logits = network(inputs)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        (loss if weight == 1 else weight * loss).backward()  # type: ignore[no-untyped-call]
        return logits.detach(), loss.detach()

    def _count(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss_sum += loss_sum
        self.wrong += (logits.argmax(dim=1) != labels).sum()

    def _autocast(self) -> torch.autocast:
        # Every weight is used once a pass, and what a cache keeps a CUDA graph would not renew.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False
        )


class GraphEngine(EagerEngine):
    """Several steps as one CUDA graph, to the bit what `EagerEngine` computes.

    A step reads where it is, its images and its learning rate from tensors, so that it can be
    replayed. `STEPS_A_GRAPH` steps are one graph; what an epoch or a check leaves over, its last,
    partial batch and the evaluation have graphs of their own. Each is done plainly the first time,
    which warms up what it needs and is a step like any other. In a ``pack`` the steps of several
    trainings are replayed side by side. Where a step cannot be captured, as with an optimizer that
    counts in Python, the training goes on without (``kind`` then says so), and one line says why.
    """

    kind = "graph"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        base_lr: float,
        schedule: Schedule,
        precision: str,
        device: torch.device,
        *,
        pack: Pack,
        compiled: bool = False,
    ) -> None:
        super().__init__(model, optimizer, base_lr, schedule, precision, device, compiled=compiled)
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
        self._warm: set[Hashable] = set()  # what has been done before
        self._refused: tuple[str, Work] | None = None
        self._epoch: Epoch | None = None
        self._plan: EpochPlan  # of the epoch, at addresses that stay
        self._rates: Tensor  # of the steps of an epoch (float32)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # step within the epoch
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._pack = pack
        self._pack.join(self)

    @property
    def companions(self) -> int:
        """How many trainings of this process stand still while one of them does, this included."""
        return max(1, self._pack.size)

    def train_steps(self, epoch: Epoch, at: int, most: int) -> int:
        """Take steps as `EagerEngine.train_steps`, up to `STEPS_A_GRAPH` of them."""
        self._settle()
        if self.kind != GraphEngine.kind:
            return super().train_steps(epoch, at, most)
        if epoch is not self._epoch:
            self._enter(epoch, at)
        start, stop = epoch.span(at)
        whole = len(epoch.data) // epoch.batch_size - at  # batches left that are not partial
        steps = STEPS_A_GRAPH if min(most, whole) >= STEPS_A_GRAPH else 1

        def work() -> None:
            for _ in range(steps):
                self._step(epoch.data, epoch.batch_size, stop - start)

        key = ("train", steps, stop - start)
        if self._is_warm(key, work):
            self._pack.ask(self, key, work)
            self._take_back()
        return steps

    def evaluate(self, data: ResidentData) -> tuple[float, int]:
        """Return the summed loss and the number of errors as `EagerEngine.evaluate`."""
        self._settle()
        if self.kind != GraphEngine.kind:
            return super().evaluate(data)

        def work() -> None:
            self._evaluate(data)

        key = ("evaluate", data)
        if self._is_warm(key, work):
            self._pack.do(key, {self: work})
        return self.take_totals()

    def totals(self) -> tuple[float, int]:
        """Return the summed loss and the number of errors so far; waits for the device."""
        self._settle()
        return super().totals()

    def own_totals(self) -> tuple[float, int]:
        """Return `totals`: there is but this process."""
        return self.totals()

    def set_totals(self, loss_sum: float, wrong: int) -> None:
        """Continue counting from these values."""
        self._settle()
        super().set_totals(loss_sum, wrong)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of model and optimizer."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, with fresh graphs: the moments have new addresses."""
        self._settle()
        super().load_state_dict(state)
        self._epoch = None
        self._warm.clear()
        self._pack.forget(self)

    def close(self) -> None:
        """Let go of the graphs and their memory: they and this engine hold each other."""
        self._pack.leave(self)
        self._epoch = None

    def state(self) -> list[Tensor]:
        """Return all that a step or an evaluation changes."""
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        moments = [value for value in values if isinstance(value, Tensor)]
        model = [*self.model.parameters(), *self.model.buffers()]
        return [*model, *moments, self.loss_sum, self.wrong, self._at, self._lr]

    def refuse(self, reason: str, work: Work) -> None:
        """Learn from the pack that this work has to be done without a graph."""
        self._refused = reason, work

    def _settle(self) -> None:
        """Have all steps done by now that `train_steps` said it took."""
        if self.kind == GraphEngine.kind:
            self._pack.settle(self)
            self._take_back()

    def _take_back(self) -> None:
        """Do what the pack has refused to, and go on without it."""
        if self._refused is not None:
            (reason, work), self._refused = self._refused, None
            self._fall_back(reason)
            work()

    def _is_warm(self, key: Hashable, work: Work) -> bool:
        """Tell whether the work can be recorded; if not yet, or not at all, do it."""
        if key in self._warm:
            return True
        self._pack.recorder.run(work)
        self._warm.add(key)
        if self._counts_in_python():
            self._fall_back("the optimizer keeps numbers of Python's")
        return False

    def _fall_back(self, reason: str) -> None:
        log.warning("engine=graph: %s; going on with engine=%s", reason, EagerEngine.kind)
        self.close()
        self.kind = EagerEngine.kind
        if self.device.type == "cuda":
            gc.collect()  # what an attempt has left
            torch.cuda.empty_cache()

    def _counts_in_python(self) -> bool:
        """Tell whether the optimizer's state has numbers that no graph renews."""
        values = (v for state in self.optimizer.state.values() for v in state.values())
        return any(isinstance(value, int | float) for value in values)

    def _enter(self, epoch: Epoch, at: int) -> None:
        """Put into place what the steps of the epoch read."""
        rates = [self.learning_rate(epoch.first_step + step) for step in range(epoch.steps)]
        if self._epoch is None:
            steps = math.ceil(len(epoch.data) / epoch.batch_size)
            self._rates = torch.zeros(steps, dtype=torch.float32, device=self.device)
            self._plan = epoch.plan
        else:
            self._plan.copy_(epoch.plan)
        self._rates[: epoch.steps] = torch.tensor(rates, dtype=torch.float32)
        self._at.fill_(at)
        self._epoch = epoch

    def _step(self, data: ResidentData, batch_size: int, count: int) -> None:
        """Take the step that ``_at`` says, on ``count`` images, and count on."""
        positions = self._at * batch_size + torch.arange(count, device=self.device)
        inputs, labels = data.batch(self._plan, positions)
        self._lr.copy_(self._rates[self._at][0])
        self._learn(inputs, labels, self._lr)
        self._at += 1


def _compile(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Have torch compile the network at its first use, anew for every size of a batch."""
    torch.compiler.reset()  # or the runs before this one would count against a limit of torch's
    compiled: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False)
    return compiled


def _averaging_gradients(model: nn.Module) -> DistributedDataParallel:
    """Wrap ``model`` so that the processes average their gradients; buffers stay each one's own."""
    # Newer releases of torch have another word for it.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, **options)
