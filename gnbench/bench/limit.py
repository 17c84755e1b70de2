"""What a step needs at the least on this hardware: FLOPs, memory moved, kernels in a row."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from gnbench.build import build_model
from gnbench.config import RunConfig
from gnbench.train.cuda_graphs import CudaGraphs, recorder
from gnbench.train.devices import choose_device

MATMUL_SIZE = 2048  # rows and columns of the matrices by whose product the hardware is measured
MATMUL_FLOPS = 2 * MATMUL_SIZE**3
LINKS = 1000  # kernels of a chain
ADAM_MOMENTS = 2  # numbers that Adam keeps for a parameter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY, CHAIN = "copy", "chain"  # names of rates; those of matrix products are the precisions

Work = Callable[[], object]


def hardware(config: RunConfig, precisions: Sequence[str]) -> dict[str, Callable[[float], float]]:
    """Return the turns of what the limit is measured by, by the names of their rates."""
    device = choose_device(config.device)
    works = {precision: matmul(DTYPES[precision], device) for precision in precisions}
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


def matmul(dtype: torch.dtype, device: torch.device) -> Work:
    """Return a product of square matrices: `MATMUL_FLOPS`."""
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    left, right, product = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=product)


def copying(config: RunConfig, device: torch.device) -> Work:
    """Return a copy of as many numbers as weights and moments are: what a step must move."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters())
    source = torch.ones((1 + ADAM_MOMENTS) * parameters, device=device)
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


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
