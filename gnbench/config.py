"""What a configuration may hold, and which of its settings make a run the run it is."""

from __future__ import annotations

import functools
import os
import pkgutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from gnbench import identity
from gnbench.errors import ConfigError, one_line
from gnbench.identity import COMPONENTS, LATER_IN_EXECUTION, with_later

FOUND = ("classes", "train_images", "test_images", "content")  # of a dataset, by its `describe`
LARGEST = 2**63 - 1  # of the integers that torch takes
MOST_REPLICAS = 1000


def expanded(path: str) -> str:
    """Replace a leading ``~`` by the home directory.

    Raises:
        ValueError: if there is none.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ValueError("there is no home directory for '~': write the whole path") from None


def _data_folder(path: str) -> str:
    try:
        return expanded(path)
    except ValueError:
        raise ValueError(
            "there is no home directory for '~': name a folder with the environment variable "
            "GNBENCH_DATA or dataset.root=DIR"
        ) from None


def _plain_name(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        raise ValueError("YAML takes it for something else than text: put it in quotes")
    return value


PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$"  # it becomes part of a folder's name
Name = Annotated[str, Field(pattern=PLAIN_NAME, max_length=64), BeforeValidator(_plain_name)]
Study = Annotated[
    str,
    Field(pattern=PLAIN_NAME, max_length=64),
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
]
Folder = Annotated[
    str,
    Field(min_length=1),
    AfterValidator(expanded),
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
]
DataFolder = Annotated[str, Field(min_length=1), AfterValidator(_data_folder)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Beta = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Precision = Literal["fp32", "tf32", "bf16"]


class Settings(BaseModel):
    """Typed settings that do not change. What is not among them is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def parse(cls, config: DictConfig | Mapping[str, Any]) -> Self:
        """Take over a composed configuration, all but what is Hydra's own.

        Raises:
            ConfigError: with a line for every setting that cannot work.
        """
        if isinstance(config, DictConfig):
            config = _resolved(config)
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            faults: dict[tuple[Any, ...], str] = {}  # of a list that of its first bad entry
            for fault in error.errors():
                setting = tuple(part for part in fault["loc"] if isinstance(part, str))
                faults.setdefault(setting, _line(fault))
            raise ConfigError("\n".join(faults.values())) from error

    def plain(self) -> dict[str, Any]:
        """Return what was set, by the names that it has in YAML."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Component(Settings):
    """A part that YAML names by its dotted path, and the settings that go to it."""

    model_config = ConfigDict(extra="allow")

    name: Name
    target: str = Field(alias="_target_")

    def get(self, key: str, default: Any = None) -> Any:
        """Return one of its settings, ``default`` if it has none of that name."""
        return getattr(self, key, default)

    def arguments(self) -> dict[str, Any]:
        """Return what goes to the component itself."""
        return {key: value for key, value in self.plain().items() if key != "name"}


class ModelConfig(Component):
    """A network (``conf/model``)."""

    dropout: Fraction | None = None


class NormConfig(Component):
    """A normalization layer (``conf/norm``), which may have other settings besides these.

    ``momentum: null`` is a cumulative average; ``standardize_weights`` is about the convolutions.
    """

    images: Count | None = None
    eps: Positive | None = None
    momentum: Fraction | None = None
    standardize_weights: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return what goes to the component itself."""
        own = super().arguments()
        return {key: value for key, value in own.items() if key != "standardize_weights"}


class OptimizerConfig(Component):
    """An optimizer (``conf/optimizer``)."""

    lr: Positive
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] | None = None
    eps: Positive | None = None
    weight_decay: NotNegative | None = None
    momentum: Fraction | None = None
    decay_norm_and_bias: bool

    def arguments(self) -> dict[str, Any]:
        """Return what goes to the component itself."""
        own = super().arguments()
        return {key: value for key, value in own.items() if key != "decay_norm_and_bias"}


class ScheduleConfig(Component):
    """A schedule of the learning rate (``conf/schedule``)."""

    warmup_epochs: NotNegative | None = None
    gamma: Positive | None = None


class DatasetSettings(Settings):
    """A dataset as YAML has it, with null for what is found in the data (``conf/dataset``).

    ``describe`` names the function that finds it: of these settings, to values for the nulls.
    """

    name: Name
    target: str = Field(alias="_target_")
    describe: str | None = Field(None, alias="_describe_")
    root: DataFolder | None
    train_size: Count | None
    validation_size: Count | None
    image: Annotated[list[Count], Field(min_length=3, max_length=3)]
    classes: Count | None
    train_images: Count | None
    test_images: Count | None
    mean: list[FiniteFloat] | None  # None: measured on the training images
    std: list[Positive] | None
    augmentation: Literal["none", "flip", "pad_crop_flip"]
    order: Literal["shuffled", "sorted_by_class", "class_blocks"]
    block: Count | None
    # Of a folder of pictures alone.
    cache: DataFolder | None = None
    test_fraction: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    split_seed: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    unreadable: Literal["refuse", "skip"] | None = None
    content: str | None = None


class DatasetConfig(DatasetSettings):
    """A dataset: the function that returns it, and what it must return."""

    classes: Count
    train_images: Count
    test_images: Count

    @property
    def images(self) -> int:
        """The number of images that are trained on."""
        return self._left if self.train_size is None else self.train_size

    @property
    def _left(self) -> int:
        """The number of training images without those for validation."""
        return self.train_images - (self.validation_size or 0)

    @model_validator(mode="before")
    @classmethod
    def _described(cls, config: Any) -> Any:
        """Fill in what the data tell, where that is null."""
        if not isinstance(config, Mapping) or config.get("_describe_") is None:
            return config
        if not any(key in config and config[key] is None for key in FOUND):
            return config
        settings = DatasetSettings.model_validate(config)
        try:
            describe = pkgutil.resolve_name(str(settings.describe))
        except (ImportError, AttributeError, ValueError) as error:
            name = f"dataset._describe_={settings.describe}"
            raise ConfigError(f"{name}: {one_line(error)}") from error
        found = describe(settings)
        if settings.root is not None:  # a record is read elsewhere
            config = {**config, "root": str(Path(settings.root).absolute())}
        return {**config, **{key: found[key] for key in found if config.get(key) is None}}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.image[0]:
                raise ValueError(
                    f"dataset.{key}={values}: must be a list of one number per channel "
                    f"({self.image[0]})"
                )
        most = self.train_images - self.classes
        if self.validation_size and not self.classes <= self.validation_size <= most:
            raise ValueError(
                f"dataset.validation_size={self.validation_size}: must be from {self.classes} to "
                f"{most}"
            )
        if self.train_size is not None and not self.classes <= self.train_size <= self._left:
            raise ValueError(
                f"dataset.train_size={self.train_size}: must be from {self.classes} to {self._left}"
            )
        if (self.block is not None) != (self.order == "class_blocks"):
            raise ValueError(
                f"dataset.order={self.order} dataset.block={self.block}: class_blocks needs a "
                "block, and no other order takes one"
            )
        if self.block is not None and self.block > self.images:
            raise ValueError(f"dataset.block={self.block}: must be at most {self.images}")
        return self


class BatchConfig(Settings):
    """How the rest of the recipe answers to the batch size (``conf/batch``)."""

    name: Name
    accumulate: Count
    fixed: Literal["epochs", "steps"]
    lr_rule: Literal["none", "linear", "sqrt"]
    decay_rule: Literal["none", "per_step", "per_epoch"]
    reference_size: Count


class TrackerConfig(Component):
    """Who is told of a run as it goes (``conf/tracker``)."""

    def arguments(self) -> dict[str, Any]:
        """Return what goes to the component itself, beside the run."""
        return {key: value for key, value in super().arguments().items() if key != "_target_"}


class RunConfig(Settings):
    """A run: what it is, and how it is executed. The values stand in ``conf/``."""

    model: ModelConfig
    norm: NormConfig
    dataset: DatasetConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig

    batch_size: Count
    epochs: Count
    seed: Annotated[int, Field(ge=0, le=LARGEST)]
    precision: Precision
    processes: Count

    replicas: Annotated[int, Field(ge=1, le=MOST_REPLICAS)]
    tracker: TrackerConfig
    study: Study
    outputs: Folder
    device: Device
    engine: Literal["auto", "eager", "graph"]
    compile: bool
    checkpoint_seconds: NotNegative
    evaluate_every: Count
    as_published: bool
    progress: Literal["auto", "bar", "lines"]
    estimate: bool
    rerun: bool
    wait: bool

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.replicas > 1 and self.rerun:
            raise ValueError(
                f"replicas={self.replicas} rerun=true: after an interruption the first would be "
                "trained again; sweep over seeds instead: -m seed=0,1"
            )
        if self.seed > LARGEST + 1 - self.replicas:
            raise ValueError(f"seed={self.seed}: must be at most {LARGEST + 1 - self.replicas}")
        if self.as_published and self.processes > 1:
            raise ValueError(
                f"as_published=true: not on several processes ({self.processes}); leave it out, or "
                "start without torchrun"
            )
        if (self.norm.images or 1) > self.batch_size:
            raise ValueError(
                f"norm.images={self.norm.images}: a batch has batch_size={self.batch_size} images; "
                f"choose at most {self.batch_size}"
            )
        most = self.dataset.images // self.processes
        if self.batch_size * self.batch.accumulate > most:
            by = f" batch.accumulate={self.batch.accumulate}" if self.batch.accumulate > 1 else ""
            by += f" for {self.processes} processes" if self.processes > 1 else ""
            raise ValueError(
                f"batch_size={self.batch_size}{by} is larger than the training set "
                f"({self.dataset.images} images of {self.dataset.name}): choose at most "
                f"{most // self.batch.accumulate or f'batch.accumulate={most}'}"
            )
        if self.batch.decay_rule != "none" and self.optimizer.weight_decay is None:
            raise ValueError(
                f"batch.decay_rule={self.batch.decay_rule}: optimizer={self.optimizer.name} has no "
                "weight_decay; choose batch.decay_rule=none or optimizer=adamw"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_before(cls, config: Any) -> Any:
        """Add what a record, or a file of one's own, is too old to name."""
        if not isinstance(config, Mapping):
            return config
        settings = {key: with_later(key, value) for key, value in config.items()}
        return LATER_IN_EXECUTION | settings

    @property
    def sgd_batch(self) -> int:
        """The images of an SGD step, of all its forward passes and processes."""
        return self.batch_size * self.batch.accumulate * self.processes

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The settings that make the run the run it is, as plain values."""
        return identity.identity(self.plain())

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the identity, in hexadecimal."""
        return identity.digest(self.identity)

    @functools.cached_property
    def run_id(self) -> str:
        """The name of the run; see the function `run_id`."""
        return identity.run_id(self)

    @property
    def run_dir(self) -> Path:
        """The directory of the run: ``<outputs>/<study>/<run id>``."""
        return Path(self.outputs) / self.study / self.run_id

    def with_(self, **settings: Any) -> RunConfig:
        """Return a checked copy in which these top-level settings are others."""
        return RunConfig.parse({**self.plain(), **settings})

    def runs(self) -> list[RunConfig]:
        """Return the runs that it stands for: one for each of its ``replicas`` seeds."""
        if self.replicas == 1:
            return [self]
        seeds = range(self.seed, self.seed + self.replicas)
        return [self.with_(seed=seed, replicas=1) for seed in seeds]

    def __hash__(self) -> int:
        return hash(self.digest)


def conf_dir() -> Path:
    """Return the folder of the YAML files: in the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def options(group: str) -> str:
    """List what ``conf/<group>`` offers, for a message."""
    return ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Return the plain values of a composed configuration without ``hydra``."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    own._set_parent(config._get_parent())
    try:
        plain: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {one_line(error)}") from error
    return dict(plain)


def _line(fault: Any) -> str:
    """Put a fault that pydantic found into a line that names the setting, its value, a remedy."""
    path = [str(part) for part in fault["loc"]]
    indices = [i for i, part in enumerate(fault["loc"]) if isinstance(part, int)]
    key = ".".join(path[: indices[0]] if indices else path).replace(".target", "._target_")
    value, kind, context = fault["input"], fault["type"], fault.get("ctx", {})
    if kind == "value_error" and isinstance(value, Mapping):  # of a whole group: it says it all
        return str(context["error"])
    text = repr(value) if isinstance(value, str) and not value.isalnum() else str(value)
    text = text if len(text) <= 80 else f"{text[:80]}…"
    if key in COMPONENTS and not isinstance(value, Mapping):
        return f"{key}={text} is not a component: choose one of {options(key)}"
    bounds = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le"}
    bounds["less_than"] = "lt"
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    if kind == "extra_forbidden":
        return f"{key}: there is no such setting; --cfg job lists those there are"
    if kind == "missing":
        return f"{key} is missing: give it a value"
    if kind == "value_error":
        remedy = str(context["error"])
    elif kind in bounds:
        bound = context[bounds[kind]]
        remedy = (
            f"must be {words[bounds[kind]]} {bound if isinstance(bound, int) else f'{bound:g}'}"
        )
    elif kind == "literal_error":
        remedy = "choose one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    elif kind == "string_pattern_mismatch" and key == "device":
        remedy = "choose one of auto, cpu, cuda, cuda:N"
    elif key == "study" or key.endswith("name"):
        remedy = "is not a plain name: use letters, digits, '_', '-' and '.' (it names a folder)"
    elif kind == "string_too_short":
        remedy = f"is not a folder: choose one, e.g. {key}=outputs"
    else:
        kinds = {
            "int": "an integer",
            "float": "a number",
            "finite": "a finite number",
            "bool": "true or false",
            "string": "text",
            "list": "a list",
            "too": f"a list of {context.get('min_length') or context.get('max_length')}",
        }
        wanted = kinds.get(kind.partition("_")[0])
        remedy = f"must be {wanted}" if wanted else fault["msg"]
    if indices:
        key = f"{key}[{path[indices[0]]}]"
    return f"{key}={text} {remedy}" if remedy.startswith("is ") else f"{key}={text}: {remedy}"


OmegaConf.register_new_resolver("expanded", expanded, replace=True)
OmegaConf.register_new_resolver(  # oc.env takes an empty variable for a set one
    "env_or", lambda name, default: os.environ.get(name) or default, replace=True
)
# Ours are to replace the plugins' configurations of the same name; Hydra advises against it.
warnings.filterwarnings("ignore", r"\n'hydra/launcher/\w+' is validated against ConfigStore schema")
warnings.filterwarnings("ignore", "Experimental rerun CLI option")  # what is wrong with it is said
