import pytest
import torch
from torch import nn

from gnbench.norms import (
    LocalResponseNorm,
    ReferenceGroupNorm,
    SyncBatchNorm,
    batch_group_norm,
    group_norm,
    imprecise_statistics,
)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return 3 + 2 * torch.randn(4, 12, 5, 3, dtype=torch.float64, generator=generator)


def randomized(norm):
    """Give γ and β values that a forgotten or transposed one would not survive."""
    norm = norm.double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
    return norm


def by_hand(x, groups, eps=1e-5):
    """Σ over one group at a time, with Python's own arithmetic for the mean and the variance."""
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            values = x[n, g * size : (g + 1) * size]
            flat = values.flatten().tolist()
            mean = sum(flat) / len(flat)
            variance = sum((v - mean) ** 2 for v in flat) / len(flat)
            out[n, g * size : (g + 1) * size] = (values - mean) / (variance + eps) ** 0.5
    return out


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("layer", [group_norm, ReferenceGroupNorm])
def test_group_norm_against_hand_arithmetic(layer, groups, x):
    norm = randomized(layer(12, num_groups=groups))
    expected = by_hand(x, groups) * norm.weight.view(1, 12, 1, 1) + norm.bias.view(1, 12, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_the_two_group_norms_agree_in_their_gradients(groups, x):
    gradients = []
    for layer in (group_norm, ReferenceGroupNorm):
        norm = randomized(layer(12, num_groups=groups))
        inputs = x.clone().requires_grad_()
        norm(inputs).pow(3).sum().backward()
        gradients.append([inputs.grad, norm.weight.grad, norm.bias.grad])
    for torchs, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(torchs, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm_channels_last_has_the_same_gradients(groups):
    """A silent error of this kind stood in torch once; the training runs channels last."""
    torch.manual_seed(0)
    values = torch.randn(4, 12, 5, 3)
    upstream = torch.randn_like(values)  # a dense gradient of no special layout
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        norm = group_norm(12, num_groups=groups)
        x = values.clone(memory_format=memory_format).requires_grad_()
        (norm(x) * upstream).sum().backward()
        gradients.append([x.grad, norm.weight.grad, norm.bias.grad])
    for plain, channels_last in zip(*gradients, strict=True):
        torch.testing.assert_close(channels_last, plain, rtol=1e-5, atol=1e-5)


FORMATS = (torch.contiguous_format, torch.channels_last)
STATISTICS = {  # the axes of N,C,H,W, or of N,groups,C/groups,H,W, over which each takes them
    "bn": (lambda: nn.BatchNorm2d(4), None, (0, 2, 3)),
    "syncbn": (lambda: SyncBatchNorm(4), None, (0, 2, 3)),
    "in": (lambda: nn.InstanceNorm2d(4, affine=True), None, (2, 3)),
    "gn": (lambda: group_norm(4, 2), 2, (2, 3, 4)),
    "ln": (lambda: group_norm(4, 1), 1, (2, 3, 4)),
    "reference": (lambda: ReferenceGroupNorm(4, 2), 2, (2, 3, 4)),
}


def standardized(x, groups, over):
    grouped = x if groups is None else x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    variance = grouped.var(over, correction=0, keepdim=True)
    return ((grouped - grouped.mean(over, keepdim=True)) / (variance + 1e-5).sqrt()).reshape(
        x.shape
    )


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("norm", STATISTICS)
@pytest.mark.parametrize("ratio", [0, 10, 17, 100, 1000, 10_000])
def test_a_mean_that_is_large_beside_its_deviation(norm, memory_format, ratio):
    """In float32 against float64, forwards and backwards, to 1e-3; batch norm says where not."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    x = (x + ratio).contiguous(memory_format=memory_format).requires_grad_()
    make, groups, over = STATISTICS[norm]
    layer = make()
    layer(x).backward(upstream)
    exact = x.detach().double().requires_grad_()
    expected = standardized(exact, groups, over)
    expected.backward(upstream.double())
    if norm in ("bn", "syncbn") and ratio >= 1000:
        for _ in range(100):  # until the running statistics are those of the batch
            layer(x)
        assert "standard deviations" in imprecise_statistics(layer, x)
        return
    if norm == "in" and ratio >= 10_000:
        before = layer(x)
        assert "standard deviations" in imprecise_statistics(layer, x)
        torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
        return
    assert imprecise_statistics(layer, x) is None
    torch.testing.assert_close(make()(x).double(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=1e-3)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("groups", [1, 2])
def test_group_norm_of_two_values_far_from_zero(memory_format, groups):
    """Means of 10,000, deviations of 1: ±1, but for ε."""
    x = torch.full((2, 4, 8, 8), 9_999.0)
    x[..., ::2] = 10_001.0
    out = group_norm(4, groups)(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(out, (x - 10_000) * 0.999995, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("norm", STATISTICS)
def test_constant_inputs_give_beta(norm, memory_format, value):
    make, groups, _ = STATISTICS[norm]
    layer = make()
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -2.0, 3.0, 0.0]))
    x = torch.full((3, 4, 8, 8), value).contiguous(memory_format=memory_format).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    expected = layer.bias[:, None, None].expand(3, 4, 8, 8)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3 if groups is None else 1e-5)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("layer", [group_norm, ReferenceGroupNorm])
def test_a_group_of_one_value_gives_beta(layer):
    norm = layer(4, 4)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, -2.0, 3.0, 0.0]))
    x = torch.tensor([0.3, 7.0, -1000.0, 0.1]).reshape(1, 4, 1, 1).repeat(3, 1, 1, 1)
    torch.testing.assert_close(norm(x)[:, :, 0, 0], norm.bias.expand(3, 4))


@pytest.mark.parametrize("layer", [group_norm, ReferenceGroupNorm])
def test_one_group_is_layer_norm_and_c_groups_are_instance_norm(layer, x):
    layer_norm = nn.LayerNorm(x.shape[1:], elementwise_affine=False).double()
    instance_norm = nn.InstanceNorm2d(12).double()
    torch.testing.assert_close(layer(12, num_groups=1).double()(x), layer_norm(x))
    torch.testing.assert_close(layer(12, num_groups=12).double()(x), instance_norm(x))
    torch.testing.assert_close(layer(12, channels_per_group=1).double()(x), instance_norm(x))


@pytest.mark.parametrize("layer", [group_norm, ReferenceGroupNorm])
def test_group_norm_does_not_see_the_rest_of_the_batch(layer, x):
    norm = randomized(layer(12, num_groups=3))
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]), rtol=0, atol=0)
    assert not torch.allclose(
        nn.BatchNorm2d(12).double()(x)[:1], nn.BatchNorm2d(12).double()(x[:1])
    )


def test_group_norm_is_invariant_to_scale_and_shift_of_its_input(x):
    norm = group_norm(12, num_groups=3, eps=1e-12).double()
    torch.testing.assert_close(norm(7 * x - 5), norm(x))


@pytest.mark.parametrize("layer", [group_norm, ReferenceGroupNorm])
def test_affine_and_eps_are_settable(layer, x):
    assert list(layer(12, num_groups=3, affine=False).parameters()) == []
    norm = layer(12, num_groups=3, eps=0.5).double()
    torch.testing.assert_close(norm(x), by_hand(x, 3, eps=0.5))


@pytest.mark.parametrize("layer", [group_norm, ReferenceGroupNorm])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_groups=None and channels_per_group=None: give exactly one"),
        ({"num_groups": 2, "channels_per_group": 2}, "num_groups=2 and channels_per_group=2"),
        ({"num_groups": 5}, "num_groups=5 does not divide 12 channels: use 1, 2, 3, 4, 6, 12"),
        ({"channels_per_group": 0}, "channels_per_group=0 does not divide 12"),
        ({"num_groups": -3}, "num_groups=-3 does not divide 12"),
    ],
)
def test_group_norm_refuses(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(12, **arguments)


def test_batch_norm_running_statistics_follow_their_definition(x):
    """Ioffe & Szegedy 2015, algorithm 2, as a moving average with the unbiased variance."""
    norm = nn.BatchNorm2d(12, momentum=0.3).double()
    mean, variance = torch.zeros(12).double(), torch.ones(12).double()
    for batch in (x, 2 * x + 1):
        norm(batch)
        flat = batch.transpose(0, 1).flatten(1)
        mean = 0.7 * mean + 0.3 * flat.mean(dim=1)
        variance = 0.7 * variance + 0.3 * flat.var(dim=1, correction=1)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    norm.eval()
    expected = (x - mean.view(1, 12, 1, 1)) / (variance.view(1, 12, 1, 1) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_local_response_norm_against_hand_arithmetic(x):
    """Krizhevsky et al. 2012, 3.3, with α over the window size as in torch."""
    norm = LocalResponseNorm(12, size=5, alpha=0.2, beta=0.75, k=2.0)
    expected = torch.empty_like(x)
    for c in range(12):
        window = x[:, max(0, c - 2) : c + 3].pow(2).sum(dim=1)
        expected[:, c] = x[:, c] / (2.0 + 0.2 / 5 * window) ** 0.75
    torch.testing.assert_close(norm(x), expected)
    with pytest.raises(ValueError, match="size=13 must be from 1 to the number of channels"):
        LocalResponseNorm(12, size=13)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_local_response_norm_is_torchs(size, x):
    ours, torchs = (
        LocalResponseNorm(12, size, 0.3, 0.7, 1.5),
        nn.LocalResponseNorm(size, 0.3, 0.7, 1.5),
    )
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(i) for layer, i in zip((ours, torchs), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.pow(3).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def of_batch_group(images, channels_per_group=1, **settings):
    return randomized(batch_group_norm(12, images, channels_per_group, **settings))


@pytest.mark.parametrize(
    ("images", "each", "corner"),
    [
        (1, 1, lambda: nn.InstanceNorm2d(12, affine=True)),
        (1, "all", lambda: nn.GroupNorm(1, 12)),
        (1, 4, lambda: nn.GroupNorm(3, 12)),
        (4, 1, lambda: nn.BatchNorm2d(12)),
        (9, 1, lambda: nn.BatchNorm2d(12)),  # more than the batch holds
    ],
    ids=["IN", "LN", "GN", "BN", "BN of a smaller batch"],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_corners_of_batch_group_norm_are_torchs_layers(images, each, corner, training, x):
    layers = [of_batch_group(images, each), randomized(corner())]
    outputs = []
    for layer in layers:
        layer(x + 1)  # moves the running statistics
        layer.train(training)
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        output.pow(3).sum().backward()
        gradients = [p.grad for p in layer.parameters()]
        outputs.append([output, inputs.grad, *gradients])
    for ours, torchs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)


def test_ghost_bn_is_a_loop_over_torchs_batch_norm(x):
    """Also in its running statistics, which every chunk moves once; the last chunk is smaller."""
    x = torch.cat([x, x.flip(0) + 1, x[:1] - 2])  # nine images: four, four and one
    ghost, torchs = of_batch_group(4), randomized(nn.BatchNorm2d(12))
    torch.testing.assert_close(
        ghost(x), torch.cat([torchs(x[:4]), torchs(x[4:8]), torchs(x[8:])]), rtol=0, atol=0
    )
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ghost.bn, name), getattr(torchs, name), rtol=0, atol=0)
    torch.testing.assert_close(ghost.eval()(x), torchs.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_group_norm_against_hand_arithmetic(affine, x):
    """Two images and four channels: moments of each block by Python's own arithmetic."""
    norm = of_batch_group(2, 4, affine=affine, momentum=None)
    expected, means = torch.empty_like(x), []
    for n in (0, 2):
        for c in (0, 4, 8):
            block = x[n : n + 2, c : c + 4]
            flat = block.flatten().tolist()
            mean = sum(flat) / len(flat)
            variance = sum((v - mean) ** 2 for v in flat) / len(flat)
            expected[n : n + 2, c : c + 4] = (block - mean) / (variance + 1e-5) ** 0.5
            means.append(mean)
    scale = torch.linspace(-1, 2, 12).double().view(1, 12, 1, 1)  # as in `randomized`
    expected = expected * scale + scale if affine else expected
    torch.testing.assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)
    averaged = torch.tensor(means, dtype=torch.float64).view(2, 3).mean(dim=0)
    torch.testing.assert_close(norm.bn.running_mean, averaged, rtol=1e-9, atol=1e-9)
    # In eval mode each image has the running statistics of its groups of channels.
    mean = norm.bn.running_mean.repeat_interleave(4).view(1, 12, 1, 1)
    variance = norm.bn.running_var.repeat_interleave(4).view(1, 12, 1, 1)
    alone = (x[:1] - mean) / (variance + 1e-5).sqrt()
    alone = alone * scale + scale if affine else alone
    torch.testing.assert_close(norm.eval()(x[:1]), alone, rtol=1e-9, atol=1e-9)


def test_a_last_chunk_of_single_values_is_refused_as_by_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_group_norm(12, 2)(torch.zeros(3, 12, 1, 1))


@pytest.mark.parametrize(
    ("images", "each", "words"),
    [(0, 1, "images=0 must be at least 1"), (2, 5, "channels_per_group=5 does not divide 12")],
)
def test_batch_group_norm_refuses_what_it_cannot_do(images, each, words):
    with pytest.raises(ValueError, match=words):
        batch_group_norm(12, images, each)
