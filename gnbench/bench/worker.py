"""What `gnbench.bench` times, each in a process of its own that takes steps when told to."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from itertools import chain, repeat
from multiprocessing import active_children, get_all_start_methods
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from gnbench import cli
from gnbench.build import (
    OWN_KEYS,
    build_model,
    build_training,
    compose,
    load_dataset,
    must_drop_last,
    pack_for,
)
from gnbench.config import one_line
from gnbench.datasets import Dataset
from gnbench.runs import directory as runs
from gnbench.runs import runner as execution
from gnbench.runs.signals import Stop
from gnbench.train import devices
from gnbench.train.batches import ResidentData
from gnbench.train.cuda_graphs import Recorder
from gnbench.train.engine import STEPS_A_GRAPH, EagerEngine, Epoch, GraphEngine
from gnbench.train.loop import Position

DATA_WORKERS = 2  # of the plain loop, but no more than it has threads
PREFETCH = 2  # batches that each of them holds ready
MATMUL_SIZE = 2048  # rows and columns of the matrices by whose product the hardware is measured
MATMUL_FLOPS = 2 * MATMUL_SIZE**3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOOKKEEPING_ROUNDS = 3  # in each of which an epoch without steps is gone through twice
ENDS = 3  # of epochs: the first warms up, at the second graphs are recorded
LINKS = 1000  # of a chain of kernels
COUNTED_STEPS = 128  # whose kernels are counted, one look at the loss among them
ADAM_MOMENTS = 2  # numbers that Adam keeps for a parameter


class PlainLoop:
    """The loop that a person would write: torchvision's transforms, DataLoader, eager PyTorch."""

    def __init__(self, config: DictConfig) -> None:
        self.device = devices.choose_device(config.device)
        torch.manual_seed(config.seed)
        self.model = build_model(config).to(self.device)
        settings = {k: v for k, v in config.optimizer.items() if k not in OWN_KEYS}
        self.optimizer = instantiate(settings, _convert_="all")(self.model.parameters())
        self.bf16 = config.precision == "bf16"
        loader = DataLoader(
            _Pictures(load_dataset(config), config),
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=must_drop_last(config),
            num_workers=min(DATA_WORKERS, torch.get_num_threads()),
            prefetch_factor=PREFETCH,
            persistent_workers=True,
            # What a program of its own has on Linux; here the default is that of our parent.
            multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
            pin_memory=self.device.type == "cuda",
        )
        steps = config.epochs * len(loader)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.batches: Iterator[list[Tensor]] = chain.from_iterable(repeat(loader))
        self.loss_sum, self.wrong = 0.0, 0

    def take(self, count: int) -> int:
        """Take ``count`` optimizer steps."""
        for _ in range(count):
            images, labels = next(self.batches)
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.scheduler.step()
            self.loss_sum += loss.item() * len(labels)
            self.wrong += (logits.argmax(dim=1) != labels).sum().item()
        return count

    def save(self, path: Path) -> None:
        """Write weights and moments."""
        moments = self.optimizer.state_dict()["state"]
        torch.save({"model": self.model.state_dict(), "moments": moments}, path)

    def load(self, path: Path) -> None:
        """Continue with weights and moments that a plain loop saved."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**own, "state": saved["moments"]})


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images and labels as torchvision's own datasets give them: PIL images, then transforms."""

    def __init__(self, dataset: Dataset, config: DictConfig) -> None:
        images = dataset.train_images.numpy()
        self.images = images[..., 0] if images.shape[-1] == 1 else images  # PIL's form of gray
        self.labels = dataset.train_labels.tolist()
        settings = config.dataset
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(list(settings.mean), list(settings.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class EngineLoop:
    """Trainings of gnbench as runs do them, without their directories and test images.

    ``replicas`` of them, in step with each other.
    """

    def __init__(self, config: DictConfig, replicas: int = 1) -> None:
        device = devices.choose_device(config.device)
        dataset = load_dataset(config)
        dataset = replace(
            dataset, test_images=dataset.test_images[:1], test_labels=dataset.test_labels[:1]
        ).to(device)
        self.config = config
        self.device = device
        self._pack = pack_for(config, device) if replicas > 1 else None
        self.trainings = []
        for seed in range(config.seed, config.seed + replicas):
            one = config.copy()
            one.seed = seed
            self.trainings.append(build_training(one, dataset, device, self._pack))
        self.training = self.trainings[0]
        self._calls = [training.run() for training in self.trainings]

    def take(self, count: int) -> int:
        """Take at least ``count`` optimizer steps in each: an engine may take several at a call."""
        before = [training.position.step for training in self.trainings]
        while self.training.position.step < before[0] + count:
            for calls in self._calls:
                if next(calls, self) is self:
                    raise RuntimeError("the training came to its end (it diverged)")
        for training in self.trainings:
            training.engine.own_totals()  # waits for the device
        steps = [training.position.step for training in self.trainings]
        return sum(steps) - sum(before)

    def load(self, path: Path) -> None:
        """Continue with weights and moments that a plain loop saved."""
        saved = torch.load(path, weights_only=True)
        state = {"model": saved["model"], "optimizer": {"state": saved["moments"]}}
        for training in self.trainings:
            training.engine.load_state_dict(state)

    def engine_names(self, nothing: None) -> set[str]:
        """Return what the engines are called by now: they may have fallen back."""
        names = {training.engine.name for training in self.trainings}
        return names | ({"graphs one by one"} if self._pack and self._pack.divided else set())

    def pass_epoch_ends(self, nothing: None) -> None:
        """Have the graphs of an epoch's end recorded before the clock runs."""
        for _ in range(ENDS):
            for training in self.trainings:
                late = max(0, training.steps_per_epoch - 2 * STEPS_A_GRAPH)
                epoch = training.position.epoch
                training.position = Position(epoch=epoch, step=late, epoch_step=late)
            self._calls = [training.run() for training in self.trainings]
            self.take(self.training.steps_per_epoch - self.training.position.step + 1)

    def kernels(self, nothing: None) -> float | None:
        """Count the kernels and copies that a step is on a GPU, with all that goes with it."""
        if self.device.type != "cuda":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            steps = self.take(COUNTED_STEPS // len(self.trainings))
        kinds = Counter(event.device_type.name for event in profile.events())
        return kinds["CUDA"] / steps

    def bookkeeping(self, nothing: None) -> Bookkeeping:
        """Measure what `gnbench.runs.runner` adds to one training, with a bar on a terminal."""
        idle = copy.copy(self.training)
        idle.engine = cast(EagerEngine, _Idle(self.training.engine))
        idle.total_steps = idle.steps_per_epoch
        config = self.config.copy()
        config.progress = "bar"
        added, saving = [], []
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
            place = runs.Run(folder)
            with place.locked() as presence, redirect_stderr(nowhere):
                for _ in range(BOOKKEEPING_ROUNDS):
                    idle.position = Position()
                    bare = _seconds(lambda: deque(idle.run(), maxlen=0))
                    idle.position = Position()
                    calls = execution.drive(
                        config, place, idle, [], presence, Stop(), time.monotonic
                    )
                    driven = _seconds(functools.partial(deque, calls, 0))
                    added.append(driven - bare)
                    saving.append(
                        _seconds(lambda: place.save_checkpoint(self.training.state_dict()))
                    )
        return Bookkeeping(idle.steps_per_epoch, median(added), median(saving))


@dataclass(frozen=True)
class Bookkeeping:
    """What a run adds to its training: seconds an epoch of so many steps, seconds a checkpoint."""

    steps: int
    epoch_seconds: float
    checkpoint_seconds: float

    def share(self, steps_per_second: float, pause: float, replicas: int = 1) -> float:
        """Return it as a fraction of the time of a process that trains so many replicas.

        ``steps_per_second`` are those of all, ``pause`` the seconds between checkpoints of each.
        """
        pause = max(pause, replicas * self.checkpoint_seconds / execution.CHECKPOINT_SHARE)
        saving = replicas * self.checkpoint_seconds / pause
        return self.epoch_seconds * steps_per_second / self.steps + saving


class _Idle:
    """An engine that takes as many steps at a call as another one, and does nothing."""

    def __init__(self, other: EagerEngine) -> None:
        self._steps = STEPS_A_GRAPH if other.kind == GraphEngine.kind else 1
        self.device = other.device
        self.crew = other.crew
        self.learning_rate = other.learning_rate
        self.companions = other.companions

    def train_steps(self, epoch: Epoch, at: int, most: int) -> int:
        return min(self._steps, most)

    def totals(self) -> tuple[float, int]:
        return 0.0, 0

    take_totals = own_totals = totals

    def evaluate(self, data: ResidentData) -> tuple[float, int]:
        return 0.0, 0


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Matmul:
    """Products of square matrices in the precision of ``config``: 2·2048³ FLOPs each."""

    def __init__(self, config: DictConfig) -> None:
        self.device = devices.choose_device(config.device)
        shape, dtype = (MATMUL_SIZE, MATMUL_SIZE), DTYPES[config.precision]
        self.left, self.right, self.product = (
            torch.randn(shape, device=self.device).to(dtype) for _ in range(3)
        )

    def take(self, count: int) -> int:
        """Multiply ``count`` times."""
        for _ in range(count):
            torch.mm(self.left, self.right, out=self.product)
        _wait_for(self.device)
        return count


class Chain:
    """Graphs of `LINKS` kernels that do nothing but wait for one another."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self.device = device
        token = torch.zeros(1, device=device)

        def work() -> None:
            for _ in range(LINKS):
                token.add_(1)

        self._token = token  # a graph does not hold on to it
        alone = recorder.side_by_side([work])
        recorder.run(alone)
        self._replay = recorder.record(alone)

    def take(self, count: int) -> int:
        """Launch ``count`` graphs."""
        for _ in range(count):
            self._replay()
        _wait_for(self.device)
        return count


class Copying:
    """Copies of as many numbers as the weights and Adam's moments are: what a step must move."""

    def __init__(self, config: DictConfig) -> None:
        self.device = devices.choose_device(config.device)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_model(config).parameters())
        self.source = torch.ones((1 + ADAM_MOMENTS) * parameters, device=self.device)
        self.target = torch.zeros_like(self.source)

    def take(self, count: int) -> int:
        """Copy ``count`` times."""
        for _ in range(count):
            self.target.copy_(self.source)
        _wait_for(self.device)
        return count


def count_flops(config: DictConfig) -> int:
    """Count the FLOPs of convolutions and matrix products in a step, forwards and backwards."""
    with torch.device("meta"):
        model = build_model(config).train()
        images = torch.empty(config.batch_size, *config.dataset.image)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images).sum().backward()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Report:
    """What a process says once it is ready, or has failed (``error``)."""

    startup_seconds: float = 0.0  # from its start to its first step
    first_step_seconds: float = 0.0
    device: str = ""
    error: str | None = None


def serve(
    connection: Connection,
    engine: str | None,
    overrides: tuple[str, ...],
    threads: int,
    replicas: int,
    began: float,
) -> None:
    """Build trainings of ``engine``, or the plain loop (None), and do as told until hung up on.

    Orders: ``("take", count)`` is answered by the number of steps taken, ``("save", path)`` and
    ``("load", path)`` by None, ``("memory", None)`` by the peak memory in bytes; by an engine,
    ``("pass_epoch_ends", None)`` by None, ``("engine_names", None)`` by those,
    ``("kernels", None)`` by their number a step or None and ``("bookkeeping", None)`` by a
    `Bookkeeping`. The first answer is a `Report`; ``began`` is the time (`time.time`) at which the
    process was started.
    """
    with suppress(BrokenPipeError):  # hung up on before an answer
        try:
            if engine is not None:
                overrides = (*overrides, f"engine={engine}")
                devices.flush_denormals()  # before torch starts threads
            torch.set_num_threads(threads)
            config = compose(*overrides)
            device = devices.choose_device(config.device)
            devices.reset_peak_memory(device)
            loop: Any = PlainLoop(config) if engine is None else EngineLoop(config, replicas)
            startup, stepped = time.time() - began, time.time()
            loop.take(1)
            first = time.time() - stepped
            connection.send(Report(startup, first, devices.describe_device(device)))
            while (order := _receive(connection)) is not None:
                name, argument = order
                if name == "memory":
                    connection.send(_peak_memory(device))
                else:
                    connection.send(getattr(loop, name)(argument))
        except BrokenPipeError:
            raise
        except Exception as error:
            if not (cli.is_explained(error) or devices.is_out_of_memory(error)):
                traceback.print_exc()
            connection.send(Report(error=one_line(error)))


def _receive(connection: Connection) -> tuple[str, Any] | None:
    try:
        order: tuple[str, Any] = connection.recv()
    except EOFError:
        return None
    return order


def _peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes, with what its data workers hold alone."""
    peak = devices.peak_memory_bytes(device)
    if peak is None or device.type == "cuda":
        return peak
    for worker in active_children():
        with suppress(OSError):
            lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
            peak += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))
    return peak


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
