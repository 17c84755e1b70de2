"""What the report's released code would have printed of a run, measured beside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gnbench.train.batches import ResidentData
from gnbench.train.engine import find_correct

PRINTED_BATCH = 128  # images: for each batch that code counts so many, also for a partial one

EpochRow = dict[str, Any]  # of as_published.csv


def measure(
    model: nn.Module, test: ResidentData, precision: str, batch_size: int
) -> tuple[int, int]:
    """Return how many test images the network of an epoch gets wrong, as the report's code counts.

    First in train mode (statistics of the batch, dropout), ``batch_size`` images at a time in their
    stored order: by this number that code chose the epoch. Then in eval mode, with the running
    statistics that the first pass has moved, for that code saved them so: this number it printed.
    A copy of ``model`` is tested, and torch's generators are as before.
    """
    network = copy.deepcopy(model).train()
    device = test.labels.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        in_train_mode = find_correct(network, test, precision, batch_size)
    in_eval_mode = find_correct(network.eval(), test, precision)
    return int((~in_train_mode).sum()), int((~in_eval_mode).sum())


def epoch_row(
    before: Sequence[EpochRow], epoch: int, wrong: tuple[int, int], total: int
) -> EpochRow:
    """Return the row of an epoch (from 1), of whose ``total`` test images so many were `measure`d.

    Errors in %. ``best_epoch`` is the one that the report's code would have kept so far, of those
    in ``before`` and this one.
    """
    in_train_mode, in_eval_mode = wrong
    row: EpochRow = {
        "epoch": epoch,
        "train_mode_wrong": in_train_mode,
        "train_mode_test_error": 100 * in_train_mode / total,
        "eval_mode_wrong": in_eval_mode,
        "printed_error": printed_error(in_eval_mode, total),
    }
    return {**row, "best_epoch": best([*before, row])["epoch"]}


def best(rows: Sequence[EpochRow]) -> EpochRow:
    """Return the row with the fewest errors in train mode, of equal ones the first."""
    return min(rows, key=lambda row: row["train_mode_wrong"])


def printed_error(wrong: int, total: int) -> float:
    """Return the error in % as if every batch were whole: over 79 · 128 images for 10,000."""
    counted = math.ceil(total / PRINTED_BATCH) * PRINTED_BATCH
    return 100 * (1 - (total - wrong) / counted)
