"""The batches that batch norms count, added by one kernel for all layers and steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NAME = "num_batches_tracked"


class _Count:
    """Takes the place of a layer's tensor."""

    batches = 0

    def add_(self, batches: int) -> None:
        self.batches += batches


def batch_counts(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the batch norms of ``model`` that count their batches and do not read the count."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm2d)
        and type(layer).forward is nn.BatchNorm2d.forward
        and layer.num_batches_tracked is not None
        and layer.momentum is not None
    ]


@contextmanager
def counted_together(layers: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    """Add what the ``layers`` count within this context at its end, unless there was an error."""
    tensors: list[Any] = [layer.num_batches_tracked for layer in layers]
    counts = [_Count() for _ in layers]

    def put(values: Sequence[Any]) -> None:
        for layer, value in zip(layers, values, strict=True):
            layer._buffers[NAME] = value

    put(counts)
    try:
        yield
    finally:
        put(tensors)
    if layers:
        torch._foreach_add_(tensors, [count.batches for count in counts])
