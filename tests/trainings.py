"""Small trainings, built from their parts: 3,000 weights on 48 images of 8×8 pixels."""

import dataclasses
import functools
import math
from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import nn

from gnbench.check import compose
from gnbench.models import activated
from gnbench.norms import BatchRenorm, standardize_weights
from gnbench.train.batches import ResidentData
from gnbench.train.engine import EagerEngine
from gnbench.train.graph_engine import GraphEngine
from gnbench.train.loop import Training, steps_per_epoch

CPU = torch.device("cpu")
NORMS = sorted(path.stem for path in Path(__file__).parents[1].glob("conf/norm/*.yaml"))
NORMS.remove("frozen_bn")  # which is for pretrained networks
TIMES = {"images_per_second": 0.0, "seconds": 0.0}
MEAN, STD = (0.286,), (0.353,)

OPTIMIZERS = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr, fused=True),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr, fused=True),
    # Its steps are linear in the gradient. Adam's first ones are ±lr however small that is, so
    # that rounding alone would turn some around.
    "sgd": lambda parameters, lr: torch.optim.SGD(
        parameters, lr, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
    ),
}


class Network(nn.Sequential):
    """Two convolutions with their norms, and a linear layer."""

    def __init__(self, norm="bn", dropout=0.0):
        name = norm if isinstance(norm, str) else ""
        norm = layer(norm) if name else norm
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), *activated(norm(16)), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 16, 3, padding=1), *activated(norm(16)), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 4)),
        )
        if name.endswith("_ws"):
            standardize_weights(self)
        for module in self.modules():
            if isinstance(module, BatchRenorm):
                module.forward_passes = 20  # so that its limits move in the few steps there are


def small(norm, image, classes, dropout, **settings):
    """Build the network from a configuration: ``model._target_=tests.trainings.small``."""
    return Network(norm, dropout)


@functools.cache
def layer(norm):
    """Return the norm of that name in conf/norm, to be called with the number of channels."""
    return instantiate(compose(f"norm={norm}").norm.arguments(), _convert_="all")


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 8, 8, 1), dtype=torch.uint8, generator=generator)


def data(count, seed=0, device=CPU):
    return ResidentData(images(count, seed), torch.arange(count) % 4, MEAN, STD, device)


def training(
    norm="bn",
    *,
    network=Network,
    dropout=0.0,
    optimizer="adamw",
    lr=1e-3,
    schedule="cosine",
    precision="fp32",
    batch_size=8,
    drop_last=False,
    epochs=2,
    total_steps=None,
    seed=0,
    augmentation="flip",
    device=CPU,
    group=None,
    compiled=False,
    processes=None,
    images_a_pass=None,
):
    """Seed and build a training; one of a replica ``group`` has the graph engine."""
    steps = total_steps or epochs * steps_per_epoch(48, batch_size, drop_last)
    torch.manual_seed(seed)
    model = network(norm, dropout).to(device)
    factors = {
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)),
        "constant": lambda step: 1.0,
    }
    engine = EagerEngine(
        model,
        OPTIMIZERS[optimizer](model.parameters(), lr),
        lr,
        factors[schedule],
        precision,
        device,
        process_group=processes,
        compiled=compiled,
        images_a_pass=images_a_pass,
    )
    return Training(
        GraphEngine(engine, group) if group else engine,
        data(48, device=device),
        data(20, seed=1, device=device),
        batch_size=batch_size,
        drop_last=drop_last,
        total_steps=steps,
        seed=seed,
        augmentation=augmentation,
    )


def rows(training):
    """Train to the end; return the rows without their times."""
    return [timeless(row) for row in training.run() if row is not None]


def in_turns(trainings):
    """Go through the trainings a call each at a time; return their rows."""
    calls = dict(enumerate(one.run() for one in trainings))
    found = [[] for _ in trainings]
    while calls:
        for number, call in list(calls.items()):
            row = next(call, "over")
            if row == "over":
                del calls[number]
            elif row:
                found[number].append(timeless(row))
    return found


def leaving_one_by_one(trainings):
    """Close the first one after two epochs, the next after one more, and so on but for the last."""
    found, calls = [[] for _ in trainings], [one.run() for one in trainings]
    for leaving, one in enumerate(trainings[:-1]):
        while one.position.epoch < 2 + leaving:
            for number, call in list(enumerate(calls))[leaving:]:
                found[number] += [timeless(row) for row in [next(call)] if row]
        one.engine.close()
        if one.engine.device.type == "cuda":
            torch.cuda.empty_cache()  # as at the end of a run
    found[-1] += [timeless(row) for row in calls[-1] if row]
    return found


def timeless(row):
    return dataclasses.replace(row, **TIMES)


def through_a_file(training, path):
    """Return the state of a training as a checkpoint brings it back."""
    torch.save(training.state_dict(), path)
    return torch.load(path, weights_only=True)


def assert_same_weights(one, other):
    ours, others = one.engine.model.state_dict(), other.engine.model.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=0, equal_nan=True, msg=name)


def three(*, group=None, device=CPU, **settings):
    return [training(seed=seed, group=group, device=device, **settings) for seed in (3, 4, 5)]


def assert_together_as_alone(group, **settings):
    alone = three(**settings)
    expected = [rows(one) for one in alone]
    together = three(group=group, **settings)
    assert repr(in_turns(together)) == repr(expected)  # of NaN, too
    for one, other in zip(together, alone, strict=True):
        assert_same_weights(one, other)
        assert (one.engine.name, other.engine.name) == ("graph", "eager")
