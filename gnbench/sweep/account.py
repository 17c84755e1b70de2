"""What a command set out to do and how it fared, for itself and for its launchers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from gnbench.config import RunConfig
from gnbench.sweep.plan import Cell

# Of this process; Hydra calls the functions that fill them and has no place for them.
configs: list[RunConfig] = []  # what the sweep is to carry out, if it is known beforehand
planned: list[Cell] = []  # the cells that this makes: one for each replica
failed: dict[str, str] = {}  # by run id: what it saw fail, though no record may say so


class Reported(float):
    """A test error that brings along how its runs fared in the process that it comes from."""

    failed: dict[str, str | None]

    @classmethod
    def of(cls, test_error: float, runs: Iterable[RunConfig]) -> Reported:
        """Add what this process has seen fail of these runs."""
        reported = cls(test_error)
        reported.failed = {run.run_id: failed.get(run.run_id) for run in runs}
        return reported


def hear(reported: Reported) -> None:
    """Take over how the runs of a worker fared."""
    for run_id, message in reported.failed.items():
        failed.pop(run_id, None)
        if message is not None:
            failed[run_id] = message


def objective(record: Mapping[str, Any]) -> float:
    """Return what a sweeper may optimize: the error in percent, on validation images if there are.

    NaN if the record has no result.
    """
    result = record["result"] or {}
    return float(result.get("val_error", result.get("test_error", math.nan)))
