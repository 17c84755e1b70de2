"""From a configuration to what it names: norm, network, optimizer, schedule, data, training."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from gnbench import datasets
from gnbench.config import RunConfig
from gnbench.datasets import Dataset
from gnbench.errors import ConfigError, one_line
from gnbench.norms import BatchGroupNorm, BatchRenorm, standardize_weights
from gnbench.train import distributed
from gnbench.train.batches import ResidentData, evaluation_chunk
from gnbench.train.devices import (
    choose_device,
    flush_denormals,
    set_defaults,
    set_float32_products,
)
from gnbench.train.engine import EagerEngine
from gnbench.train.graph_engine import Engine, GraphEngine
from gnbench.train.layout import place
from gnbench.train.loop import Training, steps_per_epoch
from gnbench.train.replicas import ReplicaGroup, replica_group

log = logging.getLogger(__name__)
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what it raises as well

# What a component raises for settings that it cannot take.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
OLD_STATISTICS = 0.05  # of Batch Renorm, above which it is warned of


def build_model(config: RunConfig) -> nn.Module:
    """Build the network of ``config``: YAML joins the model with its norm.

    The weights are drawn from torch's global generator.

    Raises:
        ConfigError: if the model and the norm do not fit each other or the images.
    """
    fixed = "FrozenBatchNorm" in config.norm.target
    if fixed and (not config.model.get("pretrained") or config.model.get("small_images")):
        raise ConfigError(
            f"model={config.model.name}, norm={config.norm.name}: its statistics must come with "
            "pretrained weights, as with model=torchvision or timm, model.pretrained=true and "
            "model.small_images=false; or choose norm=bn"
        )
    try:
        norm = instantiate(config.norm.arguments(), _convert_="all")
        _refuse_swallowed(config, norm)
        model = instantiate(
            config.model.arguments(),
            norm=norm,
            image=config.dataset.image,
            classes=config.dataset.classes,
            _convert_="all",
        )
    except InstantiationException as error:
        raise refusal(config, "model", "norm", error=error) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={config.model.name} built {model!r}, not a torch.nn.Module")
    if config.norm.standardize_weights:
        try:
            standardize_weights(model)
        except ValueError as error:
            raise refusal(config, "model", "norm", error=error) from error
    return model


def _refuse_swallowed(config: RunConfig, norm: Any) -> None:
    """Refuse settings that a layer would take and ignore: those of a ``**_``, as timm writes it."""
    called = getattr(norm, "func", norm)
    parameters = inspect.signature(called).parameters.values()
    if any(p.kind is p.VAR_KEYWORD and p.name.startswith("_") for p in parameters):
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]
        for key in sorted({*getattr(norm, "keywords", {})} - {*known}):
            raise ConfigError(
                f"norm={config.norm.name}: {config.norm.target} ignores {key!r}: choose from "
                f"{', '.join(known)}"
            )


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of ``config`` over the parameters of ``model``.

    With ``decay_norm_and_bias=false`` vectors (biases, γ, β) have no weight decay.

    Raises:
        ConfigError: if the optimizer refuses its settings.
    """
    settings = config.optimizer.arguments()
    if config.batch.decay_rule != "none":
        settings["weight_decay"] = weight_decay(config)
    parameters: Any = list(model.parameters())
    if not config.optimizer.decay_norm_and_bias:
        parameters = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    try:
        factory = instantiate(settings, _convert_="all")
        # The fused step is torch's own; at small batches the optimizer is a third of the time.
        fused = {"fused": True} if "fused" in inspect.signature(factory.func).parameters else {}
        optimizer: torch.optim.Optimizer = factory(parameters, **fused)
    except (InstantiationException, *REFUSALS) as error:
        raise refusal(config, "optimizer", error=error) from error
    return optimizer


def build_schedule(config: RunConfig) -> Callable[[int], float]:
    """Build the schedule of ``config``, for the length of its training.

    Raises:
        ConfigError: if the schedule refuses its settings.
    """
    try:
        factory = instantiate(config.schedule.arguments(), _convert_="all")
        schedule: Callable[[int], float] = factory(*training_length(config))
    except (InstantiationException, *REFUSALS) as error:
        raise refusal(config, "schedule", error=error) from error
    return schedule


def base_lr(config: RunConfig) -> float:
    """Apply the rule of ``conf/batch`` to ``optimizer.lr``."""
    ratio = config.sgd_batch / config.batch.reference_size
    rules = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    return float(config.optimizer.lr * rules[config.batch.lr_rule])


def weight_decay(config: RunConfig) -> float:
    """Apply the rule of ``conf/batch`` to ``optimizer.weight_decay``.

    A step of AdamW shrinks the weights by lr · decay (Loshchilov & Hutter 2019): ``per_step`` keeps
    that product as it is at ``batch.reference_size``; ``per_epoch`` keeps lr · decay · steps an
    epoch, so that the decay forgets over as many epochs at every batch size.
    """
    decay = config.optimizer.weight_decay or 0.0
    ratio = config.sgd_batch / config.batch.reference_size
    rules = {"none": 1.0, "per_step": config.optimizer.lr / base_lr(config)}
    rules["per_epoch"] = rules["per_step"] * ratio
    return decay * rules[config.batch.decay_rule]


def training_length(config: RunConfig) -> tuple[int, int]:
    """Return the steps of the whole training, and those of what its schedule calls an epoch.

    With ``batch.fixed=steps`` both are those at ``batch.reference_size``, whatever the batch size.
    """
    images = config.dataset.images
    if config.batch.fixed == "steps":
        epoch_steps = steps_per_epoch(images, config.batch.reference_size)
    else:
        epoch_steps = steps_per_epoch(images, config.sgd_batch, drops_last(config))
    return config.epochs * epoch_steps, epoch_steps


def load_dataset(config: RunConfig) -> Dataset:
    """Load and check the dataset of ``config``, cut down to ``dataset.train_size`` if set.

    Raises:
        DataError: if no source has it.
        ConfigError: if it is not what ``conf/dataset`` says it is.
    """
    return datasets.load(config.dataset)


def replicas_for(config: RunConfig, device: torch.device) -> ReplicaGroup | None:
    """Return what replays the steps of such runs, or None where they are taken one by one."""
    if config.engine == "eager" or distributed.world_size() > 1:
        return None
    return replica_group(device)


def build_training(
    config: RunConfig,
    dataset: Dataset,
    device: torch.device | None = None,
    replicas: ReplicaGroup | None = None,
) -> Training:
    """Seed, build and place everything that ``config`` names, ready for `Training.run`.

    ``device`` is that of ``config`` unless given. The steps are replayed with those of the other
    ``replicas``, else alone if at all. Seeds the global generators of torch, numpy and Python, has
    denormal numbers flushed to zero and float32 be the default, computed as such; on a GPU also
    makes torch deterministic for this process. Under torchrun, meets the other processes.

    Raises:
        ConfigError: as `gnbench.check.check`.
    """
    device = device or choose_device(config.device)
    processes = distributed.process_group(device)
    flush_denormals()
    set_defaults()
    if device.type == "cuda":
        make_deterministic(config.precision)
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # for a part of one's own that draws from these
    np.random.seed(config.seed % 2**32)
    model = build_model(config)  # drawn on the CPU: the same on every device
    channels_last = place(model, device)
    if processes.rank > 0:  # dropout must not drop the same units in every process
        sequence = np.random.SeedSequence([config.seed, processes.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    engine: Engine
    engine = plain = EagerEngine(
        model,
        build_optimizer(config, model),
        base_lr(config),
        build_schedule(config),
        config.precision,
        device,
        process_group=processes,
        compiled=config.compile and processes.size == 1,
        images_a_pass=config.batch_size,
    )
    replicas = replicas or replicas_for(config, device)
    if replicas:
        engine = GraphEngine(plain, replicas)
    if config.engine == "graph" and not replicas and processes.leads:
        where = "several processes" if processes.size > 1 else f"the {device}"
        log.warning("engine=graph: no CUDA graphs on %s; going on with engine=eager", where)
    if config.compile and processes.size > 1 and processes.leads:
        log.warning("compile=true: not on several processes; going on without")
    total_steps = training_length(config)[0]
    _tell_norms(config, model, total_steps * config.batch.accumulate, processes.leads)
    how = (*datasets.normalization(dataset, config.dataset), device, channels_last)
    validation = None
    if dataset.validation_images is not None and dataset.validation_labels is not None:
        validation = ResidentData(dataset.validation_images, dataset.validation_labels, *how)
    return Training(
        engine,
        ResidentData(dataset.train_images, dataset.train_labels, *how),
        ResidentData(dataset.test_images, dataset.test_labels, *how),
        validation,
        batch_size=config.sgd_batch,
        drop_last=drops_last(config),
        total_steps=total_steps,
        seed=config.seed,
        augmentation=config.dataset.augmentation,
        order=config.dataset.order,
        block=config.dataset.block,
        evaluate_every=config.evaluate_every,
    )


def _tell_norms(config: RunConfig, model: nn.Module, forward_passes: int, leads: bool) -> None:
    """Tell the norms how long the training is, and the user what they do at evaluation."""
    chosen, untracked, left = [], [], 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, BatchRenorm):
            layer.forward_passes = forward_passes
            left = layer.initial_share()
        groups = getattr(layer, "num_groups", getattr(layer, "groups", None))
        if groups is not None and "GroupNorm" in type(layer).__name__:
            chosen.append(f"{groups} in {name}")
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None:
            untracked.append(name)
    if leads and left > OLD_STATISTICS:
        log.warning(
            "norm=%s: when its limits are open, %.0f %% of its running statistics are still those "
            "before the training, which has %s forward passes: norm.momentum=0.1 forgets faster",
            config.norm.name,
            100 * left,
            f"{forward_passes:,}",
        )
    if leads and config.norm.get("num_groups") == "auto":
        log.info("norm.num_groups=auto: groups: %s", ", ".join(chosen))
    if leads and untracked:
        log.warning(
            "%s has no running statistics: a test image is normalized with the others of its chunk "
            "(%d in their order), so that its error depends on them",
            untracked[0],
            evaluation_chunk(*config.dataset.image[1:]),
        )


def drops_last(config: RunConfig) -> bool:
    """Try the network on every size of batch; tell whether the last, partial one must go.

    So it does where that would leave a batch norm one value per channel, or a process no image or
    fewer forward passes than another. The
    network is tried once for all seeds, without storage (on torch's meta device) where the layers
    allow it, else on a batch of at most two images: what a layer refuses for its size, it refuses
    at a single value per channel.

    Raises:
        ConfigError: naming what the network refuses, or returns in place of logits.
    """
    return _trial(config.with_(seed=0, replicas=1))


@functools.cache
def _trial(config: RunConfig) -> bool:
    with torch.random.fork_rng(devices=[]):
        for device in ("meta", "cpu"):
            try:
                with torch.device(device):
                    return _tried(config, build_model(config), device)
            except ConfigError:
                raise
            except REFUSALS as error:
                if device == "cpu" or "meta" not in str(error):
                    raise refusal(config, "model", "norm", "batch_size", error=error) from error
    raise AssertionError("unreachable")


def _tried(config: RunConfig, model: nn.Module, device: str) -> bool:
    def run(count: int) -> None:
        count = count if device == "meta" else min(count, 2)
        images = torch.zeros(count, *config.dataset.image, device=device)
        _check_logits(config, model(images), count, model.training)

    if config.processes > 1 and any(isinstance(m, BatchRenorm) for m in model.modules()):
        raise ConfigError(
            f"norm={config.norm.name} on {config.processes} processes: it trains by running "
            "statistics, of which each would have its own; use one process, or norm=syncbn"
        )
    statistics = _watch_statistics(model)
    model.train()
    run(config.batch_size)
    if single := statistics():
        raise ValueError(
            f"{single} normalizes single values, which leaves nothing of them: choose fewer groups,"
            " another norm or larger images"
        )
    drops = False
    if remainder := config.dataset.images % config.sgd_batch:
        least = remainder // config.processes  # images of a process; others may have one more
        shares = {least, least + (remainder % config.processes > 0)}
        try:
            # Layers that exchange something would wait for ever for a pass that others lack.
            passes = {math.ceil(share / config.batch_size) for share in shares}
            drops = least == 0 or len(passes) > 1
            for share in () if drops else shares:
                if last := share % config.batch_size:  # the images of its last forward pass
                    run(last)
        except ConfigError:  # it does not refuse the batch, but returns no logits
            raise
        except REFUSALS:
            drops = True
    tests = config.dataset.test_images
    if config.as_published and (last := tests % config.batch_size):
        try:
            run(last)
        except REFUSALS as error:
            line = f"as_published=true: of the last {last} test images in train mode, {error}"
            raise ValueError(line) from error
    model.eval()
    chunk = evaluation_chunk(*config.dataset.image[1:])
    for count in {min(tests, chunk), tests % chunk} - {0}:
        run(count)
    return drops


def draws_random_numbers(config: RunConfig) -> bool:
    """Tell whether a step draws from torch's generator, as dropout does; tried on two images."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(config).train()
        optimizer = build_optimizer(config, model)
        before = torch.get_rng_state()
        model(torch.zeros(min(config.batch_size, 2), *config.dataset.image)).sum().backward()
        optimizer.step()
        return not torch.equal(torch.get_rng_state(), before)


def _check_logits(config: RunConfig, logits: object, count: int, training: bool) -> None:
    wanted = (count, config.dataset.classes)
    if isinstance(logits, Tensor) and tuple(logits.shape) == wanted:
        return
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise ConfigError(
        f"model={config.model.name}: in {'training' if training else 'evaluation'} it returns "
        f"{found} for {count} images of {config.dataset.classes} classes: return logits of shape "
        f"{wanted}"
    )


def _watch_statistics(model: nn.Module) -> Callable[[], str]:
    """Have group norms looked at; what is returned names one whose groups hold a single value.

    torch refuses such a batch or instance norm by itself, a group norm only for a single image.
    """
    found: list[str] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        groups: Any = getattr(module, "num_groups", None) or getattr(module, "groups", None)
        if inputs[0][0].numel() == groups and not isinstance(module, BatchGroupNorm):
            found.append(f"{type(module).__name__}({groups} groups) on {tuple(inputs[0].shape)}")

    for module in model.modules():
        if isinstance(module, nn.GroupNorm) or type(module).__name__.endswith("GroupNorm"):
            module.register_forward_hook(look)
    return lambda: found[0] if found else ""


def make_deterministic(precision: str) -> None:
    """Have the same seed give the same bits on a GPU by deterministic kernels; TF32 only if asked.

    Where torch has none it warns; no layer of conf/ is known to need one.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Which would take a kernel for every tensor that is about to be written anyway.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    set_float32_products(precision)


def refusal(config: RunConfig, *keys: str, error: Exception) -> ConfigError:
    """Name the settings at fault beside what a component said of them."""
    cause = error
    while isinstance(cause, InstantiationException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    values = (getattr(config, key) for key in keys)
    named = ", ".join(f"{k}={getattr(v, 'name', v)}" for k, v in zip(keys, values, strict=True))
    return ConfigError(f"{named}: {one_line(cause)}")
