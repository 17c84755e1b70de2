"""Networks of torchvision and timm, with the chosen norm in place of their batch norms.

Each is built as its library builds it, with or without trained weights; then every BatchNorm2d
becomes ``norm(channels)``. That is what the library itself does with ``norm_layer=norm``, where it
takes one (a test says so), and it goes for the other networks, too. torchvision and timm are
imported when a network is built.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gnbench.errors import one_line

log = logging.getLogger(__name__)

Norm = Callable[[int], nn.Module]

# Activations that a norm may bring with it, by their names without case and underscores.
# fmt: off
ACTIVATIONS = (
    "relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "gelutanh",
    "quickgelu", "silu", "swish", "mish", "hardswish", "hardtanh", "hardmish",
)
# fmt: on


def torchvision_network(
    norm: Norm,
    image: Sequence[int],
    classes: int,
    arch: str,
    pretrained: bool,
    replace: bool,
    small_images: bool,
) -> nn.Module:
    """Build the classification network ``arch`` of torchvision for N,C,H,W images.

    ``image`` is (channels, height, width). For one channel the weights of the first convolution are
    added up over its three: it computes what it would of the image in gray.

    ``pretrained`` takes torchvision's default weights, and what has another shape there, such as
    the classifier, starts fresh. ``replace`` puts the norm into networks whose constructor does not
    take ``norm_layer``. ``small_images`` is the stem of a ResNet for small images (He et al. 2016,
    section 4.2): 3×3, stride 1, no pool.

    Raises:
        ValueError: if there is no such network, its weights are not to be had, or it cannot take
            the norm, the images or the stem.
    """
    network = _Torchvision(arch)
    return _build(network, norm, image[0], classes, pretrained, replace, small_images)


def timm_network(
    norm: Norm,
    image: Sequence[int],
    classes: int,
    arch: str,
    pretrained: bool,
    replace: bool,
    small_images: bool,
) -> nn.Module:
    """Build the network ``arch`` of timm, also with a tag of its weights: ``resnet26.bt_in1k``.

    Arguments and errors are those of `torchvision_network`. timm itself adapts the first
    convolution to any number of channels.
    """
    return _build(_Timm(arch), norm, image[0], classes, pretrained, replace, small_images)


@dataclass(frozen=True)
class _Torchvision:
    """A network of torchvision, by its name there."""

    arch: str

    def check(self) -> None:
        """Refuse the name of a network that there is not."""
        from torchvision import models

        names = models.list_models(module=models)
        if self.arch not in names:
            _refuse_name(self.arch, "torchvision", names)

    def build(self, classes: int, channels: int, **settings: Any) -> nn.Module:
        """Build it untrained."""
        from torchvision import models

        if self.arch in ("googlenet", "inception_v3"):  # without the auxiliary classifiers
            settings |= {"aux_logits": False, "init_weights": True}
        network: nn.Module = models.get_model(self.arch, num_classes=classes, **settings)
        _adapt_channels(network, channels)
        return network

    def load(self, channels: int) -> nn.Module:
        """Build it as it was trained."""
        from torchvision import models

        weights = models.get_model_weights(self.arch).DEFAULT
        try:
            network: nn.Module = models.get_model(self.arch, weights=weights)
        except Exception as error:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise ValueError(
                f"model.pretrained=true: {weights} could not be read ({one_line(error)}): "
                f"put {weights.url} into {folder}, or choose model.pretrained=false"
            ) from error
        _adapt_channels(network, channels)
        return network


@dataclass(frozen=True)
class _Timm:
    """A network of timm, by its name there."""

    arch: str

    def check(self) -> None:
        """Refuse the name of a network that there is not."""
        try:
            import timm
        except ImportError as error:
            raise ValueError(
                f"model.arch={self.arch} is one of timm, which is not installed: "
                "pip install 'gnbench[timm]'"
            ) from error
        if not timm.is_model(self.arch):
            _refuse_name(self.arch, "timm", timm.list_models())

    def build(self, classes: int, channels: int, **settings: Any) -> nn.Module:
        """Build it untrained."""
        import timm

        return timm.create_model(self.arch, num_classes=classes, in_chans=channels, **settings)

    def load(self, channels: int) -> nn.Module:
        """Build it as it was trained, but for the number of channels."""
        import timm

        try:
            return timm.create_model(self.arch, pretrained=True, in_chans=channels)
        except Exception as error:
            raise ValueError(
                f"model.pretrained=true: the weights of {self.arch} could not be read "
                f"({one_line(error)}): {self._remedy()}choose model.pretrained=false"
            ) from error

    def _remedy(self) -> str:
        """Say where the weights are to be had, if timm knows any."""
        import timm

        config = timm.get_pretrained_cfg(self.arch)
        if config is None or not config.hf_hub_id:
            return ""
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = f"models--{config.hf_hub_id.replace('/', '--')}"
        return (
            f"where there is a network, hf download {config.hf_hub_id}; then copy {folder} into "
            f"{HF_HUB_CACHE}, or "
        )


_Library = _Torchvision | _Timm


def _refuse_name(arch: str, library: str, names: Sequence[str]) -> None:
    close = ", ".join(difflib.get_close_matches(arch, names, n=5)) or f"e.g. {names[0]}"
    raise ValueError(
        f"model.arch={arch}: {library} has no such classification network; close: {close}; all: "
        f"{library}.{'models.' if library == 'torchvision' else ''}list_models()"
    )


def _build(
    library: _Library,
    norm: Norm,
    channels: int,
    classes: int,
    pretrained: bool,
    replace: bool,
    small_images: bool,
) -> nn.Module:
    library.check()
    dry = torch.get_default_device().type == "meta"  # nothing is computed: found out what fits
    network = _with_storage_if_need_be(lambda: library.build(classes, channels), dry)
    _check_norms(library, network, replace)
    eps = {layer.eps for layer in _batch_norms(network).values()}
    others = [type(m).__name__ for m in network.modules() if _is_other_norm(m)]
    said = []
    if pretrained and dry:
        _try_loading(library, channels)
    elif pretrained:
        said.append(_take_weights(network, library.load(channels)))
    if small_images:
        _use_small_stem(network, library.arch)
        said.append("conv1 starts fresh, for small images")
    norms, fresh = _replace_norms(network, norm)
    said.append(
        f"{len(norms)} BatchNorm2d replaced by {type(next(iter(norms.values()))).__name__}: "
        + ", ".join(norms)
    )
    if pretrained and eps != {getattr(layer, "eps", None) for layer in norms.values()}:
        said.append(f"its weights were trained with norm.eps={', '.join(map(str, eps))}")
    if pretrained and fresh:
        said.append(f"of the norms these start fresh: {_counted(fresh)}")
    if others:
        said.append(f"left as they are: {_counted(others)}")
    if bringing := [layer for layer in norms.values() if getattr(layer, "apply_act", False)]:
        network, count = without_activations(network, bringing)
        said.append(f"{count} activations left out, which the norm brings")
    if not dry:
        for line in said:
            log.info("%s: %s", library.arch, line)
    return network


def _with_storage_if_need_be(build: Callable[[], nn.Module], dry: bool) -> nn.Module:
    """Build on torch's default device; on the CPU if that has no numbers, which some inits read."""
    try:
        return build()
    except (NotImplementedError, RuntimeError) as error:
        if not dry or "meta" not in str(error):
            raise
        with torch.device("cpu"):
            return build().to("meta")


def _check_norms(library: _Library, network: nn.Module, replace: bool) -> None:
    """Refuse a network without batch norms, or one that is not made for others unless asked to."""
    own = len(_batch_norms(network))
    if not own:
        raise ValueError(
            f"model.arch={library.arch}: it has no BatchNorm2d, whose place norm could take; "
            "choose a network with batch normalization"
        )
    if not replace and not _takes_norm_layer(library):
        raise ValueError(
            f"model.arch={library.arch}: it does not take norm_layer; with model.replace=true its "
            f"{own} BatchNorm2d are replaced one by one"
        )


@functools.cache
def _takes_norm_layer(library: _Library) -> bool:
    try:
        with torch.device("meta"):
            library.build(classes=2, channels=3, norm_layer=nn.BatchNorm2d)
    except TypeError:
        return False
    except (NotImplementedError, RuntimeError):  # an init that reads numbers: it has taken it
        return True
    return True


@functools.cache
def _try_loading(library: _Library, channels: int) -> None:
    """Find out once whether the trained weights are to be had."""
    with torch.device("cpu"):
        library.load(channels)


def _take_weights(network: nn.Module, trained: nn.Module) -> str:
    """Copy into ``network`` what has the same name and shape in ``trained``; say what has not."""
    weights, own = trained.state_dict(), network.state_dict()
    fits = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    network.load_state_dict(fits, strict=False)
    if hasattr(trained, "transform_input"):  # the scale of the images that the weights expect
        network.transform_input = trained.transform_input
    fresh = [name for name in own if name not in fits]
    return f"{len(fits)} of {len(own)} tensors are pretrained; fresh: {', '.join(fresh) or 'none'}"


def _adapt_channels(network: nn.Module, channels: int) -> None:
    """Have the first convolution take gray images: with its weights added up over the colours."""
    if channels == 3:
        return
    if channels != 1:
        raise ValueError(
            f"dataset.image: torchvision's networks take 3 channels, or 1; not {channels}"
        )
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    conv.in_channels = 1
    conv.weight = nn.Parameter(conv.weight.detach().sum(dim=1, keepdim=True))


def _use_small_stem(network: nn.Module, arch: str) -> None:
    conv, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    known = type(network).__name__ == "ResNet" and isinstance(pool, nn.MaxPool2d)
    if not known or not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7):
        raise ValueError(
            f"model.small_images=true: {arch} has not the stem of a ResNet (7×7, stride 2, "
            "max-pool), which it would replace; choose model.small_images=false"
        )
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")  # as both libraries
    network.conv1, network.maxpool = small, nn.Identity()


def _replace_norms(network: nn.Module, norm: Norm) -> tuple[dict[str, nn.Module], list[str]]:
    """Put ``norm`` in the place of every BatchNorm2d.

    Return the new layers by their names, and the names of their tensors that BatchNorm2d has not.
    """
    norms: dict[str, nn.Module] = {}
    fresh: list[str] = []
    for name, layer in _batch_norms(network).items():
        acts = _children(layer)  # timm's BatchNormAct2d has a dropout and an activation
        with_act = dict(layer.named_children()).keys() == {"drop", "act"}
        if type(layer).forward is not nn.BatchNorm2d.forward and not with_act:
            raise ValueError(f"{name} is a {type(layer).__name__}: no norm can take its place")
        norms[name] = new = norm(layer.num_features)
        fresh += _take_over(new, layer)
        parent, _, child = name.rpartition(".")
        whole = nn.Sequential(new, *acts) if acts else new
        setattr(network.get_submodule(parent), child, whole)
    return norms, fresh


def _batch_norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}


def _is_other_norm(module: nn.Module) -> bool:
    named = "Norm" in type(module).__name__ and not _children(module)
    return named and not isinstance(module, nn.BatchNorm2d)


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if not isinstance(child, nn.Identity)]


@torch.no_grad()
def _take_over(new: nn.Module, old: nn.BatchNorm2d) -> list[str]:
    """Copy γ, β and what else both have in the same shape; return the names of what they have not.

    Batches are counted anew: by their number Batch Renorm sets its limits, and an average that is
    cumulative how much a batch weighs. A γ that the network starts at 0 (timm's ``zero_init_last``)
    does so with every norm.
    """
    fresh = []
    tensors: dict[str, Tensor | None] = dict(old.named_parameters()) | dict(old.named_buffers())
    for name, tensor in [*new.named_parameters(), *new.named_buffers()]:
        own = name.rpartition(".")[2]
        if own == "num_batches_tracked":
            continue
        source = tensors.get(own)
        if source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
        else:
            fresh.append(name)
    return fresh


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


class _Tracer(fx.Tracer):
    """Looks into modules that hold others, as far as the norms."""

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms = set(norms)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell what is called as a whole: dropout does not keep the mode that it is traced in."""
        return (
            m in self.norms
            or next(m.children(), None) is None
            or super().is_leaf_module(m, module_qualified_name)
        )


def without_activations(network: nn.Module, norms: Sequence[nn.Module]) -> tuple[nn.Module, int]:
    """Leave out the activations that directly follow one of ``norms``; also return how many.

    The forward pass is traced (torch.fx), once in each mode, and written down anew without them.

    Raises:
        ValueError: if it cannot be traced, or differs between the modes.
    """
    wanted = "a norm that brings its activation needs a network that torch.fx can trace"
    try:
        evaluation = _Tracer(norms).trace(network.eval())
        graph = _Tracer(norms).trace(network.train())
    except Exception as error:
        raise ValueError(f"{wanted}: {one_line(error)}") from error
    if str(evaluation) != str(graph):
        raise ValueError(f"{wanted}: this one computes something else in training")
    layers = dict(network.named_modules())
    called = [layers.get(str(node.target)) for node in graph.nodes if node.op == "call_module"]
    if not set(norms) <= set(called):
        raise ValueError(f"{wanted}: not all norms of this one are reached")
    count = 0
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if len(inputs) == 1 and _activates(node, layers) and _source(inputs[0], layers) in norms:
            node.replace_all_uses_with(inputs[0])
            graph.erase_node(node)
            count += 1
    return fx.GraphModule(network, graph, type(network).__name__), count


def _activates(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return _is_activation(type(layers[str(node.target)]).__name__)
    if node.op in ("call_function", "call_method"):
        return _is_activation(getattr(node.target, "__name__", str(node.target)))
    return False


def _source(node: fx.Node, layers: dict[str, nn.Module]) -> nn.Module | None:
    """Return the layer whose output a node is, but for those that change nothing."""
    if node.op != "call_module":
        return None
    layer = layers[str(node.target)]
    return _source(node.all_input_nodes[0], layers) if isinstance(layer, nn.Identity) else layer


def _is_activation(name: str) -> bool:
    """Tell by a name such as ReLU6, relu_, hard_swish or timm's SwishMe."""
    return name.lower().replace("_", "").removesuffix("me") in ACTIVATIONS
