"""Samples of a dataset, and the layers of a network → matplotlib figures."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from gnbench.show.layers import Layer

# Colour-blind-safe hues of Okabe & Ito (2008).
COLOURS = {
    "images": "#FFFFFF",
    "conv": "#56B4E9",
    "norm": "#D55E00",
    "activation": "#F0E442",
    "pool": "#009E73",
    "linear": "#CC79A7",
    "block": "#0072B2",
    "other": "#BBBBBB",
}
MOST_BOXES = 40
PITCH = 0.34  # inches from a box to the next


def draw_samples(
    images: Sequence[npt.NDArray[np.uint8]], names: Sequence[str], columns: int = 5
) -> Figure:
    """Draw images (H,W,C), each with a name above."""
    rows, columns = math.ceil(len(images) / columns), min(len(images), columns)
    figure = Figure(figsize=(1.7 * columns, 1.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, name in zip(axes, images, names, strict=False):
        gray = image.shape[-1] == 1
        axis.imshow(
            image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=255
        )
        axis.set_title(name, fontsize="medium")
    return figure


@dataclass(frozen=True)
class Box:
    """One or more layers, drawn as one; ``of`` is the block that it is a part of."""

    kind: str
    text: str
    output: tuple[int, ...]
    parameters: int
    of: str


def boxes(found: Sequence[Layer], most: int = MOST_BOXES) -> list[Box]:
    """Draw layers together that lie in one block, if there would be more than ``most`` boxes."""
    deepest = max(layer.name.count(".") for layer in found) + 1
    for depth in range(deepest, 0, -1):
        prefix = functools.partial(_prefix, depth=depth)
        groups = [list(group) for _, group in itertools.groupby(found, prefix)]
        if len(groups) <= most or depth == 1:
            break
    return [_box(group, depth) for group in groups]


def _prefix(layer: Layer, depth: int) -> str:
    return ".".join(layer.name.split(".")[:depth])


def _box(group: Sequence[Layer], depth: int) -> Box:
    first, last = group[0], group[-1]
    parameters = sum(layer.parameters for layer in group)
    of = _prefix(first, depth).rpartition(".")[0]
    if len(group) == 1:
        return Box(first.kind, first.text, first.output, parameters, of)
    text = f"{_prefix(first, depth)}: {len(group)} layers"
    return Box("block", text, last.output, parameters, of)


def draw_network(found: Sequence[Layer], image: Sequence[int], title: str) -> Figure:
    """Draw layers from left to right: the height of a box is the side of what it returns.

    Its width is the number of channels, both in powers of two. Below it what it is and how many
    parameters it has, above it the shape of what it returns, where that changes.
    """
    drawn = [Box("images", "images", tuple(image), 0, ""), *boxes(found)]
    figure = Figure(figsize=(1.2 + PITCH * len(drawn), 5.4), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    side = max(box.output[-1] for box in drawn if len(box.output) == 3)
    channels = max(box.output[0] for box in drawn if box.output)
    before: tuple[int, ...] = ()
    axis.plot([0, len(drawn) - 1], [0, 0], color="#666666", linewidth=1, zorder=0)
    for x, box in enumerate(drawn):
        height = _share(box.output[-1], side) if len(box.output) == 3 else 0.25
        width = 0.25 + 0.65 * (_share(box.output[0], channels) if box.output else 0.25)
        corner = (x - width / 2, -height / 2)
        style: dict[str, Any] = {
            "facecolor": COLOURS[box.kind],
            "edgecolor": "#333333",
            "linewidth": 0.7,
        }
        axis.add_patch(Rectangle(corner, width, height, **style))
        count = f"  {box.parameters:,}" if box.parameters else ""
        axis.text(x, -0.58, f"{box.text}{count}", rotation=90, ha="center", va="top", fontsize=7)
        if box.output != before:
            shape = "×".join(map(str, box.output))
            axis.text(
                x, height / 2 + 0.04, shape, rotation=90, ha="center", va="bottom", fontsize=7
            )
        before = box.output
    _brackets(axis, drawn)
    axis.set_xlim(-0.8, len(drawn) - 0.2)
    axis.set_ylim(-1.75, 1.15)
    axis.set_title(title, fontsize="medium")
    kinds = {
        kind: colour for kind, colour in COLOURS.items() if kind in {box.kind for box in drawn}
    }
    handles = [Patch(facecolor=c, edgecolor="#333333", label=kind) for kind, c in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _share(value: int, largest: int) -> float:
    """Return how large a value is drawn, beside the largest: by its power of two."""
    return (1 + math.log2(max(value, 1))) / (1 + math.log2(max(largest, 1)))


def _brackets(axis: Axes, drawn: Sequence[Box]) -> None:
    """Draw above the boxes which of them are parts of one block."""
    x = 0
    for name, group in itertools.groupby(drawn, lambda box: box.of):
        count = len(list(group))
        if name and count > 1:
            axis.plot([x - 0.4, x + count - 0.6], [0.98, 0.98], color="#333333", linewidth=1)
            axis.text(x + (count - 1) / 2, 1.0, name, ha="center", va="bottom", fontsize=8)
        x += count
