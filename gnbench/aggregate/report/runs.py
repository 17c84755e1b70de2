"""The table of runs: a column a setting that differs, kept small."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from gnbench import zipped
from gnbench.aggregate.statistics import differing
from gnbench.aggregate.study import Study

# Column of a run and its heading; those of which nothing is known are left out.
BEFORE = {"study": "study", "status": "status", "dataset": "dataset", "model": "model"}
BEFORE |= {"norm": "norm", "batch_size": "batch size", "seed": "seed"}
AFTER = {
    "test_error": "test error (%)",
    "test_error_final": "test error, last epoch (%)",
    "balanced_test_error": "balanced test error (%)",
    "val_error": "validation error (%)",
    "train_error": "training error (%)",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "epochs_done": "epochs",
    "steps": "steps",
    "seconds": "seconds",
    "activation_bytes": "MiB for backward",
    "peak_memory_bytes": "MiB at peak",
    "device": "device",
    "engine": "engine",
    "gnbench": "gnbench",
    "torch": "torch",
    "started": "started",
    "error": "what went wrong",
}
HIDDEN_IF_SAME = ("study", "dataset", "model", "device", "engine", "gnbench", "torch")
# What the last row of metrics.csv adds to a run, and its column there.
MEASURED = {"train_error": "train_error", "train_loss": "train_loss", "test_loss": "test_loss"}
MEASURED |= {"steps": "step"}


def runs_table(studies: Sequence[tuple[Study, pd.DataFrame]], folder: Path) -> dict[str, Any]:
    """Return all runs in columns, with a link from ``folder`` to the directory of each.

    There is none, but an empty text, into an archive.

    Beside a study stands what the last rows of the metrics add, by run id.
    """
    tables, settings = [], dict[str, None]()
    for study, last in studies:
        tables.append(study.runs.join(last, on="run_id"))
        settings |= dict.fromkeys(differing(study.runs) if len(study.runs) else [])
    lengths = [len(table) for table in tables]
    filled = [table.astype(object) for table in tables if len(table)]
    table = pd.concat(filled, ignore_index=True) if filled else tables[0]
    columns = []
    for name, title in (BEFORE | {name: name for name in settings} | AFTER).items():
        if name not in table or table[name].isna().all():
            continue
        if name in HIDDEN_IF_SAME and table[name].nunique(dropna=False) < 2:
            continue
        columns.append({"key": name, "title": title, **_column(table[name], name)})
    links = [
        "" if zipped.archive_of(Path(directory)) else _link(directory, folder)
        for directory in table["directory"]
    ]
    return {
        "study": [number for number, length in enumerate(lengths) for _ in range(length)],
        "id": [str(run_id) for run_id in table["run_id"]],
        "link": links,
        "log": [int(Path(path, "gnbench.log").is_file()) for path in table["directory"]],
        "columns": columns,
    }


def _link(directory: str, folder: Path) -> str:
    return quote(os.fsencode(os.path.relpath(directory, folder))) + "/"


def _column(values: pd.Series[Any], name: str) -> dict[str, Any]:
    """Return numbers as they are, texts as indices into those that occur."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numeric:
        scale = 2**20 if name.endswith("_bytes") else 1
        return {"numbers": [_number(v / scale) for v in values.tolist()]}
    if name == "error":
        values = values.fillna("").map(lambda text: str(text).partition("\n")[0][:300])
    texts: dict[str, int] = {}
    of = [texts.setdefault(_text(value), len(texts)) for value in values]
    return {"texts": list(texts), "of": of}


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
