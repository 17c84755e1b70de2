"""The step and the epochs: against the loop that anybody would write, and against themselves."""

import math

import pytest
import torch
import torch.nn.functional as F

from gnbench.norms import batch_group_norm
from gnbench.train.batches import draw_epoch
from tests.trainings import (
    MEAN,
    NORMS,
    STD,
    assert_same_weights,
    images,
    rows,
    through_a_file,
    timeless,
    training,
)

EXPLODING = {"norm": "none", "optimizer": "sgd", "lr": 1e9}


@pytest.mark.parametrize("batch_size", [8, 10])
def test_the_step_is_the_plain_pytorch_step(batch_size):
    """Torch's own unfused optimizer and scheduler; batches of ten leave a last one of eight."""
    settings = {"optimizer": "sgd", "lr": 0.02, "batch_size": batch_size, "augmentation": "none"}
    ours = training("bn", **settings)
    model = training("bn", **settings).engine.model
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    found = rows(ours)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=False
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ours.total_steps)
    for epoch in range(2):
        loss_sum = wrong = 0
        for batch in draw_epoch(0, epoch, 48, "none").order.split(batch_size):
            x = (images(48)[batch].permute(0, 3, 1, 2) / 255 - MEAN[0]) / STD[0]
            labels = batch % 4
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.item() * len(batch)
            wrong += (logits.argmax(1) != labels).sum().item()
        assert found[epoch].train_loss == pytest.approx(loss_sum / 48, rel=1e-4)
        assert found[epoch].train_error == pytest.approx(100 * wrong / 48)
    for name, plain in model.state_dict().items():
        value = ours.engine.model.state_dict()[name]
        torch.testing.assert_close(value, plain, rtol=1e-3, atol=1e-5)
        assert not torch.equal(plain, initial[name]), f"{name} never moved"


@pytest.mark.parametrize("norm", ["gn", "in", "ln", "lrn", "none"])
def test_accumulated_gradients_take_the_steps_of_the_whole_batch(norm):
    """Passes of three images make steps of 20, 20 and 8: the last groups are smaller."""
    settings = {"optimizer": "sgd", "lr": 0.02, "batch_size": 20}
    whole, parts = training(norm, **settings), training(norm, **settings, images_a_pass=3)
    for one, other in zip(rows(whole), rows(parts), strict=True):
        assert (one.step, one.test_wrong) == (other.step, other.test_wrong)
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)
        assert other.train_error == one.train_error
    for name, value in whole.engine.model.state_dict().items():
        other = parts.engine.model.state_dict()[name]
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch_size", [16, 20])  # 48 images: three whole steps; two and a part
def test_accumulated_batch_norm_is_ghost_batch_norm(batch_size):
    """Over as many images, with its running statistics; over the whole batch it is another."""
    settings = {"optimizer": "sgd", "lr": 0.02, "batch_size": batch_size}
    accumulated = training("bn", **settings, images_a_pass=2)
    ghost = training(lambda channels: batch_group_norm(channels, images=2), **settings)
    for one, other in zip(rows(accumulated), rows(ghost), strict=True):
        assert (one.step, one.test_wrong) == (other.step, other.test_wrong)
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)
    weights = ghost.engine.model.state_dict().values()
    for (name, value), other in zip(
        accumulated.engine.model.state_dict().items(), weights, strict=True
    ):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=name)
    whole = rows(training("bn", **settings))
    assert whole[-1].train_loss != pytest.approx(one.train_loss, rel=1e-3)


def test_a_last_partial_batch_can_be_left_out():
    [row] = rows(training(batch_size=10, drop_last=True, epochs=1))
    assert row.step == 4
    assert (row.train_error * 40 / 100).is_integer()


@pytest.mark.parametrize("norm", ["bn", "gn", "brn", "gn_ws"])
@pytest.mark.parametrize("stop_after", [1, 5, 6, 7, 17])
def test_a_resumed_run_equals_an_uninterrupted_one(norm, stop_after, tmp_path):
    """Stop after any step, through a file, into fresh objects: the same bits."""
    settings = {"epochs": 3, "dropout": 0.2, "augmentation": "pad_crop_flip"}
    whole = training(norm, **settings)
    expected = rows(whole)
    first = training(norm, **settings)
    before = []
    for row in first.run():
        before += [timeless(row)] if row else []
        if first.position.step == stop_after:
            state = through_a_file(first, tmp_path / "checkpoint.pt")
            break
    torch.rand(3)  # the generator must come from the checkpoint
    second = training(norm, **settings)
    second.load_state_dict(state)
    assert before + rows(second) == expected
    assert_same_weights(whole, second)


def test_the_form_of_a_checkpoint_stays():
    """Or a run that an earlier version began could not go on."""
    state = training().state_dict()
    assert state.keys() == {"position", "diverged", "model", "optimizer", "processes"}
    assert state["position"].keys() == {"epoch", "step", "epoch_step", "seen", "epoch_seconds"}
    assert state["processes"][0].keys() == {"loss_sum", "wrong", "rng", "cuda_rng"}


def in_channels_last(one):
    """Have the weights, and so the moments to come, lie as on a GPU."""
    one.engine.model.to(memory_format=torch.channels_last)
    return one


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("saved", "resumed"), [(True, True), (False, True), (True, False)])
def test_moments_of_a_checkpoint_come_to_lie_as_the_weights_do(tmp_path, optimizer, saved, resumed):
    """One of a CPU goes on on a GPU, and the other way round."""

    def built(last):
        one = training(optimizer=optimizer, epochs=3)
        return in_channels_last(one) if last else one

    whole, first = built(resumed), built(saved)
    expected = rows(whole)
    calls = first.run()
    while first.position.step < 8:
        next(calls)
    other = built(resumed)
    other.load_state_dict(through_a_file(first, tmp_path / "checkpoint.pt"))
    kernels = other.engine.model[4].weight
    assert kernels.is_contiguous() is not resumed
    for parameter, values in other.engine.optimizer.state.items():
        moments = [value for value in values.values() if value.shape == parameter.shape]
        assert moments
        assert {moment.stride() for moment in moments} == {parameter.stride()}
    found = rows(other)
    if saved == resumed:
        assert found == expected[-len(found) :]
        assert_same_weights(other, whole)
    else:  # the steps before were rounded otherwise
        for row, wanted in zip(found, expected[-len(found) :], strict=True):
            assert row.train_loss == pytest.approx(wanted.train_loss, rel=1e-3)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    found = []
    for seed in (1, 1, 2):
        found.append((one := training(seed=seed), rows(one)))
    (one, first), (two, second), (_, other) = found
    assert first == second != other
    assert_same_weights(one, two)


def test_the_test_error_is_exact_and_in_eval_mode(monkeypatch):
    """Chunks that do not divide the test set; dropout off; running statistics untouched."""
    monkeypatch.setattr("gnbench.train.batches.EVALUATION_CHUNK", 7)
    one = training("bn", dropout=0.9, epochs=1)
    [row] = rows(one)
    model = one.engine.model
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_sum, wrong = one.engine.evaluate(one.test)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    with torch.no_grad():
        logits = model(one.test.chunk(0, 20)[0])
    labels = torch.arange(20) % 4
    assert wrong == row.test_wrong == (logits.argmax(1) != labels).sum().item()
    assert (row.test_total, row.test_error) == (20, 100 * row.test_wrong / 20)
    expected = F.cross_entropy(logits, labels, reduction="sum").item()
    assert loss_sum == pytest.approx(expected, rel=1e-5)
    assert row.test_loss == pytest.approx(expected / 20, rel=1e-5)
    assert one.engine.totals() == (0, 0)


def test_a_row_states_the_learning_rate_of_its_last_step():
    factors = [0.5 * (1 + math.cos(math.pi * step / 18)) for step in (5, 11, 17)]
    found = rows(training(epochs=3))
    assert [row.lr for row in found] == pytest.approx([1e-3 * factor for factor in factors])


def test_a_training_ends_after_its_steps_in_the_midst_of_an_epoch():
    one = training(total_steps=9)
    last = rows(one)[-1]
    assert (last.epoch, last.step) == (2, 9)
    assert (last.train_error * 24 / 100).is_integer()


def test_divergence_ends_the_run_with_a_measured_row():
    one = training(**EXPLODING, epochs=50)
    found = rows(one)
    assert one.diverged
    assert len(found) < 50
    assert not math.isfinite(found[-1].train_loss)
    assert found[-1].test_error == 75.0  # every image is given to one of four classes


def test_divergence_within_an_epoch_is_seen_at_the_next_check(monkeypatch):
    monkeypatch.setattr("gnbench.train.loop.DIVERGENCE_CHECK", 4)
    one = training(**EXPLODING, batch_size=2)
    [row] = rows(one)
    assert row.step % 4 == 0
    assert row.step < one.steps_per_epoch


@pytest.mark.parametrize("norm", NORMS)
def test_bf16_gradients_are_those_of_fp32_within_its_rounding(norm):
    """bf16 rounds to a relative 2⁻⁹ after every layer; some ten roundings there and back, amplified
    by norms over few values, leave direction within 25° (cosine 0.9) and length within 10 %.
    """
    gradients = []
    for precision in ("fp32", "bf16"):
        one = training(norm, precision=precision, total_steps=1, batch_size=16)
        rows(one)
        gradients.append(torch.cat([p.grad.flatten() for p in one.engine.model.parameters()]))
    assert {p.dtype for p in one.engine.model.parameters()} == {torch.float32}
    fp32, bf16 = gradients
    assert not torch.equal(fp32, bf16)
    assert F.cosine_similarity(fp32, bf16, dim=0) > 0.9
    assert (bf16.norm() / fp32.norm()).item() == pytest.approx(1, abs=0.1)
