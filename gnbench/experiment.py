"""From a configuration to a trained network: every component built, one run carried out.

What `python -m gnbench` does for each cell; `run` and the ``build_`` functions serve as a library.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import pkgutil
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from gnbench import runs
from gnbench.batches import ResidentData
from gnbench.config import ConfigError, check, conf_dir, one_line, run_id
from gnbench.datasets import Dataset, balanced_subset
from gnbench.engine import EagerEngine
from gnbench.training import Row, Training, steps_per_epoch

log = logging.getLogger(__name__)

OWN_KEYS = ("name", "decay_norm_and_bias")  # settings of gnbench beside those of the component
MIB = 1024**2


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its checkpoint is saved. ``exit_code`` is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def compose(*overrides: str) -> DictConfig:
    """Compose a configuration as the command line does: ``compose("norm=gn", "batch_size=2")``.

    Raises:
        ConfigError: for a key or value that does not exist or cannot work.
    """
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = hydra_compose("config", overrides=list(overrides))
    except Exception as error:
        raise ConfigError(one_line(error)) from error
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
    except (InstantiationException, TypeError, ValueError) as error:
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


def build_training(config: DictConfig, dataset: Dataset) -> Training:
    """Seed, build and place everything that ``config`` names, ready for `Training.run`.

    Seeds torch's global generator; on a GPU also makes torch deterministic for this process.

    Raises:
        ConfigError: as `check_run`.
    """
    device = choose_device(config.device)
    if device.type == "cuda":
        # The same seed gives the same bits: no TF32, deterministic kernels. Where torch has none it
        # warns; no layer of conf/ is known to need one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)  # drawn on the CPU: the same on every device
    settings = config.dataset
    train, test = (
        ResidentData(images, labels, settings.mean, settings.std, device)
        for images, labels in (
            (dataset.train_images, dataset.train_labels),
            (dataset.test_images, dataset.test_labels),
        )
    )
    drop_last = must_drop_last(config)
    epoch_steps = steps_per_epoch(len(train), config.batch_size, drop_last)
    total_steps = config.epochs * epoch_steps
    if config.batch.fixed == "steps":
        total_steps = config.epochs * steps_per_epoch(len(train), config.batch.reference_size)
    engine = EagerEngine(
        model,
        build_optimizer(config, model),
        base_lr(config),
        build_schedule(config, total_steps, epoch_steps),
        config.precision,
        device,
    )
    return Training(
        engine,
        train,
        test,
        batch_size=config.batch_size,
        drop_last=drop_last,
        total_steps=total_steps,
        seed=config.seed,
        augmentation=settings.augmentation,
    )


def base_lr(config: DictConfig) -> float:
    """Apply the rule of ``conf/batch`` to ``optimizer.lr``."""
    ratio = config.batch_size / config.batch.reference_size
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
    except (InstantiationException, TypeError, ValueError) as error:
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
    choose_device(config.device)
    error = _objection(config, config.batch_size)
    if error is not None:
        raise _config_error(config, "model", "norm", "batch_size", error=error)
    with torch.random.fork_rng(devices=[]):
        build_optimizer(config, nn.Linear(1, 1))
    # A length like the real one: the warm-up must fit, in however few epochs.
    build_schedule(config, total_steps=100 * config.epochs, epoch_steps=100)


def must_drop_last(config: DictConfig) -> bool:
    """Tell whether the network cannot be trained on the last, partial batch.

    So it is where a batch norm would see one value per channel (its variance would be 0).
    """
    images = config.dataset.train_size or config.dataset.train_images
    remainder = images % config.batch_size
    if remainder == 0:
        return False
    return _objection(config, remainder) is not None


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Raises:
        ConfigError: if this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise ConfigError(
                f"device={name}: this machine has {found} CUDA devices; use device=cpu or auto"
            )
        device = torch.device("cuda", device.index or 0)
    return device


def run(config: DictConfig, directory: str | Path | None = None) -> dict[str, Any]:
    """Carry out the run that ``config`` describes and return its record (``run.json``).

    A complete run is returned as it is unless ``rerun``; an interrupted one resumes. ``directory``
    defaults to ``<outputs>/<study>/<run id>``.

    Raises:
        ConfigError: before anything is written.
        DataError: if the dataset is not to be had.
        LockedError: if another process is at work on the run.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    check_run(config)
    if directory is None:
        directory = Path(config.outputs) / config.study / run_id(config)
    place = runs.Run(directory)
    with place.locked():
        record = _existing_record(place)
        if record is not None and record["status"] in runs.FINISHED and not config.rerun:
            error = record["result"]["test_error"]
            log.info(
                "%s is %s (test error %.2f %%); rerun=true trains it again",
                run_id(config),
                record["status"],
                error,
            )
            return record
        if config.rerun and record is not None and record["status"] in runs.FINISHED:
            load_dataset(config)  # what would fail for want of data must not cost the old result
            place.clear()
        with _log_to(place), _signals() as stop:
            return _carry_out(config, place, stop)


@contextmanager
def _log_to(place: runs.Run) -> Iterator[None]:
    """Write what gnbench says to the log of the run, too."""
    logger = logging.getLogger("gnbench")
    handler = logging.FileHandler(place.log_path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def _carry_out(config: DictConfig, place: runs.Run, stop: _Stop) -> dict[str, Any]:
    """Train under the lock, keeping ``run.json`` true at every moment."""
    device = choose_device(config.device)
    _reset_peak_memory(device)
    started = time.monotonic()
    record: dict[str, Any] = {
        "status": "running",
        "config": OmegaConf.to_container(config, resolve=True),
        "seed": config.seed,
        "error": None,
        "result": None,
        "versions": runs.versions(),
        "device": describe_device(device),
        "engine": EagerEngine.name,
        "started": runs.now(),
        "seconds": 0.0,
        "peak_memory_bytes": None,
    }
    place.write_record(record)

    def close(status: str, error: str | None = None, seconds_before: float = 0.0) -> dict[str, Any]:
        record.update(
            status=status,
            error=error,
            result=runs.result(place.rows(), diverged=status == "diverged"),
            seconds=round(seconds_before + time.monotonic() - started, 3),
            peak_memory_bytes=peak_memory_bytes(device),
        )
        place.write_record(record)
        return record

    seconds_before = 0.0
    try:
        training = build_training(config, load_dataset(config))
        seconds_before = _resume(config, place, training, device)
        _announce(config, training)
        _train(config, place, training, stop, lambda: seconds_before + time.monotonic() - started)
        place.finish(training.engine.model.state_dict())
    except torch.OutOfMemoryError as error:
        log.error("%s: out of memory: %s", run_id(config), str(error).splitlines()[0])
        return close("out_of_memory", str(error).splitlines()[0], seconds_before)
    except KeyboardInterrupt:
        close("interrupted", None, seconds_before)
        log.warning("%s interrupted; the same command resumes it", run_id(config))
        raise
    except Exception as error:
        message = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        close("failed", message, seconds_before)
        log.error("%s failed: %s", run_id(config), message)
        raise
    record = close("diverged" if training.diverged else "completed", None, seconds_before)
    log.info(
        "%s %s in %s: test error %.2f %% (median of the last epochs; last epoch %.2f %%)",
        run_id(config),
        record["status"],
        _duration(record["seconds"]),
        record["result"]["test_error"],
        record["result"]["test_error_final"],
    )
    return record


def _train(
    config: DictConfig,
    place: runs.Run,
    training: Training,
    stop: _Stop,
    elapsed: Callable[[], float],
) -> None:
    """Drive the training: rows to the metrics, progress shown, checkpoints to the disk."""

    def save() -> None:
        place.save_checkpoint(
            {"run_id": run_id(config), "seconds": elapsed(), **training.state_dict()}
        )

    saved = time.monotonic()
    stop.gentle = True
    with _progress(config, training) as show:
        for row in training.run():
            if row is not None:
                place.append(asdict(row))
            show(row)
            if stop.number is not None or time.monotonic() - saved > config.checkpoint_seconds:
                save()
                saved = time.monotonic()
            if stop.number is not None:
                raise Interrupted(stop.number)


def _existing_record(place: runs.Run) -> dict[str, Any] | None:
    try:
        return place.record()
    except runs.DamagedError as error:
        aside = place.record_path.with_suffix(".json.damaged")
        place.record_path.replace(aside)
        log.warning("%s; set aside as %s", error, aside.name)
        return None


def _resume(config: DictConfig, place: runs.Run, training: Training, device: torch.device) -> float:
    """Continue from the checkpoint if there is a whole one; return the seconds spent before it."""
    try:
        state = place.load_checkpoint(device)
        if state is not None and state.get("run_id") != run_id(config):
            raise runs.DamagedError(f"{place.checkpoint_path} belongs to another run")
        if state is not None and len(place.rows()) < state["position"]["epoch"]:
            raise runs.DamagedError(f"{place.metrics_path} has fewer epochs than the checkpoint")
    except runs.DamagedError as error:
        aside = place.checkpoint_path.with_suffix(".pt.damaged")
        place.checkpoint_path.replace(aside)
        log.warning("%s; set aside as %s", error, aside.name)
        state = None
    if state is None:
        place.keep_epochs(0)
        return 0.0
    training.load_state_dict(state)
    place.keep_epochs(training.position.epoch)
    log.info("%s resumes after step %d", run_id(config), training.position.step)
    return float(state["seconds"])


def _announce(config: DictConfig, training: Training) -> None:
    parameters = sum(p.numel() for p in training.engine.model.parameters())
    log.info(
        "%s: %s parameters, %s steps of %d images in %s epochs, engine %s on %s",
        run_id(config),
        f"{parameters:,}",
        f"{training.total_steps:,}",
        config.batch_size,
        f"{training.total_steps / training.steps_per_epoch:.4g}",
        training.engine.name,
        describe_device(training.engine.device),
    )
    remainder = len(training.train) % config.batch_size
    if must_drop_last(config):
        log.info(
            "the last batch of an epoch (%d images) is dropped: it would leave %s one value "
            "per channel",
            remainder,
            config.norm.name,
        )


@contextmanager
def _progress(config: DictConfig, training: Training) -> Iterator[Callable[[Row | None], None]]:
    """Show a bar with ETA and error on a terminal, a line an epoch elsewhere."""
    show_bar = config.progress == "bar" or (config.progress == "auto" and sys.stderr.isatty())
    began, first_step = time.monotonic(), training.position.step
    epochs = math.ceil(training.total_steps / training.steps_per_epoch)
    with (
        _lines_above_the_bar() if show_bar else nullcontext(),
        tqdm(
            total=training.total_steps,
            initial=first_step,
            unit="step",
            desc=f"{config.norm.name} bs{config.batch_size}",
            disable=not show_bar,
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar,
    ):

        def show(row: Row | None) -> None:
            step = training.position.step if row is None else row.step
            if bar.update(step - bar.n) and row is None:  # the bar was redrawn just now
                _, wrong = training.engine.totals()
                bar.set_postfix_str(
                    f"train error {100 * wrong / training.position.seen:.1f} %", refresh=False
                )
            if row is not None:
                bar.set_postfix_str(f"test error {row.test_error:.2f} %", refresh=False)
                rate = (time.monotonic() - began) / (row.step - first_step)
                log.info(
                    "epoch %d/%d  step %d  lr %.2e  train loss %.4f error %.2f %%  "
                    "test loss %.4f error %.2f %%  %.0f images/s  eta %s",
                    row.epoch,
                    epochs,
                    row.step,
                    row.lr,
                    row.train_loss,
                    row.train_error,
                    row.test_loss,
                    row.test_error,
                    row.images_per_second,
                    _duration(rate * (training.total_steps - row.step)),
                )

        yield show


def _lines_above_the_bar() -> AbstractContextManager[None]:
    from tqdm.contrib.logging import logging_redirect_tqdm  # warns in a notebook without widgets

    return logging_redirect_tqdm()


@dataclass
class _Stop:
    """A signal that arrived, and whether to wait for the end of the step."""

    number: int | None = None
    gentle: bool = False


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into `Interrupted`: at once, or while ``gentle`` only noted.

    So a step is never cut in two; a second signal cuts it all the same.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if not stop.gentle or stop.number is not None:
            raise Interrupted(number)
        stop.number = number

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def describe_device(device: torch.device) -> str:
    """Name the device that did the work, for the record."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({_processor()}, {torch.get_num_threads()} threads)"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory in use since the run began: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        # Nothing before needed the device, and the statistics do not start it.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again
        except OSError:
            log.debug("peak memory is that of the whole process on this system")


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
        except (ValueError, RuntimeError) as error:
            if "meta" not in str(error):
                return error
        try:
            build_model(config).train()(torch.zeros(min(batch_size, 2), *config.dataset.image))
        except (ValueError, RuntimeError) as error:
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
