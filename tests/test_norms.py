import pytest
import torch
from torch import nn

from gnbench.norms import LocalResponseNorm, ReferenceGroupNorm, group_norm


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
