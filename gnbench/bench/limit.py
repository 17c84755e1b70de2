"""What a step needs at the least on this hardware: FLOPs, memory moved, kernels in a row."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gnbench.build import build_model
from gnbench.config import RunConfig
from gnbench.train.cuda_graphs import CudaGraphs, recorder
from gnbench.train.devices import choose_device, set_float32_products

MATMUL_SIZE = 2048  # rows and columns of the matrices by whose product the hardware is measured
MATMUL_FLOPS = 2 * MATMUL_SIZE**3
LINKS = 1000  # kernels of a chain
# Numbers that a step moves at the least, of 4 bytes. Adam reads a parameter, its gradient and its
# two moments, and writes all but the gradient, which the backward pass has written before.
ADAM_MOVES, GRADIENT_MOVES = 7, 1
LINEAR_MOVES = 2  # the weights of linear layers, forwards and backwards: no cache holds them
COPIED = 3  # numbers for a parameter in the copy by which the memory is measured, each moved twice
COPY, CHAIN = "copy", "chain"  # names of rates; those of matrix products are the precisions

Work = Callable[[], object]


def hardware(config: RunConfig, precisions: Sequence[str]) -> dict[str, Callable[[float], float]]:
    """Return the turns of what the limit is measured by, by the names of their rates."""
    device = choose_device(config.device)
    works = {precision: matmul(precision, device) for precision in precisions}
    works[COPY] = copying(config, device)
    if graphs := recorder(device):
        works[CHAIN] = chain(graphs, device)
    for work in works.values():
        work()  # sets up what its first time needs
    return {name: functools.partial(rate, work, device) for name, work in works.items()}


def rate(work: Work, device: torch.device, seconds: float) -> float:
    """Do the work for about so many seconds, once at the least; return how often a second.

    After each look at the clock, which waits for the device, as often as before in all.
    """
    _wait_for(device)
    began, elapsed, done = time.perf_counter(), 0.0, 0
    while elapsed < seconds:
        count = done or 1
        for _ in range(count):
            work()
        _wait_for(device)
        done += count
        elapsed = time.perf_counter() - began
    return done / elapsed


def matmul(precision: str, device: torch.device) -> Work:
    """Return a product of square matrices: `MATMUL_FLOPS`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    left, right, product = (torch.randn(shape, device=device).to(dtype) for _ in range(3))

    def work() -> None:
        set_float32_products(precision)  # of this process, which measures the others as well
        torch.mm(left, right, out=product)

    return work


def copying(config: RunConfig, device: torch.device) -> Work:
    """Return a copy of as many numbers as weights and moments are."""
    with torch.device("meta"):
        parameters = _numbers(build_model(config))
    source = torch.ones(COPIED * parameters, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def chain(graphs: CudaGraphs, device: torch.device) -> Work:
    """Return a graph of `LINKS` kernels that do nothing but wait for one another."""
    token = torch.zeros(1, device=device)

    def work() -> None:
        for _ in range(LINKS):
            token.add_(1)

    alone = graphs.side_by_side([work])
    graphs.run(alone)
    replay = graphs.record(alone)

    def launch(kept: torch.Tensor = token) -> None:  # a graph does not hold on to its tensors
        replay()

    return launch


def count_flops(config: RunConfig) -> int:
    """Count the FLOPs of convolutions and matrix products in a step, forwards and backwards."""
    with torch.device("meta"):
        model = build_model(config).train()
        images = torch.empty(config.batch_size, *config.dataset.image)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images).sum().backward()
    return int(counter.get_total_flops())


def count_bytes(config: RunConfig) -> tuple[int, int]:
    """Return the bytes that a step moves at the least, and those that `copying` moves.

    Of a step those of weights, gradients and moments; activations may stay in a cache.
    """
    with torch.device("meta"):
        model = build_model(config)
    linear = sum(_numbers(m) for m in model.modules() if isinstance(m, nn.Linear))
    parameters = _numbers(model)
    step = (ADAM_MOVES + GRADIENT_MOVES) * parameters + LINEAR_MOVES * linear
    return 4 * step, 4 * 2 * COPIED * parameters


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
