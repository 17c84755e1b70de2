"""What a command set out to do and how it fared, for itself and for its launchers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gnbench.config import RunConfig
from gnbench.sweep.plan import Cell

# Of this process; Hydra calls the functions that fill them and has no place for them.
configs: list[RunConfig] = []  # what the sweep is to carry out, if it is known beforehand
planned: list[Cell] = []  # the cells that this makes: one for each replica
failed: dict[str, str] = {}  # by run id: what it saw fail, though no record may say so


class Reported(float):
    """A test error that brings along what failed in the process that it comes from."""

    failed: dict[str, str]

    @classmethod
    def of(cls, test_error: float) -> Reported:
        """Add what this process has seen fail."""
        reported = cls(test_error)
        reported.failed = dict(failed)
        return reported


def objective(record: Mapping[str, Any]) -> float:
    """Return what a sweeper may optimize: the error in percent, on validation images if there are.

    NaN if the record has no result.
    """
    result = record["result"] or {}
    return float(result.get("val_error", result.get("test_error", math.nan)))
