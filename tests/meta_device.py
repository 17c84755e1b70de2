"""What a step launches on a GPU, found out without one: by dispatch, on torch's meta device."""

import functools

import torch
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gnbench.datasets import Dataset

META = torch.device("meta")
# No kernels: they make room, or look at what is there in another way.
NO_KERNELS = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "prim.", "profiler.")
CONVOLUTIONS = ("aten.convolution.default", "aten.convolution_backward.default")
GROUP_NORMS = ("aten.native_group_norm.default", "aten.native_group_norm_backward.default")
# These keep to the order of their input, to which the gradient is converted.
KEEPING = {
    "aten.native_batch_norm_backward.default": 1,
    "aten.max_pool2d_with_indices_backward.default": 1,
}  # and where among the arguments that is
ROWS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


OVERRIDES = (
    "dataset=cifar10",
    "dataset._target_=tests.meta_device.pictures",
    *("dataset.train_images=64", "dataset.test_images=20", "dataset.classes=4"),
)


def pictures(root=None):
    """Return white images of CIFAR-10's size."""
    train, test = (torch.full((n, 32, 32, 3), 255, dtype=torch.uint8) for n in (64, 20))
    return Dataset(train, torch.arange(64) % 4, test, torch.arange(20) % 4)


class Launches(TorchDispatchMode):
    """Note what would be launched, and where tensors of another device take part.

    cuDNN computes a convolution in channels-last order if its input or its weight has it, and
    torch a group norm on a GPU in N,C,H,W order always. Tensors in another order are converted by
    kernels of which no dispatch tells (``conversions``); results come in that order.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.conversions, self.elsewhere = [], [], []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        name, kwargs = str(kernel), kwargs or {}
        self.elsewhere += [name for t in tensors((args, kwargs)) if t.device != META]
        order = None
        if name in CONVOLUTIONS:
            inputs = args[:2] if name == CONVOLUTIONS[0] else args[:3]
            # Of the backward pass the first one is the gradient, which follows the others.
            order = CHANNELS_LAST if any(map(is_last, inputs[-2:])) else ROWS
            if len(inputs) == 3 and not args[-1][0]:  # no gradient of the input, no use of weights
                inputs = inputs[:2]
        elif name in GROUP_NORMS:
            inputs, order = args[: 1 + (name == GROUP_NORMS[1])], ROWS
        elif name in KEEPING:
            inputs = args[:1]
            order = CHANNELS_LAST if is_last(args[KEEPING[name]]) else ROWS
        elif name.startswith("aten._fused_"):  # no tensor has values, nothing is changed
            self.kernels.append(name)
            return None
        if order is not None:
            wrong = [t for t in inputs if not t.is_contiguous(memory_format=order)]
            self.conversions += [f"{name} {tuple(t.shape)}" for t in wrong]
        result = kernel(*args, **kwargs)
        if order is not None:
            result = tree_map(functools.partial(ordered, order=order), result)
        self.elsewhere += [name for t in tensors(result) if t.device != META]
        aliases = [r.alias_info for r in kernel._schema.returns if r.alias_info]
        view = any(not alias.is_write for alias in aliases)
        if kernel._schema.is_mutable or not (view or name.startswith(NO_KERNELS)):
            self.kernels.append(name)
        return result


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def is_last(tensor):
    """Tell whether torch takes a tensor for one in channels-last order."""
    return suggest_memory_format(tensor) is CHANNELS_LAST


def ordered(value, order):
    images = isinstance(value, torch.Tensor) and value.ndim == 4
    return value.contiguous(memory_format=order) if images else value


class Recorder:
    """Stands in for `CudaGraphs`; ``launches`` are those of the last work, which is done once."""

    def run(self, work, strictly=False):
        with Launches() as self.launches:
            work()
