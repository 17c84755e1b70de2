"""The step written out, taken one at a time; and the evaluation."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gnbench.schedules import Schedule
from gnbench.train.batches import EpochPlan, ResidentData
from gnbench.train.cuda_graphs import Snapshot
from gnbench.train.devices import is_out_of_memory
from gnbench.train.distributed import ProcessGroup

log = logging.getLogger(__name__)

Network = Callable[[Tensor], Tensor]


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
    """The loop that anybody would write over resident data, and the reference for a faster one.

    Nothing in a step asks the device for a value: loss and errors add up in ``loss_sum``
    (float64) and ``wrong`` (int64). In a group of several processes each takes its share of a
    batch, and the gradients are those of the mean over the whole batch. A process whose share is
    more than ``images_a_pass`` takes it in several forward passes, whose gradients add up.

    With ``compiled`` the network goes through torch.compile for its training steps. If that fails
    for a size of batch the training goes on without, and one line says why. Evaluation is never
    compiled.
    """

    companions = 1  # how many trainings of this process stand still while one does, this included

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        base_lr: float,
        schedule: Schedule,
        precision: str,
        device: torch.device,
        *,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
        images_a_pass: int | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.base_lr = base_lr
        self.schedule = schedule
        self.precision = precision
        self.images_a_pass = images_a_pass
        self.device = device
        self.process_group = process_group or ProcessGroup()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self._network = model if self.process_group.size == 1 else _averaging_gradients(model)
        self._compiled = _compile(model) if compiled else None
        self._compiled_sizes: set[int] = set()  # of batches, for which it has succeeded

    @property
    def name(self) -> str:
        """What the engine is called in the record of a run."""
        return "eager" if self._compiled is None else "eager compiled"

    @property
    def is_compiled(self) -> bool:
        """Whether the network goes through torch.compile."""
        return self._compiled is not None

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the ``step``-th step of the training (from 0)."""
        return self.base_lr * self.schedule(step)

    def train_steps(self, epoch: Epoch, at: int, most: int) -> int:
        """Take at most ``most`` steps, from the ``at``-th of the epoch on; return how many: 1."""
        start, stop = epoch.span(at)
        inputs, labels = epoch.data.batch(epoch.plan, slice(*self.process_group.share(start, stop)))
        # In float32, as a fused step on a GPU reads it.
        lr = float(np.float32(self.learning_rate(epoch.first_step + at)))
        # The processes' gradients are averaged: weighted so, every image counts the same.
        weight = self.process_group.size * len(labels) / (stop - start)
        self.train_step(inputs, labels, lr, weight)
        return 1

    def train_step(
        self, inputs: Tensor, labels: Tensor, lr: float | Tensor, weight: float = 1
    ) -> None:
        """Take a step on a batch: inputs n,C,H,W, labels n; the loss times ``weight`` counts."""
        size = self.images_a_pass or len(labels)
        # Before the gradients are cleared: a trial of the compiled network leaves some.
        passes = list(zip(torch.split(inputs, size), torch.split(labels, size), strict=True))
        networks = [self._choose_network(*images) for images in passes]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        for network, (images, classes) in zip(networks, passes, strict=True):
            last = images is passes[-1][0]
            with self._averaging(last):
                with self._autocast():
                    logits = network(images)
                loss = F.cross_entropy(logits.float(), classes)
                share = weight * len(classes) / len(labels)  # 1, exactly, for a whole batch
                (loss if share == 1 else share * loss).backward()  # type: ignore[no-untyped-call]
            self._count(loss.detach() * len(classes), logits.detach(), classes)
        self.optimizer.step()

    def evaluate(self, data: ResidentData) -> tuple[float, int]:
        """Return the summed loss and the number of errors over every image once, in eval mode.

        The totals start again from zero. Several processes share the chunks, all with the running
        statistics of rank 0.
        """
        self.evaluate_into_totals(data)
        return self.take_totals()

    @torch.inference_mode()
    def evaluate_into_totals(self, data: ResidentData) -> None:
        """Evaluate, and leave the outcome in the totals in place of that of the training."""
        self.set_totals(0.0, 0)
        self.process_group.copy_from_first(list(self.model.buffers()))
        self.model.eval()
        rank, processes = self.process_group.rank, self.process_group.size
        size = data.evaluation_chunk
        for start in range(rank * size, len(data), processes * size):
            inputs, labels = data.chunk(start, start + size)
            with self._autocast():
                logits = self.model(inputs)
            self._count(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)
        self.model.train()

    def correct(self, data: ResidentData) -> Tensor:
        """Return for every image in its order whether the network is right (bool, on the CPU).

        In eval mode, by this process alone and with its buffers.
        """
        self.model.eval()
        correct = find_correct(self.model, data, self.precision)
        self.model.train()
        return correct

    def activation_bytes(self, inputs: Tensor, labels: Tensor) -> int:
        """Return the bytes that a forward pass on a batch holds for the backward pass.

        Counted by what autograd saves (``torch.autograd.graph.saved_tensors_hooks``), each storage
        once, without weights and buffers: exact on any device, before what kernels need besides.
        Statistics and random numbers are afterwards as before.
        """
        before = Snapshot(list(self.model.buffers()), self.device)
        own = {t.untyped_storage().data_ptr() for t in self.model.state_dict().values()}
        held: dict[int, torch.UntypedStorage] = {}  # the storages stay, or an address comes twice

        weights = [p for p in self.model.parameters() if p.ndim > 1]
        shapes = {tuple(w.shape) for w in weights} | {tuple(w.shape[::-1]) for w in weights}

        def pack(tensor: Tensor) -> Tensor:
            # Detached, or it would hold the whole graph for good, in a circle that no collector
            # sees, and with it the stream of this pass, off which no step is captured.
            storage = tensor.untyped_storage()
            # With autocast also the copy of a weight in bf16.
            cast = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
            if storage.data_ptr() not in own and not cast:
                held[storage.data_ptr()] = storage
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with self._autocast():
                logits = self.model(inputs)
            F.cross_entropy(logits.float(), labels.clone())  # not a view of all labels there are
        before.restore()
        return sum(storage.nbytes() for storage in held.values())

    def take_totals(self) -> tuple[float, int]:
        """Return `totals` and start again from zero."""
        totals = self.totals()
        self.set_totals(0.0, 0)
        return totals

    def totals(self) -> tuple[float, int]:
        """Return summed loss and number of errors of the steps so far; waits for the device."""
        return _read(self.process_group.add(self._both()))

    def own_totals(self) -> tuple[float, int]:
        """Return of `totals` what this process has added, without asking the others."""
        return _read(self._both())

    def _both(self) -> Tensor:
        """Return summed loss and number of errors together: below 2⁵³ float64 has every integer."""
        return torch.stack([self.loss_sum, self.wrong.double()])

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
        # A fused step takes moments that lie in memory as their parameters do, here and now.
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def close(self) -> None:
        """Let go of what only a training under way needs: here nothing."""

    def _count(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss_sum += loss_sum
        self.wrong += (logits.argmax(dim=1) != labels).sum()

    def _averaging(self, last: bool) -> AbstractContextManager[None]:
        """Have the processes average their gradients in the ``last`` pass of a step alone."""
        if last or not isinstance(self._network, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[None] = self._network.no_sync()
        return context

    def _autocast(self) -> torch.autocast:
        return autocast(self.precision, self.device)

    def _choose_network(self, inputs: Tensor, labels: Tensor) -> Network:
        """Return the compiled network if there is one that works for batches of this size.

        torch compiles forwards and backwards at their first use. The first batch of a size is a
        trial, after which all is as before.
        """
        if self._compiled is None:
            return self._network
        if len(labels) not in self._compiled_sizes:
            before = Snapshot(list(self.model.buffers()), self.device)
            try:
                with self._autocast():
                    logits = self._compiled(inputs)
                F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
                self._compiled_sizes.add(len(labels))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = " ".join(lines[:2]) or type(error).__name__
                log.warning("compile=true: %s; going on without", reason)
                self._compiled = None
            before.restore()
        return self._network if self._compiled is None else self._compiled


@torch.inference_mode()
def find_correct(
    network: Network, data: ResidentData, precision: str, chunk: int | None = None
) -> Tensor:
    """Return for every image in its order whether ``network`` is right (bool, on the CPU).

    ``chunk`` images go through it at a time, else as many as in an evaluation; it is in the mode in
    which it is given.
    """
    chunk = chunk or data.evaluation_chunk
    correct = []
    for start in range(0, len(data), chunk):
        inputs, labels = data.chunk(start, start + chunk)
        with autocast(precision, inputs.device):
            correct.append(network(inputs).argmax(dim=1) == labels)
    return torch.cat(correct).cpu()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Have products computed in bf16 where ``precision`` says so."""
    # Every weight is used once a pass, and what a cache keeps a CUDA graph would not renew.
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def _read(totals: Tensor) -> tuple[float, int]:
    """Wait for the device once."""
    loss_sum, wrong = totals.tolist()
    return loss_sum, int(wrong)


def _compile(network: nn.Module) -> Network:
    """Have torch compile the network at its first use, anew for every size of a batch."""
    # Advice of torch's, which has fp32 computed in another precision than was asked for.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    torch.compiler.reset()  # or the runs before this one would count against a limit of torch's
    compiled: Network = torch.compile(network, dynamic=False)
    return compiled


def _averaging_gradients(model: nn.Module) -> DistributedDataParallel:
    """Wrap ``model`` so that the processes average their gradients; buffers stay each one's own."""
    # Newer releases of torch have another word for it.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, **options)
