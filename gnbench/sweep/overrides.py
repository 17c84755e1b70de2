"""What is typed: fixed settings of a group that is swept over, and settings that are not there."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf

from gnbench.errors import ConfigError
from gnbench.identity import COMPONENTS, GROUPS

CHOICES = {*GROUPS, *COMPONENTS}  # the groups of which a run has an option each


def may_sweep(arguments: Sequence[str]) -> bool:
    """Tell whether a command line is that of a sweep, or with its preset may be one."""
    preset = any(argument.startswith("experiment=") for argument in arguments)
    return preset or not {"-m", "--multirun"}.isdisjoint(arguments)


def spread(arguments: Sequence[str]) -> list[str]:
    """Make a fixed setting of a group that is swept over a sweep over its one value.

    Hydra holds ``norm.momentum=0.2`` against the default norm even in a sweep over other norms. As
    a sweep, ``norm.momentum=choice(0.2)``, it is held against the norm of each cell.
    """
    parsed, changed = _parsed(arguments), {}
    swept = {o.key_or_group for o in parsed if o.is_sweep_override() and may_sweep(arguments)}
    for fixed in parsed:
        group, _, setting = fixed.key_or_group.partition(".")
        key, _, value = str(fixed.input_line).partition("=")
        as_sweep = f"{key}=choice({value})"
        if group in swept and setting and not fixed.is_sweep_override() and _parsed([as_sweep]):
            changed[fixed.input_line] = as_sweep
    return [changed.get(argument, argument) for argument in arguments]


def explained(
    error: Exception,
    arguments: Sequence[str],
    sweep: bool,
    compose: Callable[[list[str]], DictConfig],
) -> Exception:
    """Name the setting that is not there, and what is, where Hydra says "Could not override".

    Of what is swept over the first value counts. ``compose`` makes a configuration, with Hydra's
    own, of overrides.
    """
    parsed = _parsed(arguments)
    asks_for_sweep = any(o.is_sweep_override() for o in parsed)
    if not isinstance(error, ConfigCompositionException) or (asks_for_sweep and not sweep):
        return error
    settings = [
        o
        for o in parsed
        if o.type == OverrideType.CHANGE
        and not o.is_hydra_override()
        and o.key_or_group not in {*CHOICES, "experiment"}
    ]
    try:
        config = compose([_first(o) for o in parsed if o not in settings])
    except (HydraException, ConfigError):  # there is more at fault, of which Hydra speaks first
        return error
    for setting in settings:
        line, key = _first(setting), setting.key_or_group
        group = key.partition(".")[0]
        if OmegaConf.select(config, key, default=settings) is not settings:
            continue
        if group not in CHOICES:
            return ConfigError(f"{line}: there is no such setting; --cfg job lists those there are")
        own = [str(k) for k in config[group] if k != "name" and not str(k).startswith("_")]
        line += f": {group}={config.hydra.runtime.choices[group]} has no such setting"
        line += f", only {', '.join(own)}" if own else ""
        if _taken(config, group, key):
            line += f"; its default is not in the file: write +{_first(setting)}"
        if sweep:
            line += "; give it to one of several by a variant: norm=bn,gn8 (docs/extending.md)"
        return ConfigError(line)
    return error


def _taken(config: Any, group: str, key: str) -> bool:
    """Tell whether what YAML names takes a setting that YAML does not have."""
    leaf = key.partition(".")[2]
    try:
        taken = inspect.signature(pkgutil.resolve_name(config[group]["_target_"])).parameters
    except (ImportError, AttributeError, TypeError, ValueError, LookupError):
        return False
    return leaf in taken or (group == "norm" and leaf == "standardize_weights")


def _first(override: Override) -> str:
    if override.is_sweep_override():
        return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    return str(override.input_line)


def _parsed(arguments: Iterable[str]) -> list[Override]:
    """Parse those of ``arguments`` that are overrides."""
    parser, parsed = OverridesParser.create(), list[Override]()
    for argument in arguments:
        try:
            parsed += parser.parse_overrides([argument])
        except HydraException:  # a flag, its value, or what Hydra is going to refuse
            continue
    return parsed
