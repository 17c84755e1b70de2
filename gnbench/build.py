"""From a configuration to what it names: checked, then built, component by component."""

from __future__ import annotations

import inspect
import logging
import math
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gnbench.config import ConfigError, check, conf_dir, is_number, one_line
from gnbench.datasets import Dataset, balanced_subset
from gnbench.train import cuda_graphs as graphs
from gnbench.train import distributed
from gnbench.train.batches import ResidentData
from gnbench.train.cuda_graphs import Pack
from gnbench.train.devices import choose_device, flush_denormals
from gnbench.train.distributed import Crew
from gnbench.train.engine import EagerEngine, GraphEngine
from gnbench.train.loop import Training, steps_per_epoch

log = logging.getLogger(__name__)
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what it raises as well

OWN_KEYS = ("name", "decay_norm_and_bias")  # settings of gnbench beside those of the component
MIB = 1024**2


def compose(*overrides: str) -> DictConfig:
    """Compose a configuration as the command line does: ``compose("norm=gn", "batch_size=2")``.

    Raises:
        ConfigError: for a key or value that does not exist or cannot work.
    """
    surrounding = GlobalHydra.instance()
    application, surrounding.hydra = surrounding.hydra, None  # of the caller, if it is one
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = hydra_compose("config", overrides=list(overrides))
    except Exception as error:
        raise ConfigError(one_line(error)) from error
    finally:
        surrounding.hydra = application
        GlobalHydra.set_instance(surrounding)  # initialize_config_dir has left a copy
    check_run(config)
    return config


def build_model(config: DictConfig) -> nn.Module:
    """Build the network of ``config``: YAML joins the model with its norm.

    The weights are drawn from torch's global generator.

    Raises:
        ConfigError: if the model and the norm do not fit each other or the images.
    """
    try:
        norm = instantiate(_component(config.norm))
        model = instantiate(
            _component(config.model),
            norm=norm,
            image=list(config.dataset.image),
            classes=config.dataset.classes,
            _convert_="all",
        )
    except InstantiationException as error:
        raise _config_error(config, "model", "norm", error=error) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={config.model.name} built {model!r}, not a torch.nn.Module")
    return model


def build_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of ``config`` over the parameters of ``model``.

    With ``decay_norm_and_bias=false`` vectors (biases, γ, β) have no weight decay.

    Raises:
        ConfigError: if the optimizer refuses its settings.
    """
    parameters: Any = list(model.parameters())
    if not config.optimizer.decay_norm_and_bias:
        parameters = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    try:
        factory = instantiate(_component(config.optimizer), _convert_="all")
        # The fused step is torch's own; at small batches the optimizer is a third of the time.
        fused = {"fused": True} if "fused" in inspect.signature(factory.func).parameters else {}
        optimizer: torch.optim.Optimizer = factory(parameters, **fused)
    except (InstantiationException, TypeError, ValueError, ArithmeticError) as error:
        raise _config_error(config, "optimizer", error=error) from error
    return optimizer


def load_dataset(config: DictConfig) -> Dataset:
    """Load the dataset of ``config``, cut down to ``dataset.train_size`` if set.

    Raises:
        DataError: if no source has it.
        ConfigError: if it is not what ``conf/dataset`` says it is.
    """
    settings = config.dataset
    dataset: Dataset = get_method(settings._target_)(settings.root)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"dataset._target_={settings._target_} does not return a Dataset")
    channels, height, width = settings.image
    found_classes = int(dataset.train_labels.max()) + 1
    if found_classes != settings.classes:
        raise ConfigError(f"dataset.classes={settings.classes}: the labels say {found_classes}")
    for split, count in (("train", settings.train_images), ("test", settings.test_images)):
        found = tuple(getattr(dataset, f"{split}_images").shape)
        if found != (count, height, width, channels):
            raise ConfigError(
                f"dataset={settings.name}: the {split} images are {found} (N,H,W,C) but its "
                f"settings say {(count, height, width, channels)}"
            )
    if settings.train_size is not None:
        dataset = balanced_subset(dataset, settings.train_size)
    return dataset


def pack_for(config: DictConfig, device: torch.device) -> Pack | None:
    """Return what replays the steps of such runs, or None where they are taken one by one."""
    if config.engine == EagerEngine.kind or distributed.world_size() > 1:
        return None
    recorder = graphs.recorder(device)
    return Pack(recorder, device) if recorder else None


def draws_random_numbers(config: DictConfig) -> bool:
    """Tell whether a step draws from torch's generator, as dropout does; tried on two images."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(config).train()
        optimizer = build_optimizer(config, model)
        before = torch.get_rng_state()
        images = torch.zeros(min(config.batch_size, 2), *config.dataset.image)
        model(images).sum().backward()
        optimizer.step()
        return not torch.equal(torch.get_rng_state(), before)


def build_training(
    config: DictConfig,
    dataset: Dataset,
    device: torch.device | None = None,
    pack: Pack | None = None,
) -> Training:
    """Seed, build and place everything that ``config`` names, ready for `Training.run`.

    ``device`` is that of ``config`` unless given. The steps are replayed with those of the other
    trainings of ``pack``, else alone if at all. Seeds torch's global generator and has denormal
    numbers flushed to zero; on a GPU also makes torch deterministic for this process. Under
    torchrun, meets the other processes.

    Raises:
        ConfigError: as `check_run`.
    """
    device = device or choose_device(config.device)
    crew = distributed.crew(device)
    flush_denormals()
    if device.type == "cuda":
        # The same seed gives the same bits: no TF32, deterministic kernels. Where torch has none it
        # warns; no layer of conf/ is known to need one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Which would take a kernel for every tensor that is about to be written anyway.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)  # drawn on the CPU: the same on every device
    if crew.rank > 0:  # dropout must not drop the same units in every process
        torch.manual_seed(_own_seed(config.seed, crew.rank))
    settings = config.dataset
    train, test = (
        ResidentData(images, labels, settings.mean, settings.std, device)
        for images, labels in (
            (dataset.train_images, dataset.train_labels),
            (dataset.test_images, dataset.test_labels),
        )
    )
    drop_last = must_drop_last(config)
    total_steps, schedule_epoch = training_length(config, drop_last)
    parts = (
        model,
        build_optimizer(config, model),
        base_lr(config),
        build_schedule(config, total_steps, schedule_epoch),
        config.precision,
        device,
    )
    pack, compiled = pack or pack_for(config, device), config.compile
    if config.engine == GraphEngine.kind and pack is None:
        where = "several processes" if crew.size > 1 else f"the {device}"
        _say(crew, f"engine=graph: there are no CUDA graphs on {where}; going on with engine=eager")
    if compiled and crew.size > 1:
        _say(crew, "compile=true: not on several processes; going on without")
        compiled = False
    return Training(
        GraphEngine(*parts, pack=pack, compiled=compiled)
        if pack
        else EagerEngine(*parts, crew=crew, compiled=compiled),
        train,
        test,
        batch_size=config.batch_size * config.processes,
        drop_last=drop_last,
        total_steps=total_steps,
        seed=config.seed,
        augmentation=settings.augmentation,
    )


def training_length(config: DictConfig, drop_last: bool) -> tuple[int, int]:
    """Return the steps of the whole training, and those of what its schedule calls an epoch.

    With ``batch.fixed=steps`` both are those at ``batch.reference_size``, whatever the batch size.
    """
    images = config.dataset.train_size or config.dataset.train_images
    if config.batch.fixed == "steps":
        epoch_steps = steps_per_epoch(images, config.batch.reference_size)
    else:
        epoch_steps = steps_per_epoch(images, config.batch_size * config.processes, drop_last)
    return config.epochs * epoch_steps, epoch_steps


def base_lr(config: DictConfig) -> float:
    """Apply the rule of ``conf/batch`` to ``optimizer.lr``, for the batch of all processes."""
    ratio = config.batch_size * config.processes / config.batch.reference_size
    rules = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    return float(config.optimizer.lr * rules[config.batch.lr_rule])


def build_schedule(
    config: DictConfig, total_steps: int, epoch_steps: int
) -> Callable[[int], float]:
    """Build the schedule of ``config`` for a training of that length.

    Raises:
        ConfigError: if the schedule refuses its settings.
    """
    try:
        factory = instantiate(_component(config.schedule), _convert_="all")
        schedule: Callable[[int], float] = factory(total_steps, epoch_steps)
    except (InstantiationException, TypeError, ValueError, ArithmeticError) as error:
        raise _config_error(config, "schedule", error=error) from error
    return schedule


def check_run(config: DictConfig) -> None:
    """Find out whether ``config`` can be trained, without data, memory or a run directory.

    The network is built and run forwards without storage (torch's meta device).

    Raises:
        ConfigError: naming the value that cannot work, and what to do.
    """
    check(config)
    for key in ("model", "norm", "dataset", "optimizer", "schedule"):
        _check_types(key, config[key])
    if distributed.world_size() > 1 and "RANK" not in os.environ:
        raise ConfigError("WORLD_SIZE is set without RANK: start with torchrun, or unset it")
    if config.processes != distributed.world_size():
        raise ConfigError(
            f"processes={config.processes}: this is one of {distributed.world_size()}; start "
            f"torchrun --nproc-per-node={config.processes} -m gnbench and leave processes alone"
        )
    choose_device(config.device)
    error = _objection(config, config.batch_size)
    if error is not None:
        raise _config_error(config, "model", "norm", "batch_size", error=error)
    with torch.random.fork_rng(devices=[]):
        build_optimizer(config, nn.Linear(1, 1))
    _check_rates(config)


def must_drop_last(config: DictConfig) -> bool:
    """Tell whether the network cannot be trained on the last, partial batch.

    So it is where a batch norm would see one value per channel (its variance would be 0), and
    where a process would see no image.
    """
    images = config.dataset.train_size or config.dataset.train_images
    remainder = images % (config.batch_size * config.processes)
    if remainder == 0:
        return False
    least = remainder // config.processes
    return least == 0 or _objection(config, least) is not None


def _check_rates(config: DictConfig) -> None:
    """Have a learning rate that no float holds refused, not met at the end of the training."""
    total_steps, epoch_steps = training_length(config, must_drop_last(config))
    schedule = build_schedule(config, total_steps, epoch_steps)
    try:
        rates = [base_lr(config) * schedule(step) for step in (0, total_steps - 1)]
    except OverflowError:
        rates = [math.inf]
    if not all(map(math.isfinite, rates)):
        raise ConfigError(
            f"optimizer.lr={config.optimizer.lr}, schedule={config.schedule.name}, "
            f"batch={config.batch.name}: the learning rate becomes infinite; choose a smaller one"
        )


def _say(crew: Crew, message: str) -> None:
    if crew.leads:
        log.warning(message)


def _own_seed(seed: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0])


def _objection(config: DictConfig, batch_size: int) -> Exception | None:
    """Try a training pass over a batch; return what the network objects to.

    Without storage where the layers allow it, else on a batch of at most two images: what a layer
    refuses for its size, it refuses at a single value per channel.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                network = build_model(config).train()
                network(torch.empty(batch_size, *config.dataset.image))
            return None
        except ConfigError:
            raise
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            if "meta" not in str(error):
                return error
        try:
            build_model(config).train()(torch.zeros(min(batch_size, 2), *config.dataset.image))
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            return error
    return None


def _component(node: DictConfig) -> DictConfig:
    """Return the settings that go to the component itself."""
    return OmegaConf.create({str(k): v for k, v in node.items() if k not in OWN_KEYS})


def _check_types(key: str, node: DictConfig) -> None:
    """Hold the settings of a component against the plain types in its signature.

    Python would take the text of ``model.final_pool=abc`` for true.
    """
    try:
        component = pkgutil.resolve_name(node._target_)
        parameters = inspect.signature(component).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={node._target_}: {one_line(error)}") from error
    elements = {"Sequence[int]": int, "Sequence[float]": int | float}
    for name in map(str, node):
        value = node[name]
        if name not in parameters:
            continue
        annotation = parameters[name].annotation
        wanted = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        plain = {"bool": bool, "int": int, "str": str}.get(wanted)
        if plain is not None and type(value) is not plain:
            raise ConfigError(f"{key}.{name}={value}: must be of type {wanted}")
        if wanted == "float" and not is_number(value):
            raise ConfigError(f"{key}.{name}={value}: must be a number")
        if wanted in elements and not (
            OmegaConf.is_list(value) and all(isinstance(v, elements[wanted]) for v in value)
        ):
            raise ConfigError(f"{key}.{name}={value}: must be a list of numbers")
        if name == "root" and value is None and parameters[name].default is not None:
            raise ConfigError(f"{key}.root=null: choose a folder for the data")


def _config_error(config: DictConfig, *keys: str, error: Exception) -> ConfigError:
    """Name the settings at fault beside what the component said of them."""
    cause = error
    while isinstance(cause, InstantiationException) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    named = ", ".join(
        f"{key}={config[key].name if OmegaConf.is_config(config[key]) else config[key]}"
        for key in keys
    )
    return ConfigError(f"{named}: {one_line(cause)}")
