"""What a recorded step launches on a GPU, by dispatch on torch's meta device."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gnbench.build import build_training, load_dataset
from gnbench.check import compose
from gnbench.train import layout
from gnbench.train.batch_counts import batch_counts, counted_together
from gnbench.train.replicas import ReplicaGroup
from tests import meta_device
from tests.meta_device import META
from tests.trainings import NORMS

STEPS = 2  # of a graph
ONCE = 8  # kernels of a graph that its steps share: positions, learning rates, counts of batches
# Kernels of a step of SimpleNetv2 on CIFAR-10's images, batch size 16, AdamW, with flips, those
# that convert from one order in memory to the other among them. When a release of torch needs
# fewer, lower them; when a change needs more, it must be worth it.
BUDGET = {
    "bgn": 134,
    "bn": 76,
    "brn": 304,
    "dyt": 136,
    "evonorm_b0": 388,
    "evonorm_s0": 256,
    "frn": 262,
    "ghost_bn": 142,
    "gn": 74,
    "gn_ws": 194,
    "in": 128,
    "ln": 74,
    "ln_channel": 106,
    "lrn": 262,
    "none": 64,
    "rms": 214,
    "syncbn": 82,
}
SAME = {"gn8", "gn8_ws", "gn_auto"}  # the layers of gn and gn_ws with other groups
RECIPES = [
    ["optimizer=sgd", "schedule=multistep"],
    ["optimizer=adam", "dataset.augmentation=pad_crop_flip"],
    ["model.dropout=0.5", "batch.accumulate=2", "batch_size=8"],
    ["optimizer.decay_norm_and_bias=false", "model=resnet18"],
]


@pytest.fixture
def launches(monkeypatch):
    """Return what builds a training and has a graph of its steps; with what that launches."""
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr("gnbench.train.engine.autocast", lambda precision, device: nullcontext())
    monkeypatch.setattr("gnbench.train.graph_engine.STEPS_A_GRAPH", STEPS)

    def built(*overrides):
        recorder = meta_device.Recorder()
        config = compose(*meta_device.OVERRIDES, "batch_size=16", "device=cpu", *overrides)
        training = build_training(config, load_dataset(config), META, ReplicaGroup(recorder, META))
        epoch = training._begin_epoch()
        assert training.engine.train_steps(epoch, 0, 1) == 1  # makes the moments
        assert training.engine.train_steps(epoch, 1, STEPS) == STEPS
        return training, recorder.launches

    return built


def test_every_norm_has_a_budget():
    assert BUDGET.keys() | SAME == {*NORMS}


def cost(launched):
    return len(launched.kernels) + len(launched.conversions)


@pytest.mark.parametrize(
    "norm",
    [
        norm if norm in ("bn", "gn") else pytest.param(norm, marks=pytest.mark.slow)
        for norm in BUDGET
    ],
)
def test_a_step_keeps_to_its_budget_of_kernels(launches, norm):
    chunks = ["norm.images=8"] if norm in ("bgn", "ghost_bn") else []  # two of a batch
    _, found = launches(f"norm={norm}", *chunks)
    assert cost(found) <= STEPS * BUDGET[norm] + ONCE
    assert found.elsewhere == []


@pytest.mark.parametrize("norm", [pytest.param("bgn", marks=pytest.mark.slow), "bn", "gn"])
def test_images_and_weights_lie_as_the_norm_needs_them(launches, monkeypatch, norm):
    """Channels last costs the head two kernels a step."""
    training, chosen = launches(f"norm={norm}")
    channels_last = training.train.channels_last
    assert channels_last is (norm == "bn")
    monkeypatch.setattr(layout, "_needs_rows", lambda layer: channels_last)
    other, found = launches(f"norm={norm}")
    assert other.train.channels_last is not channels_last
    assert cost(chosen) <= cost(found) + STEPS * 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
def test_nothing_recorded_copies_between_devices(launches, recipe):
    training, found = launches(*recipe)
    assert found.kernels
    with meta_device.Launches() as evaluation:
        training.engine.plain.evaluate_into_totals(training.test)
    assert found.elsewhere == evaluation.elsewhere == []


def test_a_copy_between_devices_would_be_seen():
    with meta_device.Launches() as found:
        torch.zeros(2, device=META).copy_(torch.ones(2))
        torch.ones(2).to(META)
    assert found.elsewhere


def test_batches_are_counted_together_as_each_layer_counts_them():
    net = nn.Sequential(
        *(nn.BatchNorm2d(2), nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2)),
        nn.BatchNorm2d(2, track_running_stats=False),
    )
    assert batch_counts(net) == [net[0], net[2]]  # one that averages reads its count
    x = torch.ones(2, 2, 1, 1)
    with counted_together(batch_counts(net)):
        net(x), net(x), net[2](x)
    assert [layer.num_batches_tracked for layer in net[:3]] == [2, 2, 3]
    assert net[0].num_batches_tracked.dtype == torch.int64

    def interrupted():
        with counted_together(batch_counts(net)):
            net(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [int(layer.num_batches_tracked) for layer in net[:3]] == [2, 3, 3]
