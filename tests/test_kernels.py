"""What a recorded step launches on a GPU, by dispatch on torch's meta device."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gnbench.build import build_training, load_dataset
from gnbench.check import compose
from gnbench.train.batch_counts import batch_counts, counted_together
from gnbench.train.replicas import ReplicaGroup
from tests import meta_device
from tests.meta_device import META
from tests.trainings import NORMS

STEPS = 2  # of a graph
ONCE = 8  # kernels of a graph that its steps share: positions, learning rates, counts of batches
# Kernels of a step of SimpleNetv2 on CIFAR-10's images, batch size 32, AdamW, with flips. When a
# release of torch needs fewer, lower them; when a change needs more, it must be worth it.
BUDGET = {
    "bgn": 304,
    "bn": 81,
    "brn": 309,
    "dyt": 141,
    "evonorm_b0": 393,
    "evonorm_s0": 261,
    "frn": 261,
    "ghost_bn": 147,
    "gn": 75,
    "gn8": 75,
    "gn8_ws": 195,
    "gn_auto": 75,
    "gn_ws": 195,
    "in": 130,
    "ln": 75,
    "ln_channel": 111,
    "lrn": 267,
    "none": 69,
    "rms": 219,
    "syncbn": 87,
}
RECIPES = [
    ["optimizer=sgd", "schedule=multistep"],
    ["optimizer=adam", "dataset.augmentation=pad_crop_flip"],
    ["model.dropout=0.5", "batch.accumulate=2", "batch_size=16"],
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
        config = compose(*meta_device.OVERRIDES, "batch_size=32", "device=cpu", *overrides)
        training = build_training(config, load_dataset(config), META, ReplicaGroup(recorder, META))
        epoch = training._begin_epoch()
        assert training.engine.train_steps(epoch, 0, 1) == 1  # makes the moments
        assert training.engine.train_steps(epoch, 1, STEPS) == STEPS
        return training, recorder.launches

    return built


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_keeps_to_its_budget_of_kernels(launches, norm):
    _, found = launches(f"norm={norm}")
    assert len(found.kernels) <= STEPS * BUDGET[norm] + ONCE
    assert found.elsewhere == []


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
