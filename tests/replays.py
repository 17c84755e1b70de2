"""What a CUDA graph does, on the CPU: the kernels of some work recorded with their tensors."""

from collections import Counter
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Kernels(TorchDispatchMode):
    """Record every kernel with the very tensors it read and wrote, as a stream capture does.

    What Python computes between them is not there at a replay. As under a capture, to ask the
    device for a value is an error.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel in READS:
            raise RuntimeError(f"{kernel} waits for the device")
        result = kernel(*args, **(kwargs or {}))
        if kernel._schema.is_mutable or not storages(result) <= storages((args, kwargs)):
            self.calls.append((kernel, args, kwargs or {}, result))
        return result  # else a view, which stays one

    @torch.inference_mode()
    def replay(self, calls=None):
        for kernel, args, kwargs, result in self.calls[:calls]:
            again = kernel(*args, **kwargs)
            if not kernel._schema.is_mutable:
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages(tree):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(tree)}


class Recorder:
    """Stands in for `CudaGraphs`. Recording does the work as well: a Program must not rely on it.

    ``replays`` counts them by the number of their branches. ``before(branches, kernels)`` is called
    before each.
    """

    def __init__(self, before=lambda branches, kernels: None):
        self.recorded = 0
        self.replays = Counter()
        self.before = before

    def run(self, work, strictly=False):
        with Kernels() if strictly else nullcontext():
            work()

    def side_by_side(self, works):
        def one_by_one():
            for work in works:
                work()

        one_by_one.branches = len(works)
        return one_by_one

    def renew(self):
        pass

    def record(self, work):
        self.recorded += 1
        with Kernels() as kernels:
            work()

        def replay():
            self.replays[work.branches] += 1
            self.before(work.branches, kernels)
            kernels.replay()

        return replay
