"""Epochs: train, evaluate, yield one row each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gnbench.train.batches import ResidentData, draw_epoch
from gnbench.train.engine import Epoch
from gnbench.train.graph_engine import Engine
from gnbench.train.row import LAST_EPOCHS, Row

TESTED = ("test_loss", "test_error", "test_wrong", "test_total")
DIVERGENCE_CHECK = 128  # steps between two looks at the loss, each of which waits for the device


@dataclass
class Position:
    """How far a training has come; with the engine's totals all that a resume must know."""

    epoch: int = 0  # epochs completed
    step: int = 0  # steps taken since the start
    epoch_step: int = 0  # steps taken in the current epoch
    seen: int = 0  # images seen in the current epoch
    epoch_seconds: float = 0.0  # spent on the current epoch


class Training:
    """A training that can stop after any step and continue from its `state_dict`.

    A step takes ``batch_size`` images, shared by the processes of the engine's group;
    ``drop_last`` leaves out a last, partial batch. The order of the images follows from ``seed``
    and the epoch; ``order`` and ``block`` as for `draw_epoch`.
    """

    def __init__(
        self,
        engine: Engine,
        train: ResidentData,
        test: ResidentData,
        validation: ResidentData | None = None,
        *,
        batch_size: int,
        drop_last: bool,
        total_steps: int,
        seed: int,
        augmentation: str,
        order: str = "shuffled",
        block: int | None = None,
        evaluate_every: int = 1,
    ) -> None:
        self.engine = engine
        self.train = train
        self.test = test
        self.validation = validation
        self.evaluate_every = evaluate_every
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch(len(train), batch_size, drop_last)
        self.total_steps = total_steps
        self.seed = seed
        self.augmentation = augmentation
        self.order = order
        self.block = block
        self.position = Position()
        self.diverged = False

    def run(self) -> Iterator[Row | None]:
        """Train to the end; yield None after every engine call and a `Row` after every epoch.

        At each yield the state is whole, and nothing of it has been looked at since the engine was
        called. A loss that is not finite ends the training with the row of that epoch, and sets
        ``diverged``.
        """
        while not self._is_over():
            at = self.position
            epoch = self._begin_epoch()
            resumed_after = at.epoch_seconds
            started = time.perf_counter()
            while not self._ends(epoch):
                until_check = DIVERGENCE_CHECK - at.step % DIVERGENCE_CHECK
                most = min(until_check, epoch.steps - at.epoch_step)
                taken = self.engine.train_steps(epoch, at.epoch_step, most)
                at.step += taken
                at.epoch_step += taken
                at.seen = epoch.span(at.epoch_step - 1)[1]
                at.epoch_seconds = resumed_after + time.perf_counter() - started
                yield None
            at.epoch_seconds = resumed_after + time.perf_counter() - started
            yield self._end_epoch()

    def activation_bytes(self) -> int | None:
        """Return what a forward pass of this training holds for the backward pass, in bytes.

        None in a group of several processes, whose layers may have to exchange something.
        """
        if self.engine.process_group.size > 1:
            return None
        size = self.engine.images_a_pass or self.batch_size
        return self.engine.activation_bytes(*self.train.chunk(0, size))

    def _is_over(self) -> bool:
        at_an_end = self.position.epoch_step == 0
        return self.diverged or (at_an_end and self.position.step >= self.total_steps)

    def _ends(self, epoch: Epoch) -> bool:
        """Tell whether the epoch's steps have been taken or the loss, looked at, is not finite."""
        all_taken = self.position.epoch_step == epoch.steps
        if all_taken or self.position.step % DIVERGENCE_CHECK == 0:
            self.diverged = not math.isfinite(self.engine.totals()[0])
        return all_taken or self.diverged

    def _begin_epoch(self) -> Epoch:
        at = self.position
        plan = draw_epoch(
            self.seed,
            at.epoch,
            len(self.train),
            self.augmentation,
            self.order,
            self.block,
            self.train.labels,
        )
        first_step = at.step - at.epoch_step
        return Epoch(
            self.train,
            plan.to(self.engine.device),
            self.batch_size,
            first_step,
            steps=min(self.steps_per_epoch, self.total_steps - first_step),
        )

    def _end_epoch(self) -> Row:
        at = self.position
        loss_sum, wrong = self.engine.totals()
        trained = at.epoch_seconds
        started = time.perf_counter()
        measured: dict[str, Any] = dict.fromkeys(TESTED)
        if self.evaluates(at.epoch + 1):
            measured = self._measured("test", self.test)
            if self.validation is not None:
                measured |= self._measured("val", self.validation)
        else:
            self.engine.set_totals(0.0, 0)
        row = Row(
            epoch=at.epoch + 1,
            step=at.step,
            lr=self.engine.learning_rate(at.step - 1),
            train_loss=loss_sum / at.seen,
            train_error=100 * wrong / at.seen,
            images_per_second=at.seen / trained,
            seconds=trained + time.perf_counter() - started,
            **measured,
        )
        self.position = Position(epoch=at.epoch + 1, step=at.step)
        return row

    def evaluates(self, epoch: int) -> bool:
        """Tell whether an epoch (from 1) ends with an evaluation: the last five always do."""
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        return self.diverged or epoch % self.evaluate_every == 0 or epoch > epochs - LAST_EPOCHS

    def _measured(self, name: str, data: ResidentData) -> dict[str, Any]:
        loss_sum, wrong = self.engine.evaluate(data)
        return {
            f"{name}_loss": loss_sum / len(data),
            f"{name}_error": 100 * wrong / len(data),
            f"{name}_wrong": wrong,
            f"{name}_total": len(data),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs, as tensors and plain values.

        What each process keeps to itself is gathered, so all of a group must call this together.
        """
        cuda = self.engine.device.type == "cuda"
        loss_sum, wrong = self.engine.own_totals()
        own = {
            "loss_sum": loss_sum,
            "wrong": wrong,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.engine.device) if cuda else None,
        }
        return {
            "position": asdict(self.position),
            "diverged": self.diverged,
            **self.engine.state_dict(),
            "processes": self.engine.process_group.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of a training with the same settings."""
        self.position = Position(**state["position"])
        self.diverged = state["diverged"]
        self.engine.load_state_dict(state)
        own = state["processes"][self.engine.process_group.rank]
        self.engine.set_totals(own["loss_sum"], own["wrong"])
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own["cuda_rng"], self.engine.device)


def steps_per_epoch(images: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the number of steps in an epoch."""
    return images // batch_size if drop_last else math.ceil(images / batch_size)
