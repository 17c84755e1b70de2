"""Which normalization layer at the batch size you can afford? Everything the CLI does, callable.

Importing gnbench imports neither torch nor pandas; they come with the first use of a function that
needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

from gnbench.config import RunConfig
from gnbench.errors import ConfigError
from gnbench.identity import run_id

_LAZY = {
    "compose": "gnbench.check",
    "build_model": "gnbench.build",
    "build_optimizer": "gnbench.build",
    "load_dataset": "gnbench.build",
    "build_training": "gnbench.build",
    "run": "gnbench.runs.runner",
    "read_runs": "gnbench.aggregate.study",
    "read_metrics": "gnbench.aggregate.study",
    "summarize": "gnbench.aggregate.statistics",
    "write_studies": "gnbench.aggregate.__main__",
}

__all__ = ["ConfigError", "RunConfig", "run_id", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gnbench' has no attribute {name!r}")
