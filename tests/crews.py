"""What each process of a crew does in tests/test_distributed.py."""

import os
import socket
import time

import torch
import torch.distributed as dist
from torch import nn

from gnbench.build import build_training, compose, load_dataset
from gnbench.norms import SyncBatchNorm
from gnbench.train import distributed
from gnbench.train.batches import draw_epoch
from gnbench.train.engine import Epoch
from tests import faults, tiny


def together(function, size, *arguments, store=None):
    """Call ``function`` in ``size`` processes that know of each other; return what each returns.

    They meet at a ``store`` that outlives them, as torchrun's does, else at one of rank 0's.
    """
    if store:
        port = store.port
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    answers = faults.FORKS.Queue()
    crew = [
        faults.FORKS.Process(
            target=_member, args=(answers, function, rank, size, port, bool(store), arguments)
        )
        for rank in range(size)
    ]
    for member in crew:
        member.start()
    found = dict(answers.get(timeout=120) for _ in crew)
    for member in crew:
        member.join(60)
        assert member.exitcode == 0, found
    return [found[rank] for rank in range(size)]


def _member(answers, function, rank, size, port, kept, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(kept),
    }
    try:
        answer = function(rank, size, *arguments)
    except BaseException as error:
        answers.put((rank, repr(error)))
        raise
    answers.put((rank, answer))
    if dist.is_initialized():
        dist.destroy_process_group()


def gradients(rank, size, overrides, images):
    """Return the gradients and running statistics after one step on the first images."""
    config = compose(*tiny.OVERRIDES, f"batch_size={16 // size}", *overrides)
    training = build_training(config, load_dataset(config))
    plan = draw_epoch(0, 0, 48, "flip")
    training.engine.train_steps(Epoch(training.train, plan, images, first_step=0, steps=1), 0, 1)
    model = training.engine.model
    loss, wrong = training.engine.totals()
    return {
        "loss": loss,
        "wrong": wrong,
        **{name: p.grad.tolist() for name, p in model.named_parameters()},
        **{name: b.tolist() for name, b in model.named_buffers()},
    }


def normalized(rank, size, shares, momentum):
    """Return output, gradients and statistics of a `SyncBatchNorm` over unequal shares."""
    distributed.crew(torch.device("cpu"))
    images = torch.randn(sum(shares), 3, 4, 4, dtype=torch.float64, generator=generator())
    weights = torch.randn(images.shape, dtype=torch.float64, generator=generator())
    begin = sum(shares[:rank])
    mine = slice(begin, begin + shares[rank])
    layer = (
        SyncBatchNorm(3, momentum=momentum) if size > 1 else nn.BatchNorm2d(3, momentum=momentum)
    )
    layer.double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 3.0]))
    outputs = []
    for _ in range(2):
        inputs = images[mine].clone().requires_grad_()
        output = layer(inputs)
        (output * weights[mine]).sum().backward()
        outputs.append([output.tolist(), inputs.grad.tolist()])
    return {
        "outputs": outputs,
        "γ": layer.weight.grad.tolist(),
        "β": layer.bias.grad.tolist(),
        "mean": layer.running_mean.tolist(),
        "variance": layer.running_var.tolist(),
        "eval": layer.eval()(images).tolist(),
    }


def generator():
    return torch.Generator().manual_seed(0)


def agreements(rank, size, signals):
    """Return after which step a crew heeds the signal that one of it receives at step ``n``."""
    crew = distributed.crew(torch.device("cpu"))
    for step in range(1000):
        number, _ = crew.agree(15 if signals.get(rank, 10**9) <= step else None, save=False)
        if number is not None:
            return step
    return None


def late(rank, size, seconds):
    """Return the sum of the ranks, the last of which comes ``seconds`` late."""
    if rank == size - 1:
        time.sleep(seconds)
    return distributed.crew(torch.device("cpu")).add(torch.tensor(float(rank))).item()
