"""What a command set out to do and how it fared, for itself and for its launchers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gnbench.sweep.plan import Cell

# Of this process; Hydra calls the functions that fill them and has no place for them.
planned: list[Cell] = []  # the cells of the sweep that it started
failed: dict[str, str] = {}  # by run id: what it saw fail, though no record may say so


def objective(record: Mapping[str, Any]) -> float:
    """Return what a sweeper may optimize: the error in percent, on validation images if there are.

    NaN if the record has no result.
    """
    result = record["result"] or {}
    return float(result.get("val_error", result.get("test_error", math.nan)))
