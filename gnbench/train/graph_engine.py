"""Steps as CUDA graphs: a fast engine around the plain one, which takes over where graphs fail."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from gnbench.errors import RecordingError
from gnbench.train.batch_counts import batch_counts, counted_together
from gnbench.train.batches import EpochPlan, ResidentData
from gnbench.train.cuda_graphs import Work, empty_cache
from gnbench.train.engine import EagerEngine, Epoch
from gnbench.train.replicas import ReplicaGroup

log = logging.getLogger(__name__)

STEPS_A_GRAPH = 16  # a signal waits for so many; a divisor of loop.DIVERGENCE_CHECK


class GraphEngine:
    """Replays the steps of the ``plain`` engine, and comes to the same bits.

    A step reads its place in the epoch, its images and its learning rate from tensors, so that it
    can be replayed. `STEPS_A_GRAPH` steps are one graph; what an epoch or a check leaves over, its
    last, partial batch and the evaluation have graphs of their own. Each is done plainly the first
    time, which warms up what it needs and is a step like any other. In a ``group`` of several the
    steps of all are replayed side by side. Where a step cannot be captured, as with an optimizer
    that counts in Python, one line says why, and from then on the plain engine does everything.

    Methods that `EagerEngine` has too do here what they do there, after the steps taken so far.
    """

    def __init__(self, plain: EagerEngine, group: ReplicaGroup) -> None:
        self.plain = plain
        self.model = plain.model
        self.device = plain.device
        self.images_a_pass = plain.images_a_pass
        self.process_group = plain.process_group
        self.learning_rate = plain.learning_rate
        for settings in plain.optimizer.param_groups:
            if "capturable" in settings:
                settings["capturable"] = True
        self._group: ReplicaGroup | None = group  # None: the plain engine has taken over
        self._asked: Work | None = None  # of the group, and perhaps not done yet
        self._warm: set[Hashable] = set()  # what has been done before
        self._epoch: Epoch | None = None
        self._plan: EpochPlan  # of the epoch, at addresses that stay
        self._rates: Tensor  # of the steps of an epoch (float32)
        self._at = torch.zeros(1, dtype=torch.int64, device=self.device)  # step within the epoch
        self._counts = [] if plain.is_compiled else batch_counts(plain.model)
        group.join(self)

    @property
    def name(self) -> str:
        plain = self.plain.name
        return plain if self._group is None else plain.replace("eager", "graph")

    @property
    def companions(self) -> int:
        return 1 if self._group is None else max(1, self._group.size)

    def train_steps(self, epoch: Epoch, at: int, most: int) -> int:
        """Take `STEPS_A_GRAPH` steps if there are so many whole batches, else one."""
        self._settle()
        if self._group is None:
            return self.plain.train_steps(epoch, at, most)
        if epoch is not self._epoch:
            self._enter(epoch, at)
        start, stop = epoch.span(at)
        whole = len(epoch.data) // epoch.batch_size - at  # batches left that are not partial
        steps = STEPS_A_GRAPH if min(most, whole) >= STEPS_A_GRAPH else 1

        def work() -> None:
            self._take(steps, epoch.data, epoch.batch_size, stop - start)

        key = ("train", steps, stop - start)
        if self._is_warm(self._group, key, work):
            self._asked = work
            self._group.ask(self, key, work)
        return steps

    def evaluate(self, data: ResidentData) -> tuple[float, int]:
        self._settle()
        group = self._group
        if group is None:
            return self.plain.evaluate(data)

        def work() -> None:
            self.plain.evaluate_into_totals(data)

        key = ("evaluate", data)
        if self._is_warm(group, key, work):
            self._replay(lambda: group.do_alone(self, key, work), work)
        return self.plain.take_totals()

    def activation_bytes(self, inputs: Tensor, labels: Tensor) -> int:
        self._settle()
        return self.plain.activation_bytes(inputs, labels)

    def correct(self, data: ResidentData) -> Tensor:
        self._settle()
        return self.plain.correct(data)

    def totals(self) -> tuple[float, int]:
        self._settle()
        return self.plain.totals()

    def own_totals(self) -> tuple[float, int]:
        self._settle()
        return self.plain.own_totals()

    def set_totals(self, loss_sum: float, wrong: int) -> None:
        self._settle()
        self.plain.set_totals(loss_sum, wrong)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return self.plain.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, with fresh graphs: the moments have new addresses."""
        self._settle()
        self.plain.load_state_dict(state)
        self._epoch = None
        self._warm.clear()
        if self._group is not None:
            self._group.forget()

    def close(self) -> None:
        """Let go of the graphs and their memory: they and this engine hold each other."""
        if self._group is not None:
            self._group.leave(self)
        self._epoch = self._asked = None

    def state(self) -> list[Tensor]:
        """Return all that a step or an evaluation changes."""
        values = [v for state in self.plain.optimizer.state.values() for v in state.values()]
        moments = [value for value in values if isinstance(value, Tensor)]
        model = [*self.model.parameters(), *self.model.buffers()]
        return [*model, *moments, self.plain.loss_sum, self.plain.wrong, self._at]

    def _settle(self) -> None:
        """Have all steps done by now that `train_steps` said it took."""
        group = self._group
        if group is not None and self._asked is not None:
            self._replay(lambda: group.settle(self), self._asked)
            self._asked = None

    def _replay(self, replay: Callable[[], None], work: Work) -> None:
        """Replay the work; if that is not possible step aside and have it done plainly."""
        try:
            replay()
            return
        except RecordingError as error:
            reason = str(error)  # the error itself would keep what the step has allocated
        self._step_aside(reason)
        work()

    def _is_warm(self, group: ReplicaGroup, key: Hashable, work: Work) -> bool:
        """Tell whether the work can be recorded; if not yet, or not at all, do it."""
        if key in self._warm:
            return True
        group.recorder.run(work)
        self._warm.add(key)
        values = (v for state in self.plain.optimizer.state.values() for v in state.values())
        if any(isinstance(value, int | float) for value in values):
            self._step_aside("the optimizer keeps numbers of Python's")  # no graph renews them
        return False

    def _step_aside(self, reason: str) -> None:
        log.warning("engine=graph: %s; going on with engine=eager", reason)
        self.close()
        self._group = None
        if self.device.type == "cuda":
            gc.collect()  # what an attempt has left
            empty_cache()

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

    def _take(self, steps: int, data: ResidentData, batch_size: int, count: int) -> None:
        """Take steps from the one that ``_at`` says on, each on ``count`` images, and count on."""
        numbers = self._at + torch.arange(steps, device=self.device)
        rates = self._rates[numbers]
        starts = numbers[:, None] * batch_size
        positions = starts + torch.arange(count, device=self.device)
        with counted_together(self._counts):
            for rate, where in zip(rates.unbind(), positions.unbind(), strict=True):
                inputs, labels = data.batch(self._plan, where)
                self.plain.train_step(inputs, labels, rate)
        self._at += steps


Engine = EagerEngine | GraphEngine
