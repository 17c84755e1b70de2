"""A network → its layers, as they are called: what each is, what it returns, what it learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnbench.build import REFUSALS, build_model
from gnbench.config import RunConfig
from gnbench.errors import ConfigError

# Of torch, by the module that a class stands in.
KINDS = {
    "conv": "conv",
    "linear": "linear",
    "activation": "activation",
    "pooling": "pool",
    "adaptive_avgmax_pool": "pool",
}
NOT_SAID = ("eps=", "affine=", "momentum=", "track_running", "inplace", "bias=", "start_", "end_")


@dataclass(frozen=True)
class Layer:
    """A call of a module that calls no other, or of one with parameters of its own beside them.

    ``output`` is its shape without the images (C,H,W or features), ``parameters`` are counted where
    they are met first.
    """

    name: str
    kind: str  # one of `KINDS`, norm, or other
    text: str
    output: tuple[int, ...]
    parameters: int


def layers(config: RunConfig) -> list[Layer]:
    """Return the layers of the network of ``config`` in the order of their calls.

    The network is run once without storage (torch's meta device) where its layers allow it, else on
    two images of zeros. What has no module, such as a sum, is not among them; `nn.Identity`,
    which does nothing, neither.

    Raises:
        ConfigError: if there is no such network.
    """
    with torch.random.fork_rng(devices=[]):
        for device in ("meta", "cpu"):
            try:
                with torch.device(device):
                    model = build_model(config).eval()
                    images = torch.zeros(2, *config.dataset.image)
                with torch.no_grad(), watched(model) as found:
                    model(images)
                return found
            except ConfigError:
                raise
            except REFUSALS as error:
                if device == "cpu" or "meta" not in str(error):
                    raise
    raise AssertionError("unreachable")


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Layer]]:
    """Note every layer that ``model`` calls meanwhile, in the list that is yielded."""
    found: list[Layer] = []
    called: list[bool] = []  # of the modules under way: whether they have called another
    counted: set[int] = set()

    def count(module: nn.Module, recurse: bool) -> int:
        new = {id(p): p for p in module.parameters(recurse) if id(p) not in counted}
        counted.update(new)
        return sum(p.numel() for p in new.values())

    def before(module: nn.Module, inputs: Any) -> None:
        if called:
            called[-1] = True
        called.append(False)

    def after(name: str, module: nn.Module, output: Any) -> None:
        calls_others = called.pop()
        own = count(module, recurse=not calls_others)
        if isinstance(module, nn.Identity) or (calls_others and not own):
            return
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        found.append(Layer(name or "network", kind_of(module), text_of(module), shape, own))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if "parametrizations" in name.split("."):  # of weights: part of their layer
                continue
            hooks = (
                module.register_forward_pre_hook(before),
                module.register_forward_hook(lambda m, _, output, n=name: after(n, m, output)),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        yield found


def kind_of(module: nn.Module) -> str:
    """Tell what kind of layer a module is."""
    kind = type(module)
    if "norm" in kind.__name__.lower() or kind.__module__.startswith("gnbench.norms"):
        return "norm"
    for base in kind.__mro__:
        found = KINDS.get(base.__module__.rpartition(".")[2])
        if found and base not in (nn.Identity, nn.Bilinear):
            return found
    return "other"


def text_of(module: nn.Module) -> str:
    """Put a layer into a few words."""
    if isinstance(module, nn.Conv2d):
        size = "×".join(map(str, module.kernel_size))
        text = f"conv {size}, {module.in_channels}→{module.out_channels}"
        if max(module.stride) > 1:
            text += f", stride {max(module.stride)}"
        return text + (f", {module.groups} groups" if module.groups > 1 else "")
    if isinstance(module, nn.Linear):
        return f"linear {module.in_features}→{module.out_features}"
    if isinstance(module, nn.MaxPool2d):
        sides: Any = module.kernel_size
        return f"max-pool {sides if isinstance(sides, int) else '×'.join(map(str, sides))}"
    said = [part.strip() for part in module.extra_repr().replace("\n", ",").split(",")]
    kept = [part for part in said if part and not part.startswith(NOT_SAID)]
    name = type(module).__name__
    return f"{name} {', '.join(kept)}" if kept and len(", ".join(kept)) <= 30 else name
