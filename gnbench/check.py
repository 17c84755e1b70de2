"""Can this be trained? Found out without data, memory or a run directory."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import os
import pkgutil
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from hydra.core.hydra_config import HydraConfig
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gnbench.build import base_lr, build_optimizer, build_schedule, drops_last, training_length
from gnbench.composition import composed
from gnbench.config import DatasetConfig, RunConfig
from gnbench.errors import ConfigError, one_line
from gnbench.identity import COMPONENTS
from gnbench.train import distributed
from gnbench.train.devices import choose_device, free_memory_bytes, has_native_bf16, has_tf32
from gnbench.train.loop import steps_per_epoch

# Types of settings in a component's signature that are held against the values; others are not.
PLAIN = (bool, int, float, str, Path, Sequence[int], Sequence[float], Sequence[str])


def compose(*overrides: str, config_dirs: Sequence[str] = ()) -> RunConfig:
    """Compose and check a run as the command line does: ``compose("norm=gn", "batch_size=2")``.

    ``config_dirs`` are folders of YAML files of one's own, as ``--config-dir`` names one.

    Raises:
        ConfigError: for a key or value that does not exist or cannot work.
    """
    config = RunConfig.parse(composed(*overrides, config_dirs=config_dirs))
    check(config)
    check_machine(config)
    return config


def config_dirs() -> list[str]:
    """Return the folders that ``--config-dir`` or ``hydra.searchpath`` gave the running command."""
    return [
        f"{source.schema}://{source.path}"
        for source in HydraConfig.get().runtime.config_sources
        if source.provider not in ("hydra", "main", "schema")
    ]


@functools.cache
def check(config: RunConfig) -> None:
    """Find out whether a run can be trained, on whatever machine.

    The network is built and run without storage (torch's meta device).

    Raises:
        ConfigError: naming the value that cannot work, and what to do.
    """
    for group in COMPONENTS:
        _check_types(config, group)
    _check_tracker(config)
    drops_last(config)  # tries the network
    with torch.random.fork_rng(devices=[]):
        build_optimizer(config, nn.Linear(1, 1))
    _check_rates(config)
    _check_order(config)


def check_machine(config: RunConfig, remote: bool = False) -> None:
    """Find out whether this machine, and this process, can train a run; if ``remote`` but start it.

    Raises:
        ConfigError: naming the value that cannot work here, and what to do.
    """
    size = distributed.world_size()
    if size > 1 and "RANK" not in os.environ:
        raise ConfigError("WORLD_SIZE is set without RANK: start with torchrun, or unset it")
    if config.processes != size:
        raise ConfigError(
            f"processes={config.processes}: this is one of {size}; start torchrun "
            f"--nproc-per-node={config.processes} -m gnbench and leave processes alone"
        )
    if remote:
        return
    needed = getattr(pkgutil.resolve_name(config.tracker.target), "needs", None)
    if needed and not importlib.util.find_spec(needed):
        raise ConfigError(
            f"tracker={config.tracker.name}: {needed} is not installed: "
            f"pip install 'gnbench[{needed}]'"
        )
    _check_memory(config.dataset)
    device = choose_device(config.device)
    if config.precision == "bf16" and not has_native_bf16(device):
        raise ConfigError(
            f"precision=bf16: the {device.type} of this machine computes bf16 in emulation, many "
            "times more slowly than fp32; choose precision=fp32"
        )
    if config.precision == "tf32" and not has_tf32(device):
        raise ConfigError(
            f"precision=tf32: the {device.type} of this machine has no TF32, as GPUs have from "
            "compute capability 8 on; choose precision=fp32"
        )


def _check_tracker(config: RunConfig) -> None:
    """Refuse what cannot be called as a tracker: it would be built when the training begins."""
    target = pkgutil.resolve_name(config.tracker.target)
    name = f"tracker={config.tracker.name}"
    for key, value in config.tracker.arguments().items():
        if isinstance(value, str) and "://" in value and "@" in urlsplit(value).netloc:
            raise ConfigError(
                f"tracker.{key} names a user or a password, which run.json would keep: give them "
                "by the environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
            )
    try:
        inspect.signature(target).bind(None, **config.tracker.arguments())
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error
    if isinstance(target, type):
        lacking = [method for method in ("log", "close") if not hasattr(target, method)]
        if lacking:
            raise ConfigError(f"{name}: {config.tracker.target} has no {', '.join(lacking)}()")


def _check_memory(dataset: DatasetConfig) -> None:
    """Refuse images that this machine cannot hold before they are fetched or decoded."""
    count = dataset.images + (dataset.validation_size or 0) + dataset.test_images
    needed, free = count * math.prod(dataset.image), free_memory_bytes()
    if free is not None and needed > free:
        raise ConfigError(
            f"dataset={dataset.name}: {count:,} images of {dataset.image} take {needed:,} bytes, "
            f"and {free:,} are free here: choose a smaller dataset.image or dataset.train_size"
        )


def _check_rates(config: RunConfig) -> None:
    """Refuse a learning rate that no float holds now, not at the end of the training."""
    schedule, last = build_schedule(config), training_length(config)[0] - 1
    try:
        rates = [base_lr(config) * schedule(step) for step in (0, last)]
    except OverflowError:
        rates = [math.inf]
    if not all(map(math.isfinite, rates)):
        raise ConfigError(
            f"optimizer.lr={config.optimizer.lr}, schedule={config.schedule.name}, "
            f"batch={config.batch.name}: the learning rate becomes infinite; choose a smaller one"
        )


def _check_order(config: RunConfig) -> None:
    """Refuse a training that ends in the midst of the classes."""
    if config.dataset.order != "sorted_by_class":
        return
    epoch = steps_per_epoch(config.dataset.images, config.sgd_batch, drops_last(config))
    steps = training_length(config)[0]
    if steps % epoch:
        raise ConfigError(
            f"dataset.order=sorted_by_class batch.fixed={config.batch.fixed}: {steps:,} steps, of "
            f"{epoch:,} an epoch, would end before the last classes have come; choose "
            "batch.fixed=epochs or another order"
        )


def _check_types(config: RunConfig, group: str) -> None:
    """Hold the settings of a component against the plain types in its signature.

    Python would take the text of ``model.final_pool=abc`` for true.
    """
    component = getattr(config, group)
    try:
        target = pkgutil.resolve_name(component.target)
        signature = inspect.signature(target)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        name = f"{group}._target_={component.target}"
        raise ConfigError(f"{name}: {one_line(error)}") from error
    try:
        called: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        hints = typing.get_type_hints(called)
    except Exception:  # of a component that is not ours, such as names that are not there
        hints = {}
    for key, value in component.plain().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{group}.{key}={value}: must be a finite number")
        hint: Any = hints.get(key)
        if key not in signature.parameters or not _is_plain(hint):
            continue
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            wanted = wanted.replace("collections.abc.Sequence", "list")
            raise ConfigError(f"{group}.{key}={value}: must be of type {wanted}") from error


def _is_plain(hint: Any) -> bool:
    """Tell a type of plain values, or a union of them, from any other."""
    alternatives = typing.get_args(hint) if _is_union(hint) else (hint,)
    return all(
        a in (*PLAIN, type(None)) or typing.get_origin(a) is typing.Literal for a in alternatives
    )


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | str))
