"""How many cells go side by side on this machine: as its cores, or GPUs, and its memory allow."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from gnbench.config import RunConfig
from gnbench.train import distributed

log = logging.getLogger(__name__)

PROCESS_BYTES = 900 * 2**20  # of a process that trains next to nothing: torch and its libraries
COPIES_OF_DATA = 2  # while it is read
BYTES_A_WEIGHT = 16  # float32: itself, its gradient, Adam's two moments
COPIES_OF_ACTIVATIONS = 3  # what is held for the backward pass, its gradients, what kernels need


def at_a_time(runs: Sequence[RunConfig]) -> int:
    """Return how many of these cells to carry out at a time: 1 is one after another.

    One under torchrun, whose processes are one run, and where there is no ``/proc``, by which an
    interrupted command finds the workers that have to save.
    """
    import joblib  # knows the limits of a control group, too

    from gnbench.train.devices import free_memory_bytes  # imports torch: not for --help

    if distributed.world_size() > 1 or not Path("/proc/self/fd").exists():
        return 1
    gpus = _gpus(runs)
    places = max(1, min(gpus or joblib.cpu_count(), len(runs)))
    free = free_memory_bytes() if places > 1 else None
    if free is None:
        return places
    needed = max(needed_bytes(run, on_gpu=gpus > 0) for run in _largest(runs))
    room = max(1, free // needed)
    if room < places:
        log.warning(
            "gnbench: a run takes about %.1f GiB, and %.1f are free: %d at a time, not %d",
            needed / 2**30,
            free / 2**30,
            room,
            places,
        )
    return min(room, places)


def needed_bytes(config: RunConfig, on_gpu: bool = False) -> int:
    """Estimate the memory of this machine that a process takes which trains ``config``.

    On a CPU that of activations as well, of a step or of a test pass, whichever are more.
    """
    import torch

    from gnbench.build import REFUSALS, build_model
    from gnbench.train.batches import evaluation_chunk

    held: dict[int, torch.UntypedStorage] = {}
    own: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # on the meta device storages have no addresses
            held[storage._cdata] = storage
        return tensor.detach()  # or it would hold the graph for good

    data = config.dataset
    count = data.images + (data.validation_size or 0) + data.test_images
    least = PROCESS_BYTES + COPIES_OF_DATA * count * math.prod(data.image)
    if on_gpu:
        return least
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = build_model(config).train()
            own |= {t.untyped_storage()._cdata for t in model.state_dict().values()}
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(torch.empty(config.batch_size, *data.image))
            weights = sum(p.numel() for p in model.parameters())
        except REFUSALS:  # a layer that does not work without storage: the rest has to do
            weights = 0
    sizes = [storage.nbytes() for storage in held.values()] or [0]
    chunk = min(evaluation_chunk(*data.image[1:]), data.test_images)
    tested = max(sizes) // config.batch_size * chunk
    activations = COPIES_OF_ACTIVATIONS * max(sum(sizes), tested)
    return least + BYTES_A_WEIGHT * weights + activations


def _gpus(runs: Sequence[RunConfig]) -> int:
    """Return how many GPUs the runs can use; 0 if one of them is on the CPU."""
    import torch

    from gnbench.train.devices import choose_device

    names = {run.device for run in runs}
    if any(choose_device(name).type == "cpu" for name in names):
        return 0
    return len(names) if all(":" in name for name in names) else torch.cuda.device_count()


def _largest(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return of every network and dataset the run with the largest batch."""
    found: dict[str, RunConfig] = {}
    for run in sorted(runs, key=lambda run: run.batch_size):
        settings = [getattr(run, group).plain() for group in ("model", "norm", "dataset")]
        found[json.dumps(settings)] = run
    return list(found.values())
