"""Norms later than group norm: each against its formula, and what all of them must keep to."""

import math
import sys

import pytest
import torch
from torch import nn

from gnbench import ConfigError
from gnbench.build import build_model, build_training
from gnbench.check import compose
from gnbench.datasets import load
from gnbench.norms import BatchRenorm, group_norm, standardize_weights
from gnbench.norms.weights import StandardizedWeight

TIMM = ("evonorm_s0", "evonorm_b0", "frn")  # compute their statistics in float32 at any precision
OWN = ("brn", "ln_channel", "rms", "dyt")
RIVALS = (*TIMM, *OWN)
FASHION = (
    "dataset=fashion_mini",
    "model=simplenetv2",
    "model.channels=[16,16,16]",
    "model.hidden=16",
)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return 3 + 2 * torch.randn(4, 12, 5, 3, dtype=torch.float64, generator=generator)


def layer(norm, channels=12, *overrides):
    """Return the layer as the YAML file has it, in float64, its parameters all different."""
    if norm in TIMM:
        pytest.importorskip("timm")
    model = build_model(
        compose(
            f"norm={norm}",
            "model._target_=tests.test_rivals.OneNorm",
            f"dataset.image=[{channels},8,8]",
            f"dataset.mean={[0.5] * channels}",
            f"dataset.std={[0.5] * channels}",
            *(["norm.num_groups=4"] if norm == "evonorm_s0" else []),
            *overrides,
        )
    )
    made = model.norm.double()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim:
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
    return made


class OneNorm(nn.Module):
    """A network of a norm and a linear layer."""

    def __init__(self, norm, image, classes, **settings):
        super().__init__()
        self.norm = norm(image[0])
        self.head = nn.Linear(image[0], classes)

    def forward(self, x):
        return self.head(self.norm(x).mean((2, 3)))


def per_channel(parameter):
    return parameter.view(1, -1, 1, 1)


def by_hand(norm, layer, x):
    """The formula of the paper, on a batch in training."""

    def deviation(values, over):
        mean = values.mean(over, keepdim=True)
        return ((values - mean).square().mean(over, keepdim=True) + layer.eps).sqrt()

    if norm == "evonorm_s0":
        groups = layer.groups
        grouped = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        spread = deviation(grouped, (2, 3, 4)).expand_as(grouped).reshape(x.shape)
        out = x / (1 + torch.exp(-per_channel(layer.v) * x)) / spread
    elif norm == "evonorm_b0":
        instance = per_channel(layer.v) * x + deviation(x, (2, 3))
        out = x / torch.maximum(deviation(x, (0, 2, 3)).expand_as(x), instance)
    elif norm == "frn":
        out = x / (x.square().mean((2, 3), keepdim=True) + layer.eps).sqrt()
        out = out * per_channel(layer.weight) + per_channel(layer.bias)
        return torch.maximum(out, per_channel(layer.tau))
    elif norm == "ln_channel":
        out = (x - x.mean(1, keepdim=True)) / deviation(x, 1)
    elif norm == "rms":
        return x / (x.square().mean(1, keepdim=True) + layer.eps).sqrt() * per_channel(layer.weight)
    elif norm == "dyt":
        e = torch.exp(2 * layer.alpha * x)
        out = (e - 1) / (e + 1)
    else:  # brn, whose running statistics are 0 and 1 as yet
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        r = ((variance + layer.eps) / (1 + layer.eps)).sqrt().clamp(1 / 3, 3).detach()
        d = (mean / math.sqrt(1 + layer.eps)).clamp(-5, 5).detach()
        out = (x - per_channel(mean)) / deviation(x, (0, 2, 3)) * per_channel(r) + per_channel(d)
    return out * per_channel(layer.weight) + per_channel(layer.bias)


@pytest.mark.parametrize("norm", RIVALS)
def test_outputs_and_gradients_against_the_formula(norm, x):
    norms = layer(norm)
    exact = 1e-5 if norm in TIMM else 1e-12
    upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    found = []
    for function in (norms, lambda values: by_hand(norm, norms, values)):
        inputs = x.clone().requires_grad_()
        norms.zero_grad()
        output = function(inputs)
        output.backward(upstream)
        found.append([output, inputs.grad, *(p.grad for p in norms.parameters())])
    for ours, formula in zip(*found, strict=True):
        torch.testing.assert_close(ours, formula, rtol=exact, atol=exact)


@pytest.mark.parametrize("norm", ["ln_channel", "rms", "dyt"])
def test_gradients_against_differences(norm, x):
    norms = layer(norm)
    assert torch.autograd.gradcheck(norms, x[:1, :, :2, :2].clone().requires_grad_())


@pytest.mark.parametrize("norm", RIVALS)
def test_memory_formats_agree(norm, x):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        norms = layer(norm).float()
        inputs = x.float().clone(memory_format=memory_format).requires_grad_()
        output = norms(inputs)
        output.square().sum().backward()
        results.append([output, inputs.grad, *(p.grad for p in norms.parameters())])
    for plain, channels_last in zip(*results, strict=True):
        torch.testing.assert_close(channels_last, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", RIVALS)
def test_bf16_inputs_give_bf16_outputs_to_its_resolution(norm, x):
    """bf16 has 8 bits; a few roundings of values up to the largest in play."""
    inputs = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(norm).float()(inputs)
    exact = layer(norm)(inputs.double())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.double(), exact, rtol=2**-5, atol=2**-5 * exact.abs().max().item()
    )


@pytest.mark.parametrize("norm", [n for n in RIVALS if n not in ("brn", "evonorm_b0")])
def test_norms_of_one_image_do_not_see_the_others(norm, x):
    norms = layer(norm)
    torch.testing.assert_close(norms(x)[1:2], norms(x[1:2]), rtol=1e-6, atol=1e-6)


def test_filter_response_norm_of_a_single_pixel():
    norms = layer("frn")
    x = torch.linspace(-2, 3, 24, dtype=torch.float64).view(2, 12, 1, 1)
    signs = x / (x.square() + norms.eps).sqrt()
    expected = signs * per_channel(norms.weight) + per_channel(norms.bias)
    torch.testing.assert_close(norms(x), expected.maximum(per_channel(norms.tau)))


def test_channel_layer_norm_is_not_that_over_the_image(x):
    over_channels, over_image = layer("ln_channel"), layer("ln")
    alone = x[:, :, :1, :1]
    torch.testing.assert_close(over_channels(x)[:, :, :1, :1], over_channels(alone))
    assert not torch.allclose(over_image(x)[:, :, :1, :1], over_image(alone), rtol=0.01)
    torch.testing.assert_close(over_channels(alone), over_image(alone), rtol=1e-4, atol=1e-4)


def test_batch_renorm_at_all_its_limits_and_within_the_ramp(x):
    """Half-way up the ramp r is within [1/2, 2] and d within ± 2.5; neither has a gradient."""
    norms = renorm(begin=0.2, r_end=0.6, d_end=0.6)
    norms.forward_passes = 100
    norms.num_batches_tracked.fill_(40)
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    norms.running_var.copy_(
        variance * torch.tensor([25, 9, 1.44, 1, 0.64, 0.04]).double().repeat(2)
    )
    offset = torch.tensor([9.0, 4, 1, 0, -1, -9] * 2).double() * norms.running_var.sqrt()
    norms.running_mean.copy_(mean - offset)
    spread = (norms.running_var + norms.eps).sqrt()
    unclipped = ((variance + norms.eps).sqrt() / spread, offset / spread)
    r = unclipped[0].clamp(0.5, 2)
    d = unclipped[1].clamp(-2.5, 2.5)
    for free, held in zip(unclipped, (r, d), strict=True):
        assert {*torch.sign(free - held).tolist()} == {-1, 0, 1}
    upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    ours = x.clone().requires_grad_()
    output = norms(ours)
    output.backward(upstream)
    formula = x.clone().requires_grad_()
    centered = formula - formula.mean((0, 2, 3), keepdim=True)
    deviation = (centered.square().mean((0, 2, 3), keepdim=True) + norms.eps).sqrt()
    expected = centered / deviation * per_channel(r) + per_channel(d)
    expected = expected * per_channel(norms.weight) + per_channel(norms.bias)
    expected.backward(upstream)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, formula.grad, rtol=1e-12, atol=1e-12)


def test_batch_renorm_is_refused_on_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="norm=brn on 2 processes: it trains by running statistics"
    ):
        compose(*FASHION, "norm=brn")


def test_evonorm_b0_at_evaluation_takes_the_running_variance(x):
    norms = layer("evonorm_b0")
    norms(x)
    expected = 0.9 + 0.1 * x.var((0, 2, 3))
    torch.testing.assert_close(norms.running_var, expected, rtol=1e-6, atol=0)
    spread = (x.var((2, 3), correction=0, keepdim=True) + norms.eps).sqrt()
    whole = torch.maximum(
        per_channel(expected + norms.eps).sqrt().expand_as(x), per_channel(norms.v) * x + spread
    )
    expected = x / whole * per_channel(norms.weight) + per_channel(norms.bias)
    torch.testing.assert_close(norms.eval()(x), expected, rtol=1e-5, atol=1e-5)


def renorm(**settings):
    norms = BatchRenorm(12, momentum=0.1, **settings).double()
    with torch.no_grad():
        norms.weight.copy_(torch.linspace(-1, 2, 12))
        norms.bias.copy_(torch.linspace(0, 1, 12))
    return norms


def test_batch_renorm_whose_limits_are_1_and_0_is_batch_norm(x):
    ours = renorm(r_max=1.0, d_max=0.0)
    theirs = nn.BatchNorm2d(12).double()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_batch_renorm_within_its_limits_normalizes_by_the_running_statistics(x):
    """x̂ = (x − μ)/σ of algorithm 1, once r and d are not clipped."""
    norms = renorm(r_max=1000.0, d_max=1000.0)
    norms.running_mean.fill_(2.5)
    norms.running_var.fill_(9.0)
    frozen = nn.BatchNorm2d(12).double()
    frozen.load_state_dict(norms.state_dict())
    torch.testing.assert_close(norms(x), frozen.eval()(x), rtol=1e-12, atol=1e-12)
    assert norms.running_mean[0].item() == pytest.approx(0.9 * 2.5 + 0.1 * x[:, 0].mean().item())
    assert norms.running_var[0].item() == pytest.approx(0.9 * 9 + 0.1 * x[:, 0].var().item())


def test_the_limits_of_batch_renorm_grow_with_the_training():
    norms = BatchRenorm(1, begin=0.2, r_end=0.6, d_end=0.4)
    norms.forward_passes = 100
    limits = {}
    for done in (0, 20, 30, 40, 60, 100):
        norms.num_batches_tracked.fill_(done)
        limits[done] = tuple(round(value.item(), 6) for value in norms.limits())
    assert limits == {
        0: (1, 0),
        20: (1, 0),
        30: (1.5, 2.5),
        40: (2, 5),
        60: (3, 5),
        100: (3, 5),
    }


def test_a_training_tells_batch_renorm_its_length():
    config = compose(
        *FASHION, "norm=brn", "batch_size=10", "batch.accumulate=2", "epochs=3", "device=cpu"
    )
    training = build_training(config, load(config.dataset))
    norms = [m for m in training.engine.model.modules() if isinstance(m, BatchRenorm)]
    assert [m.forward_passes for m in norms] == [3 * 2000 // 10] * 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r_max": 0.5}, "r_max=0.5 d_max=5.0: must be at least 1 and 0"),
        ({"begin": 0.5}, "begin=0.5 r_end=0.31 d_end=0.19: must be fractions"),
        ({"r_end": 2.0}, "r_end=2.0"),
    ],
)
def test_batch_renorm_refuses(settings, words):
    with pytest.raises(ValueError, match=words):
        BatchRenorm(4, **settings)


def test_batch_renorm_refuses_a_single_value_per_channel():
    with pytest.raises(ValueError, match="single value per channel"):
        BatchRenorm(4)(torch.zeros(1, 4, 1, 1))


def test_standardized_weights_are_those_of_timms_convolution(x):
    timm = pytest.importorskip("timm")
    theirs = timm.layers.StdConv2d(12, 8, 3, padding=1, eps=1e-6).double()
    ours = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1, bias=False)).double()
    ours[0].load_state_dict(theirs.state_dict())
    standardize_weights(ours)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(
        lambda weight: StandardizedWeight()(weight), theirs.weight[:2, :3].detach().requires_grad_()
    )


@pytest.mark.slow
def test_every_convolution_is_standardized_with_any_norm():
    def convolutions(*overrides):
        model = build_model(compose("model=resnet18", *overrides))
        return [m for m in model.modules() if isinstance(m, nn.Conv2d)]

    for overrides in (["norm=gn_ws"], ["norm=bn", "+norm.standardize_weights=true"]):
        found = convolutions(*overrides)
        assert len(found) == 20
        for convolution in found:
            assert convolution.weight.detach().flatten(1).mean(1).abs().max() < 1e-5
    plain = convolutions("norm=gn")
    assert max(c.weight.detach().flatten(1).mean(1).abs().max() for c in plain) > 1e-3


def test_standardized_weights_in_channels_last_and_in_bf16(x):
    def trained(inputs, memory_format=torch.contiguous_format, dtype=torch.float32):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), group_norm(8, 4))
        standardize_weights(block)
        inputs = inputs.clone(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = block(inputs)
        output.float().square().sum().backward()
        return [output.float(), inputs.grad.float(), block[0].parametrizations.weight.original.grad]

    plain = trained(x.float())
    for one, other in zip(trained(x.float(), torch.channels_last), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    output, expected = trained(x.float(), dtype=torch.bfloat16)[0], plain[0]
    bound = 2**-5 * expected.abs().max().item()
    torch.testing.assert_close(output, expected, rtol=2**-5, atol=bound)


def test_standardization_refuses_filters_of_a_single_weight():
    with pytest.raises(ValueError, match="the filters of 0 hold a single weight"):
        standardize_weights(nn.Sequential(nn.Conv2d(1, 4, 1)))
    with pytest.raises(ValueError, match="no Conv2d"):
        standardize_weights(nn.Linear(2, 2))


@pytest.mark.parametrize("norm", ["evonorm_s0", "evonorm_b0", "frn"])
@pytest.mark.parametrize(
    "model",
    ["simplenet", "simplenetv2", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)],
)
def test_networks_leave_out_the_relu_behind_a_norm_that_brings_its_activation(model, norm):
    pytest.importorskip("timm")

    def relus(norm):
        calls = []
        with torch.device("meta"):
            network = build_model(compose(f"model={model}", f"norm={norm}", "batch_size=2"))
            for module in network.modules():
                if isinstance(module, nn.ReLU):
                    module.register_forward_hook(lambda *_: calls.append(1))
            network(torch.zeros(2, 3, 32, 32))
        return len(calls)

    # What stays: behind the hidden layer, and behind the sum of every residual block.
    assert (relus("bn"), relus(norm)) == {
        "simplenet": (4, 1),
        "simplenetv2": (7, 1),
        "resnet18": (17, 8),
        "resnet50": (49, 16),
    }[model]


@pytest.mark.slow
@pytest.mark.parametrize("norm", [*RIVALS, "gn_ws", "bn"])
def test_a_short_training_learns(norm):
    if norm in TIMM:
        pytest.importorskip("timm")
    config = compose(*FASHION, f"norm={norm}", "batch_size=20", "device=cpu", "model.init=he")
    dataset = load(config.dataset)
    training = build_training(config, dataset)
    inputs, labels = training.train.chunk(0, 200)
    engine = training.engine
    losses = []
    for step in range(40):
        at = slice(step % 10 * 20, step % 10 * 20 + 20)
        engine.train_step(inputs[at], labels[at], 0.003)
        if step % 10 == 9:
            losses.append(engine.take_totals()[0] / 200)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["norm=evonorm_b0", "norm._target_=timm.layers.EvoNorm2dB0", "+norm.momentun=0.2"],
            "EvoNorm2dB0 ignores 'momentun': choose from",
        ),
        (["norm=frn", "+norm.rms=false"], "unexpected keyword argument 'rms'"),
        (["norm=evonorm_b0", "norm.momentum=null"], "momentum"),
        (["norm=dyt", "+norm.beta=4"], "unexpected keyword argument 'beta'"),
        (["norm=evonorm_s0", "norm.num_groups=5"], "num_groups=5 does not divide 32 channels"),
        (["norm=gn_auto", "norm.at_most=0"], "at_most=0: must be at least 1"),
        (["norm=gn", "norm.num_groups=many"], "num_groups=many: must be"),
    ],
)
def test_misspelt_and_impossible_settings_are_refused(settings, words):
    if settings[0].partition("=")[2] in TIMM:
        pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=words):
        compose(*settings)


@pytest.mark.parametrize(
    ("channels", "at_most", "groups"),
    [(64, 32, 32), (64, 16, 16), (12, 32, 12), (12, 5, 4), (7, 4, 1), (48, 32, 24)],
)
def test_auto_takes_the_largest_divisor(channels, at_most, groups):
    assert group_norm(channels, "auto", at_most=at_most).num_groups == groups


def test_chosen_groups_are_said_by_layer(caplog):
    caplog.set_level("INFO")
    config = compose(*FASHION, "norm=gn_auto", "norm.at_most=8", "device=cpu")
    build_training(config, load(config.dataset))
    [line] = [r.getMessage() for r in caplog.records if "auto" in r.getMessage()]
    assert line.startswith("norm.num_groups=auto: groups: 8 in features.0.1, 8 in features.0.4, ")


def test_only_groups_of_group_norms_are_said(caplog):
    caplog.set_level("INFO")
    config = compose("dataset=fashion_mini", "norm=gn_auto", "model=torchvision", "device=cpu")
    build_training(config, load(config.dataset))
    [line] = [r.getMessage() for r in caplog.records if "num_groups=auto" in r.getMessage()]
    assert line.startswith("norm.num_groups=auto: groups: 32 in bn1, 32 in layer1.0.bn1, ")


def test_at_most_goes_with_auto_alone():
    with pytest.raises(ValueError, match="at_most=3: goes with num_groups=auto, not 4"):
        group_norm(8, 4, at_most=3)


def test_old_running_statistics_of_batch_renorm_are_warned_of(caplog):
    for epochs, words in ((3, "6 % of its"), (4, None)):  # 0.99 to the power of 0.19 · steps
        caplog.clear()
        config = compose(*FASHION, "norm=brn", "batch_size=4", f"epochs={epochs}", "device=cpu")
        build_training(config, load(config.dataset))
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert [words in line for line in said] == ([] if words is None else [True])


def test_a_layer_that_asserts_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"model=simplenetv2, norm=bn.*: AssertionError"):
        compose(*FASHION, "norm=bn", "norm._target_=tests.test_rivals.Asserting")


class Asserting(nn.BatchNorm2d):
    """A layer that will have no input."""

    def forward(self, input):
        raise AssertionError


def test_batch_norm_without_running_statistics_says_what_it_does_at_evaluation(caplog):
    config = compose(*FASHION, "norm=bn", "+norm.track_running_stats=false", "device=cpu")
    training = build_training(config, load(config.dataset))
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "features.0.1 has no running statistics" in line
    assert "500" in line
    model = training.engine.model.eval()
    inputs, _ = training.test.chunk(0, 8)
    assert not torch.allclose(model(inputs)[:4], model(inputs[:4]), atol=1e-3)


def test_a_cumulative_average_of_batch_norm_is_the_mean_over_its_batches():
    norms = layer("bn", 3, "norm.momentum=null")
    batches = [torch.randn(4, 3, 2, 2, dtype=torch.float64) + i for i in range(3)]
    for batch in batches:
        norms(batch)
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norms.running_mean, mean)


def test_settings_that_came_later_do_not_rename_runs():
    plain = compose("norm=gn").run_id
    assert compose("norm=gn", "+norm.standardize_weights=false").run_id == plain
    assert compose("norm=gn", "+norm.standardize_weights=true").run_id != plain
    auto = compose("norm=gn", "norm.num_groups=auto").run_id
    assert compose("norm=gn_auto").run_id == auto
    assert compose("norm=gn_auto", "norm.at_most=16").run_id != auto


def test_a_swapped_target_gets_the_settings_that_it_got_before():
    for norm, keys in {
        "gn": ["_partial_", "_target_", "affine", "channels_per_group", "eps", "num_groups"],
        "bn": ["_partial_", "_target_", "affine", "eps", "momentum"],
    }.items():
        swapped = compose(f"norm={norm}", "norm._target_=tests.test_rivals.swapped")
        assert sorted(swapped.norm.arguments()) == keys


def swapped(channels, **settings):
    return nn.Identity()


def test_a_missing_extra_says_what_to_install(monkeypatch):
    class Nowhere:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "timm":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    for norm in ("frn", "evonorm_s0"):
        with pytest.raises(
            ConfigError, match=r"timm is not installed: pip install 'gnbench\[timm\]'"
        ):
            compose(f"norm={norm}", "batch_size=37")  # tried for no other test
