"""What each of several processes does in tests/test_distributed.py."""

import os
import socket
import time

import torch
import torch.distributed as dist
from torch import nn

from gnbench.norms import SyncBatchNorm
from gnbench.train import distributed
from gnbench.train.batches import draw_epoch
from gnbench.train.engine import Epoch
from tests import faults
from tests.trainings import CPU, training


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
    processes = [
        faults.FORKS.Process(
            target=_answer, args=(answers, function, rank, size, port, bool(store), arguments)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, found
    return [found[rank] for rank in range(size)]


def _answer(answers, function, rank, size, port, kept, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(kept),
    }
    try:
        answer = function(distributed.process_group(CPU), *arguments)
    except BaseException as error:
        answers.put((rank, repr(error)))
        raise
    answers.put((rank, answer))
    if dist.is_initialized():
        dist.destroy_process_group()


def gradients(group, norm, images, images_a_pass=None):
    """Return the gradients and running statistics after one step on the first images."""
    one = training(norm, processes=group, images_a_pass=images_a_pass)
    plan = draw_epoch(0, 0, 48, "flip")
    one.engine.train_steps(Epoch(one.train, plan, images, first_step=0, steps=1), 0, 1)
    loss_sum, wrong = one.engine.totals()
    model = one.engine.model
    return {
        "loss_sum": loss_sum,
        "wrong": wrong,
        **{name: p.grad.tolist() for name, p in model.named_parameters()},
        **{name: b.tolist() for name, b in model.named_buffers()},
    }


def normalized(group, shares, momentum):
    """Return output, gradients and statistics of a `SyncBatchNorm` over unequal shares."""
    images = torch.randn(sum(shares), 3, 4, 4, dtype=torch.float64, generator=generator())
    weights = torch.randn(images.shape, dtype=torch.float64, generator=generator())
    begin = sum(shares[: group.rank])
    mine = slice(begin, begin + shares[group.rank])
    layer = (SyncBatchNorm if group.size > 1 else nn.BatchNorm2d)(3, momentum=momentum).double()
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


def agreements(group, rank, step):
    """Return after which step all heed the signal that one of them receives at ``step``."""
    for taken in range(1000):
        signal = 15 if group.rank == rank and taken >= step else None
        number, _ = group.agree(signal, save=False)
        if number is not None:
            return taken
    return None


def beginnings(group, skip):
    """Return what the others are told: to begin from a state, or that there is a record."""
    if not group.leads:
        return group.wait_to_begin()
    if not skip:
        group.begin_training({"step": 7})
    group.skip_training({"status": "completed"})
    return None


def late(group, seconds):
    """Return the sum of the ranks, the last of which comes ``seconds`` late."""
    if group.rank == group.size - 1:
        time.sleep(seconds)
    return group.add(torch.tensor(float(group.rank))).item()
