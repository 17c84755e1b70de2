"""What a configuration may hold, and which of its settings make a run the run it is."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

# The settings that make a run the run it is. Everything else says how it is executed.
IDENTITY = (
    "model",
    "norm",
    "dataset",
    "optimizer",
    "schedule",
    "batch",
    "batch_size",
    "epochs",
    "precision",
    "seed",
)
NOT_IDENTITY = {"dataset": ("root",)}

CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": ("fp32", "bf16"),
    "engine": ("auto", "eager", "graph"),
    "progress": ("auto", "bar", "lines"),
    "batch.fixed": ("epochs", "steps"),
    "batch.lr_rule": ("none", "linear", "sqrt"),
    "dataset.augmentation": ("none", "flip", "pad_crop_flip"),
    "optimizer.decay_norm_and_bias": (True, False),
}
POSITIVE_INTEGERS = ("batch_size", "epochs", "batch.reference_size", "processes")
# Where a component has this setting, its least and greatest value; the least of "over" is excluded.
RANGES: dict[str, tuple[str, float, float]] = {
    "norm.eps": ("over", 0, math.inf),
    "norm.momentum": ("from", 0, 1),
    "model.dropout": ("from", 0, 1),
    "optimizer.lr": ("over", 0, math.inf),
    "optimizer.eps": ("over", 0, math.inf),
    "optimizer.weight_decay": ("from", 0, math.inf),
    "optimizer.momentum": ("from", 0, 1),
    "schedule.warmup_epochs": ("from", 0, math.inf),
    "schedule.gamma": ("over", 0, math.inf),
    "checkpoint_seconds": ("from", 0, math.inf),
}
MOST_REPLICAS = 1000
LARGEST = 2**63 - 1  # of the integers that torch takes
NULLABLE = ("norm.momentum",)  # null: a cumulative average
DATASET_KEYS = {
    "name",
    "_target_",
    "root",
    "train_size",
    "image",
    "classes",
    "train_images",
    "test_images",
    "mean",
    "std",
    "augmentation",
}
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value and what to do."""


@dataclass
class BatchConfig:
    """How the rest of the recipe answers to the batch size (``conf/batch``)."""

    name: str = MISSING
    fixed: str = MISSING
    lr_rule: str = MISSING
    reference_size: int = MISSING


@dataclass
class Config:
    """The types of ``conf/config.yaml``; the values stand there."""

    model: Any = MISSING
    norm: Any = MISSING
    dataset: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    batch: BatchConfig = field(default_factory=BatchConfig)

    batch_size: int = MISSING
    epochs: int = MISSING
    seed: int = MISSING
    precision: str = MISSING
    processes: int = MISSING
    replicas: int = MISSING

    study: str = MISSING
    outputs: str = MISSING
    device: str = MISSING
    engine: str = MISSING
    compile: bool = MISSING
    checkpoint_seconds: float = MISSING
    progress: str = MISSING
    rerun: bool = MISSING
    wait: bool = MISSING


@dataclass
class FigureConfig:
    """How ``python -m gnbench.aggregate`` draws a study."""

    order: str = MISSING
    baseline: str | None = MISSING
    reference: str | None = MISSING


@dataclass
class AggregateConfig:
    """The types of ``conf/aggregate.yaml``; the values stand there."""

    outputs: str = MISSING
    study: str | None = MISSING
    figure: FigureConfig = field(default_factory=FigureConfig)


@dataclass
class StatusConfig:
    """The types of ``conf/status.yaml``; the values stand there."""

    outputs: str = MISSING
    study: str | None = MISSING


@dataclass
class BenchConfig:
    """The types of ``conf/bench.yaml``; the values stand there."""

    datasets: list[str] = MISSING
    models: list[str] = MISSING
    norms: list[str] = MISSING
    batch_sizes: list[int] = MISSING
    precisions: list[str] = MISSING
    runs: list[int] = MISSING
    replicas: list[int] = MISSING
    compile: list[bool] = MISSING
    device: str = MISSING
    warmup_steps: int = MISSING
    rounds: int = MISSING
    seconds: float = MISSING
    outputs: str = MISSING


def conf_dir() -> Path:
    """Return the folder of the YAML files: in the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def identity(config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Return the settings that make a run the run it is, as plain resolved values.

    ``config`` is a composed configuration or the ``config`` of a ``run.json``.
    """
    settings = {key: _plain(config[key]) for key in IDENTITY}
    if processes(config) > 1:  # a run on one has the name it had before there were several
        settings["processes"] = processes(config)
    for group, keys in NOT_IDENTITY.items():
        settings[group] = {k: v for k, v in settings[group].items() if k not in keys}
    return settings


def processes(config: Mapping[str, Any] | DictConfig) -> int:
    """Return how many processes train a run together, each on ``batch_size`` images a step."""
    return int(config.get("processes", 1))


def replicas(config: DictConfig) -> list[DictConfig]:
    """Return the runs that a configuration stands for: one for each of its ``replicas`` seeds."""
    if config.replicas == 1:
        return [config]
    runs = []
    for seed in range(config.seed, config.seed + config.replicas):
        runs.append(config.copy())
        runs[-1].seed, runs[-1].replicas = seed, 1
    return runs


def digest(config: Mapping[str, Any] | DictConfig) -> str:
    """Return the SHA-256 of the identity, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def run_id(config: Mapping[str, Any] | DictConfig) -> str:
    """Name a run: ``<dataset>-<model>-<norm>-bs<N>-seed<S>-<8 hex digits of its identity>``."""
    settings = identity(config)
    parts = (
        settings["dataset"]["name"],
        settings["model"]["name"],
        settings["norm"]["name"],
        f"bs{settings['batch_size']}",
        f"seed{settings['seed']}",
        digest(config)[:8],
    )
    return "-".join(str(part) for part in parts)


def check_study(study: Any) -> None:
    """Raise `ConfigError` unless ``study`` is a plain name: it becomes a folder."""
    if not isinstance(study, str) or not PLAIN_NAME.fullmatch(study) or ".." in study:
        raise ConfigError(
            f"study={study!r} is not a plain name: use letters, digits, '_', '-' and '.' "
            "(it names a folder)"
        )


def check(config: DictConfig) -> None:
    """Raise `ConfigError` for a value that cannot work, as far as can be told without torch."""
    _check_interpolations(config)
    check_study(config.study)
    if not config.outputs:
        raise ConfigError("outputs='' is not a folder: choose one, e.g. outputs=outputs")
    _check_keys("", config, {f.name for f in fields(Config)} | {"hydra"})
    _check_keys("batch.", config.batch, {f.name for f in fields(BatchConfig)})
    for key in ("model", "norm", "dataset", "optimizer", "schedule"):
        group = config[key]
        if not isinstance(group, DictConfig) or "_target_" not in group:
            raise ConfigError(f"{key}={group} is not a component: choose one of {options(key)}")
        if not PLAIN_NAME.fullmatch(str(group.get("name"))):
            raise ConfigError(f"{key}.name={group.get('name')!r} is not a plain name")
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            choices = ", ".join(str(choice).lower() for choice in allowed)
            raise ConfigError(f"{key}={value}: choose one of {choices}")
    for key in POSITIVE_INTEGERS:
        check_integer(key, OmegaConf.select(config, key), least=1)
    check_integer("replicas", config.replicas, least=1, most=MOST_REPLICAS)
    if config.replicas > 1 and config.rerun:
        raise ConfigError(
            f"replicas={config.replicas} rerun=true: after an interruption the first would be "
            "trained again; sweep over seeds instead: -m seed=0,1"
        )
    check_integer("seed", config.seed, least=0, most=LARGEST + 1 - config.replicas)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise ConfigError(f"device={config.device}: choose one of auto, cpu, cuda, cuda:N")
    betas = config.optimizer.get("betas")
    if betas is not None and not (
        OmegaConf.is_list(betas)
        and len(betas) == 2
        and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
    ):
        raise ConfigError(f"optimizer.betas={betas}: give two numbers from 0 to below 1")
    for key, (bound, least, most) in RANGES.items():
        _check_range(config, key, bound, least, most)

    _check_dataset(config.dataset)
    dataset = config.dataset
    images = dataset.train_images if dataset.train_size is None else dataset.train_size
    most = images // config.processes
    if config.batch_size > most:
        by = f" for {config.processes} processes" if config.processes > 1 else ""
        raise ConfigError(
            f"batch_size={config.batch_size}{by} is larger than the training set "
            f"({images} images of {dataset.name}): choose at most {most}"
        )


def one_line(error: BaseException) -> str:
    """Put into one line what an exception says, that of Hydra or OmegaConf with its cause."""
    texts = [str(error).strip() or type(error).__name__]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        texts.append(str(error.__cause__))
    if isinstance(error, ConfigError):
        return texts[0]
    lines = []
    for text in texts:
        message = text.partition("Config search path:")[0]
        lines += [line.strip() for line in message.splitlines() if line.strip()]
    noise = ("full_key:", "object_type=", "reference_type=", "To append to your config use")
    kept = [line.removesuffix(".") for line in lines if not line.startswith(noise)]
    return "; ".join(dict.fromkeys(kept)).replace(":;", ":")


def check_integer(key: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise `ConfigError` unless ``least <= value <= most``."""
    wanted = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key}={value}: must be {wanted}")
    if value < least or (most is not None and value > most):
        raise ConfigError(f"{key}={value}: must be {wanted}")
    if value > LARGEST:
        raise ConfigError(f"{key}={value}: must be at most {LARGEST}")


def is_number(value: Any) -> bool:
    """Tell whether ``value`` is a finite number that fits into a float."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max


def options(group: str) -> str:
    """List what ``conf/<group>`` offers, for a message."""
    return ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))


def _check_interpolations(config: DictConfig) -> None:
    own = config.copy()
    with open_dict(own):
        own.pop("hydra", None)
    try:
        OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {one_line(error)}") from error


def _check_keys(prefix: str, node: DictConfig, known: set[str]) -> None:
    for key in sorted(set(map(str, node)) - known):
        raise ConfigError(
            f"{prefix}{key}: there is no such setting; --cfg job lists those there are"
        )


def _check_dataset(dataset: DictConfig) -> None:
    _check_keys("dataset.", dataset, DATASET_KEYS)
    for key in ("classes", "train_images", "test_images"):
        check_integer(f"dataset.{key}", dataset[key], least=1)
    if dataset.train_size is not None:
        check_integer(
            "dataset.train_size", dataset.train_size, dataset.classes, dataset.train_images
        )
    image = list(dataset.image) if OmegaConf.is_list(dataset.image) else []
    if len(image) != 3 or not all(isinstance(size, int) and size >= 1 for size in image):
        raise ConfigError(f"dataset.image={dataset.image}: give [channels, height, width]")
    for key in ("mean", "std"):
        values = list(dataset[key]) if OmegaConf.is_list(dataset[key]) else []
        numbers = [v for v in values if is_number(v)]
        if len(numbers) != image[0] or len(values) != image[0]:
            raise ConfigError(
                f"dataset.{key}={dataset[key]}: must be a list of one number per channel "
                f"({image[0]})"
            )
    if min(dataset.std) <= 0:
        raise ConfigError(f"dataset.std={dataset.std}: must be positive")


def _check_range(config: DictConfig, key: str, bound: str, least: float, most: float) -> None:
    group, _, name = key.rpartition(".")
    node = config[group] if group else config
    if name not in node or (node[name] is None and key in NULLABLE):
        return
    value = node[name]
    fits = (value > least if bound == "over" else value >= least) if is_number(value) else False
    if not fits or value > most:
        wanted = f"{bound} {least:g}" + (f" to {most:g}" if math.isfinite(most) else "")
        raise ConfigError(f"{key}={value}: must be a number {wanted}")


def _plain(node: Any) -> Any:
    """Turn a config node into plain values; ``1.0`` and ``1`` become the same setting."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    if isinstance(node, float) and node.is_integer():
        return int(node)
    return node


# Ours are to replace the plugins' configurations of the same name; Hydra advises against it.
warnings.filterwarnings("ignore", r"\n'hydra/launcher/\w+' is validated against ConfigStore schema")

ConfigStore.instance().store(name="schema", node=Config)
ConfigStore.instance().store(name="aggregate_schema", node=AggregateConfig)
ConfigStore.instance().store(name="status_schema", node=StatusConfig)
ConfigStore.instance().store(name="bench_schema", node=BenchConfig)
OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(_root_), replace=True)
