"""A network layer by layer, with shapes and counts known by hand; and samples of a dataset."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from gnbench import datasets
from gnbench.build import build_model
from gnbench.check import compose
from gnbench.datasets import names
from gnbench.show.__main__ import ShowConfig, choose, show_dataset, show_network
from gnbench.show.draw import boxes, draw_network, draw_samples
from gnbench.show.layers import Layer, kind_of, layers, text_of, watched
from tests import pictures, tiny
from tests.conftest import ROOT


def settings(tmp_path, samples=3):
    return ShowConfig.parse({"samples": samples, "outputs": str(tmp_path / "show")})


def test_the_report_s_network_by_hand():
    found = layers(compose("model=simplenetv2", "norm=bn", "dataset=cifar10"))
    shapes = []
    parameters = []
    for before, channels, side in ((3, 32, 32), (32, 64, 16), (64, 128, 8)):
        shapes += [(channels, side, side)] * 6 + [(channels, side // 2, side // 2)]
        first, second = 9 * before * channels + channels, 9 * channels * channels + channels
        parameters += [first, 2 * channels, 0, second, 2 * channels, 0, 0]
    shapes += [(2048,), (1024,), (1024,), (10,)]
    parameters += [0, 2048 * 1024 + 1024, 0, 1024 * 10 + 10]
    assert [one.output for one in found] == shapes
    assert [one.parameters for one in found] == parameters
    assert sum(parameters) == 2_396_330  # of the report's network
    block = ["conv", "norm", "activation"] * 2 + ["pool"]
    assert [one.kind for one in found] == block * 3 + ["other", "linear", "activation", "linear"]
    assert [one.text for one in found[:7]] == [
        "conv 3×3, 3→32", "BatchNorm2d 32", "ReLU",
        "conv 3×3, 32→32", "BatchNorm2d 32", "ReLU", "max-pool 2",
    ]  # fmt: skip


def test_weights_that_are_standardized_are_those_of_their_layer():
    config = compose("model=simplenetv2", "norm=gn8_ws")
    with torch.device("meta"):
        total = sum(p.numel() for p in build_model(config).parameters())
    assert sum(one.parameters for one in layers(config)) == total


MODELS, NORMS = (
    sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    for group in ("model", "norm")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "norm"),
    [
        *((model, norm) for model in MODELS for norm in ("bn", "gn8_ws")),
        *(("simplenetv2", norm) for norm in NORMS if norm != "frozen_bn"),  # needs weights
    ],
)
def test_every_network_and_every_norm(model, norm):
    config = compose(f"model={model}", f"norm={norm}")
    found = layers(config)
    with torch.device("meta"):
        total = sum(p.numel() for p in build_model(config).parameters())
    assert sum(one.parameters for one in found) == total
    assert norm == "none" or any(one.kind == "norm" for one in found)
    assert len(boxes(found)) <= 40


def test_modules_are_layers_if_they_call_no_other():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.inner = nn.Conv2d(3, 4, 1, bias=False)
            self.act = nn.ReLU()
            self.unused = nn.Linear(5, 5)

        def forward(self, x):
            return self.act(self.inner(self.act(x * self.scale[:, None, None])))

    model = nn.Sequential(Own(), nn.Identity(), nn.Flatten())
    with watched(model) as found:
        model(torch.zeros(2, 3, 5, 5))
    assert [(one.name, one.output, one.parameters) for one in found] == [
        ("0.act", (3, 5, 5), 0),
        ("0.inner", (4, 5, 5), 12),
        ("0.act", (4, 5, 5), 0),
        ("0", (4, 5, 5), 3),
        ("2", (100,), 0),
    ]
    before = len(found)
    model(torch.zeros(2, 3, 5, 5))
    assert len(found) == before  # no hook is left


@pytest.mark.parametrize(
    ("module", "kind", "text"),
    [
        (
            nn.Conv2d(8, 16, (3, 1), stride=2, groups=8),
            "conv",
            "conv 3×1, 8→16, stride 2, 8 groups",
        ),
        (nn.MaxPool2d((2, 3)), "pool", "max-pool 2×3"),
        (nn.AdaptiveAvgPool2d(1), "pool", "AdaptiveAvgPool2d output_size=1"),
        (nn.GELU(), "activation", "GELU approximate='none'"),
        (nn.Dropout(0.2), "other", "Dropout p=0.2"),
        (nn.InstanceNorm2d(4), "norm", "InstanceNorm2d 4"),
    ],
)
def test_what_a_layer_is_called(module, kind, text):
    assert (kind_of(module), text_of(module)) == (kind, text)


def test_a_long_network_is_drawn_by_its_blocks():
    found = [Layer(f"blocks.{i // 4}.{i % 4}", "conv", "conv", (8, 4, 4), 1) for i in range(80)]
    found.append(Layer("head", "linear", "linear 8→10", (10,), 90))
    drawn = boxes(found)
    assert [box.parameters for box in drawn] == [4] * 20 + [90]
    assert (drawn[0].kind, drawn[0].text, drawn[0].of) == ("block", "blocks.0: 4 layers", "blocks")
    assert drawn[-1].kind == "linear"
    assert len(boxes(found, most=100)) == 81


def test_the_drawing_says_what_the_layers_are():
    found = [
        Layer("a.0", "conv", "conv 3×3, 3→8", (8, 4, 4), 224),
        Layer("a.1", "norm", "BatchNorm2d 8", (8, 4, 4), 16),
        Layer("b", "linear", "linear 8→10", (10,), 90),
    ]
    figure = draw_network(found, (3, 4, 4), "a network")
    [axis] = figure.axes
    said = {text.get_text() for text in axis.texts}
    assert {"images", "3×4×4", "conv 3×3, 3→8  224", "8×4×4", "BatchNorm2d 8  16", "a"} <= said
    assert sorted(t.get_text() for t in axis.texts).count("8×4×4") == 1
    heights = [patch.get_height() for patch in axis.patches]
    assert heights[0] == heights[1] == heights[2] > heights[3]
    assert axis.patches[0].get_width() < axis.patches[1].get_width()


def test_samples_are_of_different_classes_as_long_as_there_are_any():
    assert choose([5, 5, 1, 5, 0, 1], 3) == [0, 2, 4]
    assert choose([5, 5, 1, 5, 0, 1], 5) == [0, 2, 4, 1, 5]
    assert choose([0, 0], 3) == [0, 1]


def test_samples_are_drawn_with_their_names():
    images = [np.full((4, 4, 3), 9, np.uint8), np.full((4, 4, 3), 200, np.uint8)]
    first, second = draw_samples(images, ["cat", "dog"]).axes
    assert [first.get_title(), second.get_title()] == ["cat", "dog"]
    assert np.array_equal(second.images[0].get_array(), images[1])
    [gray] = draw_samples([np.full((4, 4, 1), 9, np.uint8)], ["boot"]).axes
    assert gray.images[0].get_clim() == (0, 255)  # not stretched to what the image holds


def test_names_of_classes(tmp_path):
    numbers = {"CIFAR10": 10, "CIFAR100": 100, "FASHION_MNIST": 10, "SVHN": 10}
    for name, count in numbers.items():
        assert len(set(getattr(names, name))) == count
    assert sorted(names.CIFAR10) == names.CIFAR10  # of both, labels are alphabetical
    assert sorted(names.CIFAR100) == names.CIFAR100
    from torchvision.datasets import FashionMNIST

    assert FashionMNIST.classes == names.FASHION_MNIST
    root = pictures.tree(tmp_path / "root", {"cat": 5, "dog": 5})
    config = pictures.config(root).dataset
    assert names.class_names(config, datasets.load(config)) == ["cat", "dog"]
    own = compose(*tiny.OVERRIDES).dataset
    assert names.class_names(own, tiny.dataset()) == [f"class {i}" for i in range(4)]


def test_a_dataset_is_shown(tmp_path, capsys):
    run = compose("dataset=fashion_mini")
    show_dataset(run, settings(tmp_path))
    said = capsys.readouterr().out
    assert "2,000 training and 1,000 test images of 1×28×28, 10 classes: T-shirt/top," in said
    labels = datasets.fashion_mini().train_labels.tolist()
    rows = [line.split() for line in said.splitlines() if line[:1].isdigit()]
    assert len(rows) == 3
    for number, label, *name in rows:
        assert labels[int(number)] == int(label)
        assert " ".join(name) == names.FASHION_MNIST[int(label)]
    assert {p.name for p in (tmp_path / "show").iterdir()} == {
        "fashion_mini.png", "fashion_mini.svg",
    }  # fmt: skip


def test_a_network_is_shown(tmp_path, capsys):
    run = compose("model=simplenetv2", "norm=gn", *tiny.SMALL, *tiny.OVERRIDES)
    show_network(run, settings(tmp_path))
    said = capsys.readouterr().out
    name = "simplenetv2-gn-tiny"
    assert {p.name for p in (tmp_path / "show").iterdir()} == {
        f"{name}.png", f"{name}.svg", f"{name}.csv",
    }  # fmt: skip
    heads, *rows = csv.reader((tmp_path / "show" / f"{name}.csv").read_text().splitlines())
    assert heads == ["layer", "what", "output", "parameters"]
    total = sum(int(row[-1]) for row in rows)
    assert said.startswith(f"simplenetv2, gn, tiny 1×8×8: {total:,} parameters\n")
    assert ["features.0.0", "conv 3×3, 1→16", "16×8×8", "160"] in rows


@pytest.mark.slow
def test_the_command_shows_what_it_is_asked_for(cli, tmp_path):
    done = cli("dataset=fashion_mini", "samples=1", module="gnbench.show", check=0)
    assert "parameters" not in done.stdout
    cli("model=simplenet", "dataset=fashion_mini", "outputs=o", module="gnbench.show", check=0)
    assert {p.name for p in (tmp_path / "o").iterdir()} == {
        "fashion_mini.png", "fashion_mini.svg", *(
            f"simplenet-gn-fashion_mini.{suffix}" for suffix in ("csv", "png", "svg")
        ),
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "outputs" / "show").iterdir()} == {
        "fashion_mini.png", "fashion_mini.svg",
    }  # fmt: skip


def test_bad_input_is_one_line(cli, tmp_path):
    [line] = cli("model=nothing", module="gnbench.show", check=2).stderr.splitlines()
    assert "Could not find 'model/nothing'" in line
    assert list(tmp_path.iterdir()) == []


def test_too_many_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples=0: must be at least 1"):
        settings(tmp_path, samples=0)
