import pytest
import torch
from torch import nn

from gnbench import ConfigError
from gnbench.build import build_model
from gnbench.check import compose
from tests.trainings import NORMS

MANY = ("simplenet", "resnet18", "resnet34", "resnet50")
MODELS = ("simplenetv2", *(pytest.param(name, marks=pytest.mark.slow) for name in MANY))
TIMM = ("evonorm_s0", "evonorm_b0", "frn")


def parameters(*overrides):
    with torch.device("meta"):
        model = build_model(compose("dataset=cifar10", *overrides))
    return sum(p.numel() for p in model.parameters())


def test_simplenetv2_has_the_parameters_of_the_report():
    assert parameters("model=simplenetv2", "norm=bn") == 2_396_330


def test_simplenetv2_in_other_sizes():
    small = ("norm=bn", "model.channels=[16,32,64]", "model.hidden=64")
    assert parameters("model=simplenetv2", *small) == 138_778
    for wrong in ("channels=[16,32]", "channels=[0,32,64]", "hidden=0"):
        with pytest.raises(ConfigError, match=r"give .*positive number"):
            compose("norm=bn", f"model.{wrong}")


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("resnet18", 11_173_962),  # torchvision's 11,689,512 less the ImageNet stem and head
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
    ],
)
def test_resnets_match_torchvision_but_for_stem_and_head(model, count):
    import torchvision

    with torch.device("meta"):
        theirs = getattr(torchvision.models, model)(num_classes=10)
    expected = sum(p.numel() for p in theirs.parameters()) - 64 * 3 * (7 * 7 - 3 * 3)
    assert parameters(f"model={model}", "norm=bn") == expected == count
    whole = sum(p.numel() for p in theirs.parameters())
    assert parameters(f"model={model}", "norm=bn", "model.stem=imagenet") == whole


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_resnet_computes_what_torchvision_computes(model):
    import torchvision

    torch.manual_seed(0)
    ours = build_model(compose(f"model={model}", "norm=bn", "model.stem=imagenet")).double()
    theirs = getattr(torchvision.models, model)(num_classes=10).double()
    # Both register their layers in the order of the forward pass, shortcuts last.
    weights = list(ours.state_dict().values())
    names = list(theirs.state_dict())
    assert [w.shape for w in weights] == [theirs.state_dict()[n].shape for n in names]
    theirs.load_state_dict(dict(zip(names, weights, strict=True)))
    x = torch.randn(2, 3, 64, 64).double()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_norm_fits_every_model_and_trains(model, norm):
    if norm in TIMM:
        pytest.importorskip("timm")
    config = compose(f"model={model}", f"norm={norm}", "dataset=fashion_mnist", "batch_size=16")
    torch.manual_seed(0)
    network = build_model(config)
    logits = network(torch.randn(2, 1, 28, 28))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_released_code_of_the_report_is_reachable():
    def layers(*overrides):
        with torch.device("meta"):
            model = build_model(compose("model=simplenetv2", "norm=bn", *overrides))
        return [type(m) for m in model.modules()], model

    text, _ = layers()
    assert (text.count(nn.MaxPool2d), text.count(nn.Dropout), text.count(nn.ReLU)) == (3, 0, 7)
    code, model = layers("model.final_pool=false", "model.head_relu=false", "model.dropout=0.2")
    assert (code.count(nn.MaxPool2d), code.count(nn.Dropout), code.count(nn.ReLU)) == (2, 1, 6)
    assert model.head[1].in_features == 128 * 8 * 8


def test_simplenet_puts_dropout_before_its_last_relu():
    with torch.device("meta"):
        model = build_model(compose("model=simplenet", "norm=bn"))
    names = [type(m).__name__ for m in model.head]
    assert names == ["Flatten", "Linear", "Dropout", "ReLU", "Linear"]
    assert [m.out_channels for m in model.features if isinstance(m, nn.Conv2d)] == [64, 256, 512]


def test_he_initialization_has_the_variance_of_the_paper():
    torch.manual_seed(0)
    model = build_model(compose("model=simplenetv2", "norm=bn", "model.init=he"))
    conv = model.features[2][3]
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not conv.bias.any()
    torch.manual_seed(0)
    plain = build_model(compose("model=simplenetv2", "norm=bn")).features[2][3]
    assert plain.weight.std().item() == pytest.approx((1 / 3 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "in"])
def test_zeroed_last_gamma_makes_every_residual_block_its_shortcut(norm):
    config = compose("model=resnet18", f"norm={norm}", "model.zero_init_residual=true")
    model = build_model(config)
    block = model.blocks[0]
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(block(x.clone()), x.relu())
    assert sum(not m.weight.any() for m in model.modules() if hasattr(m, "eps")) == 8


def test_zero_init_residual_needs_a_norm_with_gamma():
    with pytest.raises(ConfigError, match="zero_init_residual=true needs a norm with γ"):
        compose("model=resnet18", "norm=none", "model.zero_init_residual=true")
