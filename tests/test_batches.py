import pytest
import torch

from gnbench.train.batches import PAD, EpochPlan, ResidentData, draw_epoch

CPU = torch.device("cpu")


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return ResidentData(images, torch.arange(6), [0.5, 0.25, 0.0], [0.5, 1.0, 0.25], CPU)


def pixels(inputs):
    """Undo the normalization."""
    mean = torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1)
    std = torch.tensor([0.5, 1.0, 0.25]).view(1, 3, 1, 1)
    return (255 * (inputs * std + mean)).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_the_plan_is_a_function_of_seed_and_epoch_alone():
    first = draw_epoch(3, 5, 1000, "pad_crop_flip")
    torch.manual_seed(99)
    torch.rand(7)
    again = draw_epoch(3, 5, 1000, "pad_crop_flip")
    for one, other in zip(vars(first).values(), vars(again).values(), strict=True):
        assert torch.equal(one, other)
    for seed, epoch in ((4, 5), (3, 6), (5, 3), (3 + 2**32, 5)):
        assert not torch.equal(first.order, draw_epoch(seed, epoch, 1000, "none").order)
    assert torch.equal(first.order, draw_epoch(3, 5, 1000, "none").order)


def test_a_plan_shows_every_image_once_and_draws_fairly():
    plan = draw_epoch(0, 0, 20_000, "pad_crop_flip")
    assert torch.equal(plan.order.sort().values, torch.arange(20_000))
    assert plan.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    values, counts = plan.shift.unique(return_counts=True)
    assert values.tolist() == list(range(-PAD, PAD + 1))
    assert (counts / 40_000).tolist() == pytest.approx([1 / 9] * 9, abs=0.01)


def test_batches_follow_the_order(data):
    order = torch.tensor([4, 2, 0, 1, 3, 5])
    inputs, labels = data.batch(EpochPlan(order, None, None), slice(1, 4))
    assert labels.tolist() == [2, 0, 1]
    assert torch.equal(pixels(inputs), data.images[[2, 0, 1]])


def test_normalization_against_hand_arithmetic(data):
    inputs, _ = data.chunk(0, 2)
    assert inputs.shape == (2, 3, 8, 8)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    value = data.images[1, 2, 5, 1].item()
    assert inputs[1, 1, 2, 5].item() == pytest.approx((value / 255 - 0.25) / 1.0, abs=1e-6)


def test_flip_mirrors_left_to_right_only_where_drawn(data):
    flip = torch.tensor([True, False, True, False, False, False])
    inputs, _ = data.batch(EpochPlan(torch.arange(6), flip, None), slice(3))
    expected = data.images[:3].clone()
    expected[0], expected[2] = expected[0].flip(1), expected[2].flip(1)
    assert torch.equal(pixels(inputs), expected)


def test_shift_is_a_crop_of_the_padded_image(data):
    shift = torch.tensor([[-PAD, PAD], [0, 0], [2, -3], [0, 0], [0, 0], [0, 0]])
    inputs, _ = data.batch(EpochPlan(torch.arange(6), None, shift), slice(3))
    padded = torch.zeros(3, 8 + 2 * PAD, 8 + 2 * PAD, 3, dtype=torch.uint8)
    padded[:, PAD:-PAD, PAD:-PAD] = data.images[:3]
    for image, (down, right) in enumerate(shift[:3].tolist()):
        top, left = PAD + down, PAD + right
        expected = padded[image, top : top + 8, left : left + 8]
        assert torch.equal(pixels(inputs)[image], expected)
