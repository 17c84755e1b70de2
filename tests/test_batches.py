import copy

import numpy as np
import pytest
import torch

from gnbench import build
from gnbench.check import compose
from gnbench.datasets import Dataset
from gnbench.train.batches import PAD, EpochPlan, ResidentData, draw_epoch, evaluation_chunk
from tests import tiny

CPU = torch.device("cpu")
LABELS = torch.tensor([1, 0, 0, 2, 0, 1, 0, 1, 0, 2, 1, 0, 2, 0])  # seven 0, four 1, three 2


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


@pytest.mark.parametrize("where", [slice(0, 4), torch.tensor([5, 0])])
def test_inputs_in_either_order_in_memory_are_the_same(data, where):
    plan = EpochPlan(torch.arange(6), torch.arange(6) % 2 == 0, None)
    other = copy.copy(data)
    other.channels_last = False
    for one, two in ((data, other), (data.reordered(plan.order), other.reordered(plan.order))):
        (last, labels), (rows, same) = one.batch(plan, where), two.batch(plan, where)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert rows.is_contiguous()
        assert torch.equal(last, rows)
        assert torch.equal(labels, same)
    assert torch.equal(data.chunk(2, 5)[0], other.chunk(2, 5)[0])
    assert other.chunk(2, 5)[0].is_contiguous()


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


def runs_of(labels):
    """Return [class, how many of it in a row] from the front to the end."""
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("epoch", range(3))
def test_sorted_by_class_keeps_the_shuffled_order_within_a_class(epoch):
    shuffled = draw_epoch(7, epoch, 14, "none").order
    order = draw_epoch(7, epoch, 14, "none", "sorted_by_class", labels=LABELS).order
    by_hand = [i for label in (0, 1, 2) for i in shuffled.tolist() if LABELS[i] == label]
    assert order.tolist() == by_hand
    assert runs_of(LABELS[order]) == [(0, 7), (1, 4), (2, 3)]


def test_class_blocks_are_cut_from_each_class_and_the_shorter_ones_come_last():
    """Blocks of three: two and one of class 0, one and one of class 1, one of class 2."""
    seen = set()
    for epoch in range(60):
        shuffled = draw_epoch(7, epoch, 14, "none").order.tolist()
        order = draw_epoch(7, epoch, 14, "none", "class_blocks", 3, LABELS).order
        blocks = [order[:12].view(4, 3)[i].tolist() for i in range(4)] + [[i] for i in order[12:]]
        classes = [int(LABELS[block[0]]) for block in blocks]
        assert sorted(classes[:4]) == [0, 0, 1, 2]
        assert sorted(classes[4:]) == [0, 1]
        for label in (0, 1, 2):  # the blocks of a class, in some order, are its images as shuffled
            own = [i for i in shuffled if LABELS[i] == label]
            cut = [own[at : at + 3] for at in range(0, len(own), 3)]
            assert sorted(cut) == sorted([b for b in map(list, blocks) if LABELS[b[0]] == label])
        seen.add(tuple(classes))
    assert len(seen) == 12 * 2  # every order of the four blocks, and of the two shorter ones


def test_a_block_of_one_image_is_a_shuffle_and_one_larger_than_a_class_keeps_it_whole():
    order = draw_epoch(0, 0, 14, "none", "class_blocks", 1, LABELS).order
    assert order.sort().values.tolist() == list(range(14))
    assert len(runs_of(LABELS[order])) > 3
    found = {
        tuple(runs_of(LABELS[draw_epoch(0, e, 14, "none", "class_blocks", 8, LABELS).order]))
        for e in range(40)
    }
    assert {frozenset(order) for order in found} == {frozenset({(0, 7), (1, 4), (2, 3)})}
    assert len(found) == 6


@pytest.mark.parametrize("order", [("sorted_by_class",), ("class_blocks", 3)], ids=lambda o: o[0])
def test_an_order_by_class_is_a_function_of_seed_and_epoch_too(order):
    def drawn(seed, epoch, augmentation="none"):
        block = order[1] if len(order) > 1 else None
        return draw_epoch(seed, epoch, 14, augmentation, order[0], block, LABELS).order.tolist()

    assert drawn(3, 5) == drawn(3, 5) == drawn(3, 5, "pad_crop_flip")
    assert drawn(3, 5) != drawn(3, 6)
    assert drawn(3, 5) != drawn(4, 5)


def test_the_shuffled_order_is_that_of_runs_that_people_have():
    """The values of numpy's PCG64, whose stream does not change between releases."""
    plan = draw_epoch(3, 5, 8, "pad_crop_flip")
    rng = np.random.default_rng([3, 5])
    assert plan.order.tolist() == rng.permutation(8).tolist()
    assert plan.flip.tolist() == (rng.random(8) < 0.5).tolist()
    assert plan.shift.tolist() == rng.integers(-PAD, PAD + 1, size=(8, 2)).tolist()


def plain(root=None):
    """Images that are 50 times their class all over."""
    labels = torch.arange(48) % 4
    images = (50 * labels).to(torch.uint8)[:, None, None, None].expand(48, 8, 8, 1)
    return Dataset(images, labels, images[:20], labels[:20])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("size", "order"),
    [(48, ("sorted_by_class",)), (24, ("sorted_by_class",)), (20, ("class_blocks", 4))],
    ids=str,
)
def test_a_training_sees_the_images_in_this_order(size, order, accumulate):
    """What the network is given, one forward pass after the other, in two epochs."""
    config = compose(
        *tiny.OVERRIDES,
        *("dataset._target_=tests.test_batches.plain", "dataset.augmentation=none"),
        *(f"dataset.train_size={size}", f"dataset.order={order[0]}"),
        *(f"dataset.block={block}" for block in order[1:]),
        *("batch_size=4", f"batch.accumulate={accumulate}"),
    )
    training = build.build_training(config, build.load_dataset(config))
    seen = []
    training.engine.model.register_forward_pre_hook(
        lambda model, inputs: seen.append(inputs[0][:, 0, 0, 0]) if model.training else None
    )
    list(training.run())
    assert {len(images) for images in seen} == {4}
    found = ((torch.cat(seen) * 0.3530 + 0.2860) * 255 / 50).round().to(torch.int64)
    labels = torch.arange(size) % 4
    for epoch, own in enumerate(found.view(2, size)):
        plan = draw_epoch(0, epoch, size, "none", *order, labels=labels)
        assert own.tolist() == labels[plan.order].tolist()
    if order[0] == "sorted_by_class":
        assert runs_of(found[:size]) == [(label, size // 4) for label in range(4)]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist", "fashion_mini"])
def test_datasets_of_small_images_are_evaluated_500_at_a_time(name):
    _, height, width = compose(f"dataset={name}").dataset.image
    assert evaluation_chunk(height, width) == 500


@pytest.mark.parametrize(("side", "images"), [(64, 500), (96, 222), (224, 40), (4096, 1)])
def test_large_images_are_evaluated_fewer_at_a_time(side, images):
    """So that a ResNet-50 at 224×224 needs about as much memory as at 64×64."""
    assert evaluation_chunk(side, side) == images
    large = ResidentData(torch.zeros(3, side, side, 1, dtype=torch.uint8), LABELS, [0], [1], CPU)
    assert large.evaluation_chunk == images
