"""From a configuration to its parts."""

import math
import random

import numpy as np
import pytest
import torch

from gnbench.build import (
    base_lr,
    build_optimizer,
    build_training,
    drops_last,
    load_dataset,
    training_length,
)
from gnbench.train.devices import set_defaults
from tests.trainings import rows

RESNET = ("model=resnet18", "model.stem=imagenet", "batch_size=47")


def start(config):
    return build_training(config, load_dataset(config))


def test_what_a_part_of_ones_own_has_set_does_not_reach_the_next_run(tiny_config):
    drawn = []
    try:
        for _ in range(2):
            start(tiny_config("seed=3"))
            drawn.append((random.random(), np.random.random()))
            assert torch.get_default_dtype() == torch.float32
            for products in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
                assert products.fp32_precision == "ieee"
            torch.set_float32_matmul_precision("medium")
            torch.backends.mkldnn.conv.fp32_precision = "bf16"
            torch.set_default_dtype(torch.float64)
    finally:
        set_defaults()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_fused_optimizer_is_torchs_plain_one(tiny_config, optimizer):
    config = tiny_config(f"optimizer={optimizer}")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 3).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    fused = build_optimizer(config, layers[0])
    assert (fused.defaults["fused"], fused.defaults["lr"]) == (True, config.optimizer.lr)
    names = ("lr", "betas", "eps", "weight_decay", "momentum", "nesterov")
    settings = {name: fused.defaults[name] for name in names if name in fused.defaults}
    plain = type(fused)(layers[1].parameters(), **settings, fused=False)
    for _ in range(20):
        for layer, step in zip(layers, (fused, plain), strict=True):
            step.zero_grad()
            layer(torch.arange(10.0).view(2, 5).double()).pow(2).sum().backward()
            step.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-10, atol=1e-12)


def test_weight_decay_spares_vectors_when_asked(tiny_config):
    decayed, spared = start(
        tiny_config("norm=bn", "optimizer.decay_norm_and_bias=false")
    ).engine.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in spared["params"]} == {1}
    [everything] = start(tiny_config("norm=bn")).engine.optimizer.param_groups
    assert len(everything["params"]) == len(decayed["params"]) + len(spared["params"])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ((*RESNET, "norm=bn"), 1),  # shrinks 8×8 images to 1×1: one value per channel at batch 1
        ((*RESNET, "norm=gn"), 2),
        (("norm=bn", "batch_size=47"), 2),  # 1×1 as well, but only after its last norm
    ],
)
def test_a_last_batch_that_batch_norm_cannot_use_is_dropped(tiny_config, settings, steps):
    training = start(tiny_config(*settings))
    assert (training.steps_per_epoch, training.total_steps) == (steps, 2 * steps)


@pytest.mark.parametrize("size", [3, 8, 24])
def test_fixed_steps_gives_every_batch_size_the_same_number_of_steps(tiny_config, size):
    settings = ("model._target_=tests.trainings.small", f"batch_size={size}")
    training = start(tiny_config("batch=fixed_steps", "batch.reference_size=8", *settings))
    last = rows(training)[-1]
    assert (training.total_steps, last.step) == (12, 12)
    assert last.epoch == math.ceil(12 / (48 / size))


def test_the_schedule_of_fixed_steps_is_the_same_at_every_batch_size(tiny_config):
    """Its epochs are those of the reference size, or at batch size 2 a warm-up would not fit."""
    rates = []
    for size in (2, 8, 24):
        engine = start(
            tiny_config(
                "batch=fixed_steps", "batch.reference_size=8", f"batch_size={size}",
                "schedule.per=epoch", "schedule.warmup_epochs=0.5",
            )
        ).engine  # fmt: skip
        rates.append([engine.learning_rate(step) for step in range(12)])
    assert rates[0] == rates[1] == rates[2]
    assert rates[0][0] < rates[0][3] > rates[0][11]


def test_an_epoch_s_learning_rate_is_that_of_its_schedule(tiny_config):
    factors = [0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
    training = start(tiny_config("epochs=3", "schedule.per=epoch"))
    assert [row.lr for row in rows(training)] == pytest.approx([1e-3 * f for f in factors])


DECLINE = ("batch_size=64", "batch.reference_size=2", "dataset.train_images=640")


@pytest.mark.parametrize(
    ("lr_rule", "decay_rule", "lr", "decay"),
    [
        ("none", "per_step", 1e-3, 0.01),
        ("none", "per_epoch", 1e-3, 0.32),
        ("sqrt", "per_step", 1e-3 * 32**0.5, 0.01 / 32**0.5),
        ("sqrt", "per_epoch", 1e-3 * 32**0.5, 0.32 / 32**0.5),
        ("sqrt", "none", 1e-3 * 32**0.5, 0.01),
    ],
)
@pytest.mark.parametrize("passes", [("batch_size=64",), ("batch_size=4", "batch.accumulate=16")])
def test_the_rules_of_learning_rate_and_decay(tiny_config, lr_rule, decay_rule, lr, decay, passes):
    """By hand: 32 times the reference batch has a 32nd of its steps in an epoch."""
    rules = (f"batch.lr_rule={lr_rule}", f"batch.decay_rule={decay_rule}")
    config = tiny_config(*DECLINE, *rules, *passes)
    optimizer = build_optimizer(config, torch.nn.Linear(1, 1))
    assert base_lr(config) == pytest.approx(lr)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(decay)
    assert training_length(config) == (20, 10)  # two epochs of 640 / 64 SGD steps


def test_a_run_accumulates_as_its_configuration_says(tiny_config):
    """The rows of one step of 24 images at a time, in passes of 3, and of two epochs."""
    parts = start(tiny_config("norm=gn", "batch_size=3", "batch.accumulate=8", "optimizer=sgd"))
    whole = start(tiny_config("norm=gn", "batch_size=24", "optimizer=sgd"))
    sizes = []
    parts.engine.model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    for one, other in zip(rows(parts), rows(whole), strict=True):
        assert (one.step, one.lr) == (other.step, other.lr)
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
    assert sizes == 2 * [*16 * [3], 20]


@pytest.mark.parametrize(
    ("size", "accumulate", "processes", "drops"),
    [
        (1, 4, 5, True),  # 48 images: two steps of 20; the last 8 are 2, 2, 2, 1 and 1
        (3, 2, 5, True),  # 30; the last 18 are 4, 4, 4, 3 and 3: two passes, or one
        (4, 2, 5, False),  # 40; the last 8 are one pass for each
        (2, 5, 3, False),  # 30; the last 18 are 6 each: three passes for all
    ],
)
def test_a_last_step_of_unequal_passes_is_dropped(tiny_config, size, accumulate, processes, drops):
    """A layer that exchanges something in each would wait for a pass that another lacks."""
    config = tiny_config("norm=gn", f"batch_size={size}", f"batch.accumulate={accumulate}")
    assert drops_last(config.with_(processes=processes)) == drops
