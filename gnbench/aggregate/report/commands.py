"""Runs → the commands that train them again."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gnbench.composition import composed
from gnbench.config import RunConfig, conf_dir
from gnbench.errors import ConfigError, DamagedError
from gnbench.identity import GROUPS, all_settings, by_dotted_name, identity, run_id
from gnbench.runs.directory import read_record

MOST = 6  # recipes that are composed, each in a quarter of a second
CELL = ("batch_size", "seed")
Sweep = dict[str, list[str]]  # the values of each override


def commands(run_dirs: Sequence[str], study: str) -> tuple[list[list[str]], list[str]]:
    """Return the words of the commands that train runs again, and what must be said of them.

    A recipe is what runs share but for batch size and seed. It is composed here, and compared with
    what they recorded; recipes that differ in one setting are one sweep.
    """
    configs: dict[str, dict[str, Any]] = {}
    keys: dict[str, str] = {}  # of what was recorded, since most of it is the same
    cells: dict[str, list[set[int]]] = {}
    for run_dir in run_dirs:
        try:
            config = read_record(Path(run_dir, "run.json"))["config"]
            recipe = config | dict.fromkeys(CELL, 1)
            recorded = json.dumps(recipe)
            if recorded not in keys:
                keys[recorded] = json.dumps(identity(recipe), sort_keys=True)
            key = keys[recorded]
            values = [int(config[name]) for name in CELL]
            configs.setdefault(key, config)
        except (DamagedError, OSError, LookupError, TypeError, ValueError, AttributeError):
            continue
        for known, value in zip(cells.setdefault(key, [set(), set()]), values, strict=True):
            known.add(value)
    notes, sweeps = [], []
    for key, config in [*configs.items()][:MOST]:
        words = overrides(config)
        if not repeats(config, words):
            notes.append(
                f"{run_id(config)}: the command does not say all of it (a part or a setting that "
                "is not among those of this version); its run.json does."
            )
        sweep = {name: [value] for name, _, value in (word.partition("=") for word in words)}
        sweeps.append(
            sweep
            | {name: [*map(str, sorted(cells[key][i]))] for i, name in enumerate(CELL)}
            | {"study": [study]}
        )
    if len(configs) > MOST:
        notes.append(f"{len(configs) - MOST} more recipes: their run.json have all settings.")
    return [_words(sweep) for sweep in _joined(sweeps)], notes


def overrides(config: Mapping[str, Any]) -> list[str]:
    """Return what must be typed for the recipe of the ``config`` of a run."""
    names = {group: str(config[group]["name"]) for group in GROUPS}
    words = [
        f"{group}={name}"
        for group, name in names.items()
        if group == "norm" or (conf_dir() / group / f"{name}.yaml").is_file()
    ]
    words = [*words, f"epochs={config['epochs']}"]
    try:
        if repeats(config, words):
            return words
        base = by_dotted_name(_settings(*words))
    except ConfigError:
        return words
    for key, value in by_dotted_name(all_settings(config)).items():
        if key not in CELL and base.get(key, ...) != value:
            words.append(f"{'' if key in base else '+'}{key}={_text(value)}")
    return words


def repeats(config: Mapping[str, Any], words: Sequence[str]) -> bool:
    """Tell whether ``words`` compose the very run of ``config``."""
    try:
        again = _settings(*words, *(f"{name}={config[name]}" for name in CELL))
        return run_id(again) == run_id(config)
    except (ConfigError, LookupError, TypeError, AttributeError):
        return False


@functools.lru_cache(64)
def _settings(*words: str) -> dict[str, Any]:
    return all_settings(RunConfig.parse(composed(*words)).plain())


def _joined(sweeps: list[Sweep]) -> list[Sweep]:
    """Join sweeps that differ in the values of one setting, until none are left that do."""
    for one, other in itertools.combinations(sweeps, 2):
        differing = [name for name in one if one[name] != other.get(name)]
        if one.keys() == other.keys() and len(differing) == 1:
            values = dict.fromkeys([*one[differing[0]], *other[differing[0]]])
            joined = one | {differing[0]: list(values)}
            rest = [sweep for sweep in sweeps if sweep is not other]
            return _joined([joined if sweep is one else sweep for sweep in rest])
    return sweeps


def _words(sweep: Sweep) -> list[str]:
    several = any(len(values) > 1 for values in sweep.values())
    words = [f"{name}={','.join(values)}" for name, values in sweep.items()]
    return ["gnbench", *["-m"] * several, *words]


def _text(value: Any) -> str:
    """Write a value in Hydra's grammar: as JSON, but for a word."""
    plain = isinstance(value, str) and value.replace("_", "").replace(".", "").isalnum()
    return value if plain else json.dumps(value, separators=(",", ":"))
