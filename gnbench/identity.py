"""Which settings make a run the run it is, and what it is called after them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

GROUPS = ("model", "norm", "dataset", "optimizer", "schedule", "batch")
COMPONENTS = ("model", "norm", "dataset", "optimizer", "schedule", "tracker")
# The settings that make a run the run it is. Everything else says how it is executed.
IDENTITY = (*GROUPS, "batch_size", "epochs", "precision", "seed")
# Settings that came after runs had been trained, with the value that means what was done before: at
# that value they are no part of the identity, so that those runs keep their names.
LATER: dict[str, dict[str, Any]] = {  # by the component's _target_ or by the group
    "gnbench.models.SimpleNetV2": {"channels": [32, 64, 128], "hidden": 1024},
    "norm": {"standardize_weights": False},
    "gnbench.norms.group_norm": {"at_most": 32},
    "gnbench.norms.ReferenceGroupNorm": {"at_most": 32},
    "batch": {"accumulate": 1, "decay_rule": "none"},
    "dataset": {"validation_size": None, "order": "shuffled", "block": None},
}
LATER_IN_EXECUTION = {  # of the settings that are no part of the identity
    "evaluate_every": 1,
    "as_published": False,
    "estimate": True,
    "tracker": {"name": "none", "_target_": "gnbench.trackers.Tracker"},
}
# Of a dataset: where it lies, and how it is looked at.
NOT_IDENTITY = ("root", "cache", "unreadable", "_describe_")


class Identified(Protocol):
    """A configuration that knows its identity."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make the run the run it is."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make a run the run it is, of the ``config`` of a ``run.json``."""
    settings = {key: _whole(config[key]) for key in IDENTITY}
    if config.get("processes", 1) > 1:  # a run on one has the name it had before there were several
        settings["processes"] = int(config["processes"])
    for key in NOT_IDENTITY:
        settings["dataset"].pop(key, None)
    for group in GROUPS:
        later = _later(group, settings[group])
        settings[group] = {
            key: value
            for key, value in settings[group].items()
            if key not in later or value != later[key]
        }
    return settings


def all_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run, also of an older one, with the settings that came later."""
    return {key: with_later(key, value) for key, value in identity(config).items()}


def with_later(group: str, settings: Any) -> Any:
    """Return the settings of a group of an older run with those that came later."""
    if not isinstance(settings, Mapping):
        return settings
    return {**settings, **{k: v for k, v in _later(group, settings).items() if k not in settings}}


def by_dotted_name(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by names like ``optimizer.lr``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        inner = isinstance(value, Mapping)
        found |= by_dotted_name(value, f"{name}.") if inner else {name: value}
    return found


def digest(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an identity, in hexadecimal."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def run_id(config: Mapping[str, Any] | Identified) -> str:
    """Name a run: ``<dataset>-<model>-<norm>-bs<N>-seed<S>-<8 hex digits of its identity>``.

    ``config`` is a run's configuration or the ``config`` of its ``run.json``.
    """
    settings = identity(config) if isinstance(config, Mapping) else config.identity
    parts = (
        settings["dataset"]["name"],
        settings["model"]["name"],
        settings["norm"]["name"],
        f"bs{settings['batch_size']}",
        f"seed{settings['seed']}",
        digest(settings)[:8],
    )
    return "-".join(map(str, parts))


def _later(group: str, settings: Any) -> dict[str, Any]:
    target = settings.get("_target_") if isinstance(settings, Mapping) else None
    return LATER.get(group, {}) | (LATER.get(str(target), {}) if group in COMPONENTS else {})


def _whole(value: Any) -> Any:
    """Make ``1.0`` and ``1`` the same setting."""
    if isinstance(value, Mapping):
        return {str(key): _whole(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
