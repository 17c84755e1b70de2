"""Networks of torchvision and timm: what they compute with other norms, and what is refused."""

import functools
import logging
import re
import sys

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from gnbench import ConfigError
from gnbench.build import build_model
from gnbench.check import compose, composed
from gnbench.config import RunConfig, conf_dir
from gnbench.norms import batch_group_norm, group_norm
from gnbench.zoo import timm_network, torchvision_network, without_activations

NORMS = sorted(path.stem for path in (conf_dir() / "norm").glob("*.yaml"))
PLAIN = {"pretrained": False, "replace": False, "small_images": False}
GROUPS = functools.partial(group_norm, num_groups=8)


def network(library, norm, arch, channels=3, seed=0, **settings):
    torch.manual_seed(seed)
    build = torchvision_network if library == "torchvision" else timm_network
    return build(norm, [channels, 32, 32], 10, arch, **(PLAIN | settings))


def same(ours, theirs, size=32):
    """Tell whether two networks have the same weights and compute the same bits in both modes."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    weights = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(1)  # dropout
        outputs.append([model.train()(x), model.eval()(x)])
    return all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def layers(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


# What the libraries themselves build


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v2_x0_5"])
def test_with_bn_it_is_torchvisions_network(arch):
    ours = network("torchvision", nn.BatchNorm2d, arch, replace=arch != "resnet18")
    torch.manual_seed(0)
    theirs = models.get_model(arch, num_classes=10)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert same(ours, theirs)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_with_another_norm_it_is_what_torchvision_makes_of_norm_layer(arch):
    ours = network("torchvision", GROUPS, arch)
    torch.manual_seed(0)
    theirs = models.get_model(arch, num_classes=10, norm_layer=lambda c: nn.GroupNorm(8, c))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert same(ours, theirs)
    assert not layers(ours, nn.BatchNorm2d)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, GROUPS])
def test_a_network_of_timm_starts_as_timm_starts_it(norm):
    """The last γ of a block at 0, also with another norm."""
    ours = network("timm", norm, "resnet26")
    torch.manual_seed(0)
    theirs = timm.create_model("resnet26", num_classes=10, norm_layer=lambda c, **_: norm(c))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert same(ours, theirs)
    assert not ours.layer1[0].bn3.weight.any()


def test_a_norm_takes_the_place_of_timms_batch_norm_with_activation():
    ours = network("timm", GROUPS, "test_efficientnet")
    torch.manual_seed(0)
    norm_layer = functools.partial(GroupNormAct, num_groups=8)
    theirs = timm.create_model("test_efficientnet", num_classes=10, norm_layer=norm_layer)
    assert same(ours, theirs)
    assert same(
        network("timm", nn.BatchNorm2d, "test_efficientnet"),
        network(
            "timm", lambda c: timm.layers.BatchNormAct2d(c, apply_act=False), "test_efficientnet"
        ),
    )


def test_the_same_seed_draws_the_same_weights():
    first, second = (network("timm", GROUPS, "test_resnet") for _ in range(2))
    assert same(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "arch", "norms"),
    [
        ("torchvision", "vgg16_bn", 13),  # one a convolution
        ("torchvision", "densenet121", 121),  # 2 in each of 58 layers, 3 transitions, first, last
        ("torchvision", "mobilenet_v2", 52),
        ("torchvision", "efficientnet_b5", 116),
        ("torchvision", "regnet_x_400mf", 71),  # reads numbers while it is built: not on meta
        ("torchvision", "googlenet", 57),  # without its auxiliary classifiers
        ("torchvision", "inception_v3", 94),  # likewise
        ("timm", "resnet26", 29),  # 3 in each of 8 blocks, 4 shortcuts, first
        ("timm", "regnety_002", 44),
        ("timm", "mobilenetv3_small_100", 34),
    ],
)
def test_every_batch_norm_is_replaced(library, arch, norms):
    with torch.device("meta"):
        ours = network(library, lambda c: nn.GroupNorm(1, c), arch, replace=True)
        assert ours(torch.zeros(2, 3, 96, 96)).shape == (2, 10)
    assert len(layers(ours, nn.GroupNorm)) == norms
    assert not layers(ours, nn.BatchNorm2d)


def test_norms_that_are_left_are_said(caplog):
    """Not those within a norm of one's own."""
    with caplog.at_level(logging.INFO, "gnbench"):
        network("timm", functools.partial(batch_group_norm, images=2), "test_coatnet", replace=True)
    assert "replaced by BatchGroupNorm" in caplog.text
    [left] = [line for line in caplog.text.splitlines() if "left as they are" in line]
    assert re.search(r"left as they are: \d+ LayerNorm\w*$", left)


@functools.cache
def part(group, option):
    """Compose, which is slow, each option once."""
    return getattr(RunConfig.parse(composed(f"{group}={option}")), group).plain()


def config(model, norm, **settings):
    dataset = part("dataset", "fashion_mini") | {"image": [1, 16, 16]}
    parts = {"model": part("model", model) | settings, "norm": part("norm", norm)}
    if norm in ("bgn", "ghost_bn"):
        parts["norm"] |= {"images": 2}
    return RunConfig.parse(composed()).with_(dataset=dataset, batch_size=4, **parts)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", ["torchvision", "timm"])
def test_every_norm_of_conf_trains_in_them(model, norm):
    small = {"arch": "resnet18", "small_images": True}
    choice = config(model, norm, **(small if model == "torchvision" else {"arch": "test_resnet"}))
    if norm == "frozen_bn":
        with pytest.raises(ConfigError, match="statistics must come with pretrained weights"):
            build_model(choice)
        return
    ours = build_model(choice)
    size = 16 if model == "torchvision" else 64
    ours(torch.randn(2, 1, size, size)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_the_network_stands_in_the_name_of_the_run():
    names = [config(m, "gn").run_id.split("-")[1] for m in ("torchvision", "timm", "resnet18")]
    assert names == ["tv_resnet18", "timm_resnet26", "resnet18"]


# Images


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_gray_images_are_seen_as_gray_colour_images(arch):
    gray, colour = (network("torchvision", nn.BatchNorm2d, arch, c).eval() for c in (1, 3))
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(gray(x), colour(x.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(("library", "arch"), [("torchvision", "resnet18"), ("timm", "resnet18")])
def test_the_stem_for_small_images(library, arch):
    ours = network(library, nn.BatchNorm2d, arch, small_images=True)
    assert sum(p.numel() for p in ours.parameters()) == 11_173_962  # as gnbench's own resnet18
    get = models.get_model if library == "torchvision" else timm.create_model
    theirs = get(arch, num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    assert same(ours, theirs, size=8)
    # He et al. 2015 with fan_out, as both libraries start the convolutions of these networks.
    assert ours.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


# Norms that bring their activation


class Activated(nn.BatchNorm2d):
    """All it returns is negative: after a ReLU nothing would be left."""

    apply_act = True

    def forward(self, x):
        return -1 - super().forward(x).relu()


class WithoutFirstRelu(BasicBlock):
    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + shortcut)


def activations(model):
    names = ("relu", "relu_", "relu6", "silu", "hardswish", "ReLU", "ReLU6", "SiLU", "Hardswish")
    found = []
    for node in model.graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if node.op == "call_module":
            name = type(model.get_submodule(node.target)).__name__
        found += [name] if name in names else []
    return found


def test_activations_that_follow_such_a_norm_are_left_out():
    """Those alone: the ReLU after a sum stays."""
    ours = network("torchvision", Activated, "resnet18")
    torch.manual_seed(0)
    theirs = models.ResNet(WithoutFirstRelu, [2, 2, 2, 2], 10, norm_layer=Activated)
    theirs.load_state_dict(ours.state_dict())
    theirs.relu = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    for train in (True, False):
        assert torch.equal(ours.train(train)(x), theirs.train(train)(x))
    assert len(activations(ours)) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "arch", "left"),
    [
        ("torchvision", "densenet121", 0),  # the last one is a function
        ("torchvision", "googlenet", 0),
        ("torchvision", "vgg16_bn", 2),  # of the classifier
        ("timm", "resnet26", 8),  # after the sums
        ("timm", "efficientnet_b0", 16),  # those of squeeze-and-excitation
    ],
)
def test_so_they_are_in_other_networks(library, arch, left):
    with torch.device("meta"):
        ours = network(library, Activated, arch, replace=True)
        assert ours(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert len(activations(ours)) == left


@pytest.mark.parametrize(
    ("library", "arch"), [("torchvision", "efficientnet_b0"), ("timm", "test_resnet")]
)
def test_the_traced_network_is_the_network(library, arch):
    """Also its dropout and stochastic depth, in both modes."""

    def found(model):
        results = []
        for train in (True, False):
            torch.manual_seed(1)
            model.train(train).zero_grad()
            logits = model(torch.linspace(-1, 1, 6144).view(2, 3, 32, 32))
            logits.square().sum().backward()
            results += [logits, *(p.grad for _, p in sorted(model.named_parameters()))]
        return results

    plain = network(library, nn.BatchNorm2d, arch)
    traced, count = without_activations(network(library, nn.BatchNorm2d, arch), [])
    assert count == 0
    assert set(traced.state_dict()) == set(plain.state_dict())
    for one, other in zip(found(plain), found(traced), strict=True):
        assert torch.equal(one, other)


class Own(nn.Module):
    """In training it computes something else than in evaluation."""

    def __init__(self):
        super().__init__()
        self.norm = Activated(3)

    def forward(self, x):
        return F.dropout(self.norm(x), 0.5, self.training)


class Branching(Own):
    def forward(self, x):
        return self.norm(x) if x.sum() > 0 else x


class Unreached(Own):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Own, "this one computes something else in training"),
        (Branching, "symbolically traced variables cannot be used as inputs to control flow"),
        (Unreached, "not all norms of this one are reached"),
    ],
)
def test_a_network_that_cannot_be_traced_is_refused(kind, reason):
    own = kind()
    with pytest.raises(ValueError, match=f"needs a network that torch.fx can trace: {reason}"):
        without_activations(own, [own.norm])


# Pretrained weights


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Put weights where torchvision and timm would put those that they download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing is
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(library, arch, **settings):
        torch.manual_seed(3)
        get = models.get_model if library == "torchvision" else timm.create_model
        trained = get(arch, **settings)
        trained.train()(torch.randn(8, 3, 64, 64))  # running statistics
        for layer in layers(trained, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
        if library == "torchvision":
            name = models.get_model_weights(arch).DEFAULT.url.rpartition("/")[2]
            path = tmp_path / "torch" / "hub" / "checkpoints" / name
            path.parent.mkdir(parents=True)
            torch.save(trained.state_dict(), path)
        else:
            hub_id = timm.get_pretrained_cfg(arch).hf_hub_id.replace("/", "--")
            folder = tmp_path / "hub" / f"models--{hub_id}"
            path = folder / "snapshots" / "0" / "model.safetensors"
            path.parent.mkdir(parents=True)
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text("0")
            safetensors.torch.save_file(trained.state_dict(), path)
        return trained

    return put


@pytest.mark.parametrize(
    ("library", "arch"), [("torchvision", "resnet18"), ("timm", "test_resnet")]
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d, GROUPS])
def test_pretrained_weights_are_taken_all_but_the_classifier(weights, library, arch, norm, caplog):
    trained = weights(library, arch).state_dict()
    with caplog.at_level(logging.INFO, "gnbench"):
        ours = network(library, norm, arch, pretrained=True).state_dict()
    counted = [value for name, value in ours.items() if name.endswith("num_batches_tracked")]
    assert not any(counted)  # batches are counted anew
    changed = {
        name
        for name, value in ours.items()
        if not torch.equal(value, trained[name]) and "num_batches" not in name
    }
    assert changed == {"fc.weight", "fc.bias"}
    assert ours["fc.weight"].shape[0] == 10
    whole = len(trained)
    assert (
        f"{whole - 2} of {whole} tensors are pretrained; fresh: fc.weight, fc.bias" in caplog.text
    )
    missing = {name.rpartition(".")[2] for name in set(trained) - set(ours)}
    assert missing <= {"running_mean", "running_var", "num_batches_tracked"}
    assert bool(missing) == (norm is not nn.BatchNorm2d)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_what_starts_fresh_is_said(weights, library, caplog):
    class Own(nn.GroupNorm):
        def __init__(self, channels):
            super().__init__(8, channels)
            self.slope = nn.Parameter(torch.ones(channels))

    arch = {"torchvision": "resnet18", "timm": "test_resnet"}[library]
    trained = weights(library, arch)
    small = library == "torchvision"
    with caplog.at_level(logging.INFO, "gnbench"):
        ours = network(library, Own, arch, 1, pretrained=True, small_images=small)
    norms = len(layers(trained, nn.BatchNorm2d))
    assert f"of the norms these start fresh: {norms} slope" in caplog.text
    assert f"{norms} BatchNorm2d replaced by Own: " in caplog.text
    assert "layer1.0.bn1, layer1.0.bn2, layer" in caplog.text
    assert ("conv1 starts fresh, for small images" in caplog.text) == small
    if not small:  # the colours of the first convolution are added up
        pairs = zip(ours.conv1.parameters(), trained.conv1.parameters(), strict=False)
        one, other = next(pairs)
        torch.testing.assert_close(one, other.sum(1, keepdim=True))


def test_another_eps_than_that_of_the_weights_is_said(weights, caplog):
    weights("torchvision", "mobilenet_v3_small")
    with caplog.at_level(logging.INFO, "gnbench"):
        network("torchvision", nn.BatchNorm2d, "mobilenet_v3_small", pretrained=True)
    assert "its weights were trained with norm.eps=0.001" in caplog.text


@pytest.mark.slow
def test_inception_sees_pretrained_what_it_was_trained_on(weights):
    """Its weights want another scale of the images, and have auxiliary classifiers."""
    trained = weights("torchvision", "googlenet", init_weights=False).eval()
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    ours = network("torchvision", norm, "googlenet", replace=True, pretrained=True)
    ours.eval().fc = trained.fc
    trained.transform_input = True
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), trained(x))


@pytest.mark.slow
def test_frozen_statistics_are_those_of_the_weights(weights):
    """A fine-tuned network keeps them, in training as well."""
    trained = weights("torchvision", "resnet18").eval()
    choice = functools.partial(config, "torchvision", "frozen_bn", pretrained=True)
    with torch.device("meta"):  # as when it is checked
        build_model(choice())
    ours = build_model(choice()).train()
    ours.fc = trained.fc
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(ours(x), trained(x.repeat(1, 3, 1, 1)))
    with pytest.raises(ConfigError, match="statistics must come with pretrained weights"):
        build_model(choice(small_images=True))


@pytest.mark.parametrize(
    ("library", "arch", "remedy"),
    [
        ("torchvision", "resnet34", r"put \S+/resnet34-\w+\.pth into \S+checkpoints, or choose"),
        ("timm", "resnet26", r"hf download timm/resnet26\S+; then copy models--timm--resnet26\S+ "),
        ("timm", "resnetblur18", "No pretrained weights exist for resnetblur18"),
    ],
)
def test_weights_that_are_not_to_be_had_are_refused_before_anything_is_written(
    weights, library, arch, remedy
):
    with pytest.raises(ValueError, match=remedy) as caught, torch.device("meta"):
        network(library, GROUPS, arch, pretrained=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("choose model.pretrained=false")


# What is refused


@pytest.mark.parametrize(
    ("library", "arch", "settings", "message"),
    [
        ("torchvision", "resnet19", {}, "arch=resnet19: torchvision has no .* close: resnet18"),
        ("torchvision", "fcn_resnet50", {}, "torchvision has no such classification network"),
        ("torchvision", "densenet121", {}, "norm_layer; with model.replace=true its 121 BatchNor"),
        ("torchvision", "convnext_tiny", {"replace": True}, "convnext_tiny: it has no BatchNorm2d"),
        ("torchvision", "vit_b_16", {}, "vit_b_16: it has no BatchNorm2d"),
        ("torchvision", "efficientnet_b0", {"small_images": True}, "efficientnet_b0 has not the"),
        ("torchvision", "resnet18", {"channels": 2}, "networks take 3 channels, or 1; not 2"),
        ("timm", "resnet2666", {}, "model.arch=resnet2666: timm has no such .* close: resnet26"),
        ("timm", "dla34", {}, "does not take norm_layer; with model.replace=true its"),
        ("timm", "test_vit", {"replace": True}, "test_vit: it has no BatchNorm2d"),
        ("timm", "resnet26d", {"small_images": True}, "resnet26d has not the stem of a ResNet"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(library, arch, settings, message):
    with pytest.raises(ValueError, match=message) as caught, torch.device("meta"):
        network(library, GROUPS, arch, **settings)
    assert "\n" not in str(caught.value)


def test_a_batch_norm_with_a_forward_pass_of_its_own_is_refused(monkeypatch):
    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    own = functools.partial(models.resnet18, norm_layer=Other)
    monkeypatch.setattr(models, "get_model", lambda arch, **settings: own())
    with pytest.raises(ValueError, match="bn1 is a Other: no norm can take its place"):
        network("torchvision", GROUPS, "resnet18", replace=True)


BAD = {
    "model.arch=12": "model.arch=12: must be of type str",
    "model.arch=a/b": "model.name='tv_a/b' is not a plain name",
    "+model.drop_rate=0.1": "unexpected keyword argument 'drop_rate'",
    "model.pretrained=maybe": "model.pretrained=maybe: must be of type bool",
    "model.arch=mobilenet_v2": "num_groups=16 does not divide 24 channels",
    "norm=bn batch_size=1": "model=tv_resnet18, norm=bn, batch_size=1: ",
    "norm=frozen_bn": "norm=frozen_bn: its statistics must come with pretrained weights",
}


@pytest.mark.parametrize("settings", BAD)
def test_what_cannot_work_is_one_line_that_names_the_value(settings):
    with pytest.raises(ConfigError, match=BAD[settings]) as caught:
        compose("model=torchvision", *settings.split())
    assert "\n" not in str(caught.value)


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'gnbench\[timm\]'"):
        compose("model=timm", "batch_size=37")  # tried for no other test
