"""What the cells of a sweep cost, in seconds of a worker: guessed, or by a few timed steps."""

from __future__ import annotations

import heapq
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from gnbench.config import RunConfig

# The guess: of a core that is neither new nor old.
SECONDS_A_STEP = 0.003  # whatever it computes
FLOPS_A_SECOND = 30e9
BACKWARD = 2  # times the FLOPs of the forward pass

TIMED_SECONDS = 0.5  # of each network and batch size, or two steps
MOST_TIMED = 24  # networks and batch sizes; the others are guessed by these
TIMED_IMAGES = 100  # of a test pass


@dataclass(frozen=True)
class Rate:
    """Seconds of a worker: for a step of the training, and for an image of a test pass."""

    step: float
    image: float


Measure = Callable[[list[RunConfig]], Sequence[Rate]]


def cost(config: RunConfig, rate: Rate) -> float:
    """Return the seconds that a worker takes for a run, by the ``rate`` of its steps."""
    from gnbench.build import drops_last, training_length
    from gnbench.train.loop import steps_per_epoch
    from gnbench.train.row import LAST_EPOCHS

    steps = training_length(config)[0]
    epoch = steps_per_epoch(config.dataset.images, config.sgd_batch, drops_last(config))
    epochs = math.ceil(steps / epoch)
    tests = min(epochs, math.ceil(epochs / config.evaluate_every) + LAST_EPOCHS)
    images = config.dataset.test_images + (config.dataset.validation_size or 0)
    return steps * rate.step + tests * images * rate.image


def guessed(config: RunConfig) -> Rate:
    """Guess the rate of a run by the FLOPs of its network, counted without storage if it can be."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gnbench.build import REFUSALS, build_model

    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), suppress(*REFUSALS):
        model = build_model(config).eval()
        with counter:
            model(torch.empty(1, *config.dataset.image))
    image = counter.get_total_flops() / FLOPS_A_SECOND
    return Rate(SECONDS_A_STEP + config.sgd_batch * (1 + BACKWARD) * image, image)


def timed(config: RunConfig) -> Rate:
    """Time steps of a training, and a test pass, on noise in this process.

    Leaves torch's random generator as it was.
    """
    import torch

    from gnbench.build import build_model, build_optimizer
    from gnbench.train.batches import ResidentData, draw_epoch
    from gnbench.train.devices import flush_denormals
    from gnbench.train.engine import EagerEngine, Epoch

    flush_denormals()  # before torch starts threads, as a run does
    device = torch.device("cpu")
    channels, height, width = config.dataset.image
    count = max(config.sgd_batch, TIMED_IMAGES)
    with torch.random.fork_rng(devices=[]):
        images = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)
        labels = torch.arange(count) % config.dataset.classes
        moments = [0.5] * channels
        data = ResidentData(images, labels, moments, moments, device)
        test = ResidentData(images[:TIMED_IMAGES], labels[:TIMED_IMAGES], moments, moments, device)
        model = build_model(config)
        engine = EagerEngine(
            *(model, build_optimizer(config, model), config.optimizer.lr, lambda _: 1.0),
            *(config.precision, device),
            images_a_pass=config.batch_size,
        )
        plan = draw_epoch(0, 0, count, config.dataset.augmentation)
        epoch = Epoch(data, plan, config.sgd_batch, first_step=0, steps=count // config.sgd_batch)
        seconds: list[float] = []
        while len(seconds) < 2 or sum(seconds) < TIMED_SECONDS:
            began = time.perf_counter()
            engine.train_steps(epoch, len(seconds) % epoch.steps, 1)
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        engine.evaluate(test)
        tested = time.perf_counter() - began
    return Rate(statistics.fmean(seconds[1:]), tested / len(test))  # the first one sets up kernels


def costs(
    configs: Sequence[RunConfig],
    measure: Measure | None = None,
) -> list[float]:
    """Return the seconds that a worker takes for each run, guessed.

    Or by ``measure``, which times runs: one of those that are alike, and `MOST_TIMED` in all; how
    wrong the guess was of them corrects that of the others.
    """
    alike = [_alike(config) for config in configs]
    kinds = dict(zip(alike, configs, strict=True))
    found = {key: guessed(config) for key, config in kinds.items()}
    if measure is not None:
        chosen = list(kinds)[:: math.ceil(len(kinds) / MOST_TIMED)]
        times = dict(zip(chosen, measure([kinds[key] for key in chosen]), strict=True))
        wrong = statistics.median(times[key].step / found[key].step for key in chosen)
        found = {key: Rate(wrong * r.step, wrong * r.image) for key, r in found.items()} | times
    return [cost(config, found[key]) for key, config in zip(alike, configs, strict=True)]


def makespan(costs: Iterable[float], workers: int) -> float:
    """Return how long so many workers take, each of which takes the next one when it is free."""
    ends = [0.0] * max(workers, 1)
    for one in costs:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def _alike(config: RunConfig) -> str:
    """Return the settings that the cost of a step follows from."""
    groups = (config.model, config.norm, config.dataset, config.optimizer, config.batch)
    settings = [group.plain() for group in groups]
    for setting in ("lr", "weight_decay", "betas", "eps"):
        settings[3].pop(setting, None)
    return json.dumps([*settings, config.batch_size, config.precision])
