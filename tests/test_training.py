import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import gnbench
from gnbench.build import build_optimizer, build_training, compose, load_dataset
from gnbench.train.batches import draw_epoch
from tests import tiny

TIMES = {"images_per_second": 0.0, "seconds": 0.0}


def start(config):
    return build_training(config, load_dataset(config))


def rows(training):
    return [dataclasses.replace(r, **TIMES) for r in training.run() if r is not None]


def assert_same_state(one, other):
    for (name, a), (_, b) in zip(
        one.engine.model.state_dict().items(), other.engine.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def denormals(training):
    """Count the numbers below float32's smallest normal one in the state of the optimizer."""
    least = torch.finfo(torch.float32).tiny
    states = training.engine.optimizer.state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return sum(int(((m != 0) & (m.abs() < least)).sum()) for m in moments)


def test_flushing_denormal_numbers_changes_no_weight(tiny_config):
    config = tiny_config("norm=gn", "epochs=180")  # moments fade for some 850 steps
    flushed = start(config)
    rows(flushed)
    plain = start(config)
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush denormal numbers")
    rows(plain)
    assert denormals(plain) > 1000
    assert denormals(flushed) == 0
    assert_same_state(flushed, plain)


def test_the_step_is_the_plain_pytorch_step(tiny_config):
    """Against the loop anybody would write: torch's own unfused optimizer and scheduler.

    With SGD, whose step is linear in the gradient: Adam's first steps are ±lr however small the
    gradient, so that rounding alone would turn some around.
    """
    config = tiny_config("norm=bn", "optimizer=sgd", "optimizer.lr=0.02")
    config.dataset.augmentation = "none"
    training = start(config)
    model = start(config).engine.model
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=False
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    rows(training)
    data = tiny.dataset()
    for epoch in range(2):
        order = draw_epoch(0, epoch, 48, "none").order
        for batch in order.split(8):
            x = (data.train_images[batch].permute(0, 3, 1, 2) / 255 - 0.286) / 0.353
            optimizer.zero_grad()
            F.cross_entropy(model(x), data.train_labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    for name, plain in model.state_dict().items():
        ours = training.engine.model.state_dict()[name]
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
        assert not torch.equal(plain, initial[name]), f"{name} never moved"


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_fused_optimizer_is_torchs_plain_one(tiny_config, optimizer):
    config = tiny_config(f"optimizer={optimizer}")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 3).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    fused = build_optimizer(config, layers[0])
    assert fused.param_groups[0]["fused"]
    settings = {k: v for k, v in config.optimizer.items() if k in fused.param_groups[0]}
    plain = type(fused)(layers[1].parameters(), **settings, fused=False)
    for _ in range(20):
        for layer, step in zip(layers, (fused, plain), strict=True):
            step.zero_grad()
            layer(torch.arange(10.0).view(2, 5).double()).pow(2).sum().backward()
            step.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("stop_after", [1, 5, 6, 7, 13, 17])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_config, norm, stop_after, tmp_path):
    """Stop after any step, through a file, into fresh objects: the same bits."""
    config = tiny_config(
        f"norm={norm}", "epochs=3", "model.dropout=0.2", "dataset.augmentation=pad_crop_flip"
    )
    whole = start(config)
    expected = rows(whole)

    first = start(config)
    before = []
    for row in first.run():
        before += [row] if row else []
        if first.position.step == stop_after:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            break
    torch.rand(3)  # the generator must come from the checkpoint
    second = start(config)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    after = [r for r in second.run() if r is not None]
    assert [dataclasses.replace(r, **TIMES) for r in before + after] == expected
    assert_same_state(whole, second)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny_config):
    one, two, other = (start(tiny_config(f"seed={seed}")) for seed in (1, 1, 2))
    assert rows(one) == rows(two) != rows(other)
    assert_same_state(one, two)


def test_test_error_is_exact_and_in_eval_mode(tiny_config, monkeypatch):
    """Chunks that do not divide the test set; dropout off; running statistics untouched."""
    monkeypatch.setattr("gnbench.train.engine.EVALUATION_CHUNK", 7)
    training = start(tiny_config("norm=bn", "model.dropout=0.9", "epochs=1"))
    [row] = rows(training)
    model = training.engine.model
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_sum, wrong = training.engine.evaluate(training.test)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    with torch.no_grad():
        logits = model(training.test.chunk(0, 20)[0])
    labels = tiny.dataset().test_labels
    assert wrong == row.test_wrong == (logits.argmax(1) != labels).sum().item()
    assert row.test_total == 20
    assert row.test_error == 100 * row.test_wrong / 20
    expected = F.cross_entropy(logits, labels, reduction="sum").item()
    assert loss_sum == pytest.approx(expected, rel=1e-5)
    assert row.test_loss == pytest.approx(expected / 20, rel=1e-5)


def test_the_partial_batch_is_used_and_counted(tiny_config):
    training = start(tiny_config("batch_size=10", "epochs=2"))
    assert training.steps_per_epoch == 5
    seen = []
    take = training.engine.train_steps

    def spy(epoch, at, most):
        seen.append(epoch.plan.order[slice(*epoch.span(at))])
        return take(epoch, at, most)

    training.engine.train_steps = spy
    one, two = rows(training)
    assert [len(batch) for batch in seen] == [10, 10, 10, 10, 8] * 2
    assert torch.equal(torch.cat(seen[:5]).sort().values, torch.arange(48))
    assert (one.step, two.step) == (5, 10)
    assert round(one.train_error * 48 / 100, 6).is_integer()


def test_a_last_batch_that_batch_norm_cannot_use_is_dropped(tiny_config, caplog):
    """ResNet with the ImageNet stem shrinks 8×8 images to 1×1: one value per channel at batch 1."""
    network = ("model=resnet18", "model.stem=imagenet", "batch_size=47")
    dropped = start(tiny_config(*network, "norm=bn"))
    assert (dropped.steps_per_epoch, dropped.total_steps) == (1, 2)
    kept = start(tiny_config(*network, "norm=gn"))
    assert (kept.steps_per_epoch, kept.total_steps) == (2, 4)
    assert start(tiny_config("norm=bn", "batch_size=47")).steps_per_epoch == 2  # spatial 2×2 there


def test_fixed_steps_gives_every_batch_size_the_same_number_of_steps(tiny_config):
    for size in (3, 8, 24):
        training = start(
            tiny_config("batch=fixed_steps", "batch.reference_size=8", f"batch_size={size}")
        )
        assert training.total_steps == 12
        last = rows(training)[-1]
        assert last.step == 12
        assert last.epoch == math.ceil(12 / (48 / size))


def test_the_schedule_of_fixed_steps_is_the_same_at_every_batch_size(tiny_config):
    """Its epochs are those of the reference size, or at batch size 2 a warm-up would not fit."""
    factors = []
    for size in (2, 8, 24):
        engine = start(
            tiny_config(
                "batch=fixed_steps", "batch.reference_size=8", f"batch_size={size}",
                "schedule.per=epoch", "schedule.warmup_epochs=0.5",
            )
        ).engine  # fmt: skip
        factors.append([engine.learning_rate(step) for step in range(12)])
    assert factors[0] == factors[1] == factors[2]
    assert factors[0][0] < factors[0][3] > factors[0][11]


def test_learning_rate_of_each_row_is_that_of_its_last_step(tiny_config):
    training = start(tiny_config("epochs=3", "schedule.per=epoch"))
    factors = [0.5 * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
    assert [row.lr for row in rows(training)] == pytest.approx([1e-3 * f for f in factors])


def test_weight_decay_spares_vectors_when_asked(tiny_config):
    training = start(tiny_config("norm=bn", "optimizer.decay_norm_and_bias=false"))
    decayed, spared = training.engine.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in spared["params"]} == {1}
    [everything] = start(tiny_config("norm=bn")).engine.optimizer.param_groups
    assert len(everything["params"]) == len(decayed["params"]) + len(spared["params"])


def test_divergence_ends_the_run_with_a_measured_row(tiny_config):
    training = start(tiny_config("norm=none", "optimizer=sgd", "optimizer.lr=1e9", "epochs=50"))
    result = rows(training)
    assert training.diverged
    assert len(result) < 50
    assert not math.isfinite(result[-1].train_loss)
    assert result[-1].test_total == 20
    assert result[-1].test_error == 75.0  # every image is given to one of four classes


def test_divergence_within_an_epoch_is_seen_at_the_next_check(tiny_config, monkeypatch):
    monkeypatch.setattr("gnbench.train.loop.DIVERGENCE_CHECK", 4)
    training = start(
        tiny_config("norm=none", "optimizer=sgd", "optimizer.lr=1e9", "batch_size=2", "epochs=9")
    )
    [row] = rows(training)
    assert row.step % 4 == 0
    assert row.step < training.steps_per_epoch


@pytest.mark.parametrize("norm", ["none", "bn", "gn", "ln", "in", "lrn"])
@pytest.mark.parametrize("model", ["simplenetv2", "resnet18"])
def test_bf16_gradients_are_those_of_fp32_within_its_rounding(model, norm):
    """bf16 rounds to a relative 2⁻⁹ after every layer; some 40 roundings there and back, amplified
    by norms over few values, leave direction within 25° (cosine 0.9) and length within 10 %.
    """
    gradients = {}
    for precision in ("fp32", "bf16"):
        config = compose(
            "dataset=fashion_mini", f"model={model}", f"norm={norm}", f"precision={precision}"
        )
        training = start(config)
        inputs, labels = training.train.chunk(0, 32)
        with training.engine._autocast():
            logits = training.engine.model(inputs)
        assert logits.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        F.cross_entropy(logits.float(), labels).backward()
        gradients[precision] = torch.cat(
            [p.grad.flatten() for p in training.engine.model.parameters()]
        )
    cosine = F.cosine_similarity(gradients["bf16"], gradients["fp32"], dim=0).item()
    ratio = (gradients["bf16"].norm() / gradients["fp32"].norm()).item()
    assert cosine > 0.9
    assert ratio == pytest.approx(1, abs=0.1)


def test_bf16_trains_and_keeps_its_weights_in_fp32(tiny_config):
    training = start(tiny_config("precision=bf16"))
    result = rows(training)
    assert all(math.isfinite(row.train_loss) for row in result)
    assert {p.dtype for p in training.engine.model.parameters()} == {torch.float32}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("norm", ["none", "bn", "gn", "ln", "in", "lrn"])
def test_a_run_on_cuda_starts_as_on_the_cpu_and_repeats_itself(tiny_config, norm):
    config = tiny_config(f"norm={norm}", "device=cuda", "epochs=3")
    one = gnbench.run(config)
    assert one["status"] == "completed"
    assert one["peak_memory_bytes"] > 0
    first, second = (start(config) for _ in range(2))
    cpu = start(tiny_config(f"norm={norm}", "epochs=3"))
    for a, b in zip(first.engine.model.parameters(), cpu.engine.model.parameters(), strict=True):
        assert torch.equal(a.cpu(), b)
    assert rows(first) == rows(second)
    assert_same_state(first, second)


def test_no_network_is_built_from_the_wrong_precision():
    with pytest.raises(ValueError, match="precision=fp64: choose one of fp32, bf16"):
        compose("precision=fp64")
