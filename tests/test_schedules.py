import pytest
import torch

from gnbench.build import base_lr
from gnbench.check import compose
from gnbench.schedules import constant, cosine, multistep


def torchs(scheduler, steps, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(optimizer, **arguments)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return factors


def test_cosine_per_step_is_torchs():
    expected = torchs(torch.optim.lr_scheduler.CosineAnnealingLR, 40, T_max=40)
    ours = cosine(total_steps=40, steps_per_epoch=10)
    assert [ours(step) for step in range(40)] == pytest.approx(expected, abs=1e-12)


def test_cosine_per_epoch_is_the_reports():
    expected = torchs(torch.optim.lr_scheduler.CosineAnnealingLR, 4, T_max=4)
    ours = cosine(total_steps=40, steps_per_epoch=10, per="epoch")
    assert [ours(step) for step in range(40)] == pytest.approx(
        [factor for factor in expected for _ in range(10)], abs=1e-12
    )


def test_multistep_is_torchs():
    expected = torchs(torch.optim.lr_scheduler.MultiStepLR, 40, milestones=[20, 30], gamma=0.1)
    ours = multistep(total_steps=40, steps_per_epoch=10, milestones=[0.5, 0.75])
    assert [ours(step) for step in range(40)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "make", [cosine, constant, lambda *a, **k: multistep(*a, milestones=[0.5], **k)]
)
def test_warmup_rises_linearly_to_one(make):
    schedule = make(40, 10, warmup_epochs=0.4)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    for epochs in (4, 5, -1):
        with pytest.raises(ValueError, match=f"warmup_epochs={epochs}"):
            make(40, 10, warmup_epochs=epochs)


def test_schedules_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="per=day: choose step or epoch"):
        cosine(40, 10, per="day")
    with pytest.raises(ValueError, match="milestones=\\[20\\]: give fractions"):
        multistep(40, 10, milestones=[20])


@pytest.mark.parametrize(
    ("batch", "expected"), [("fixed_epochs", 1e-3), ("linear_lr", 1e-3 / 16), ("sqrt_lr", 1e-3 / 4)]
)
def test_learning_rate_rules(batch, expected):
    assert base_lr(compose(f"batch={batch}", "batch_size=4")) == pytest.approx(expected)
