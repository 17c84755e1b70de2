"""Which normalization layer at the batch size you can afford? Everything the CLI does, callable.

Importing gnbench registers the OmegaConf resolver ``${run_id:}`` and imports neither torch nor
pandas; they come with the first use of a function that needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

from gnbench.config import ConfigError, replicas, run_id

_LAZY = {
    "compose": "gnbench.experiment",
    "build_model": "gnbench.experiment",
    "build_optimizer": "gnbench.experiment",
    "load_dataset": "gnbench.experiment",
    "build_training": "gnbench.experiment",
    "run": "gnbench.execution",
    "read_runs": "gnbench.aggregate",
    "read_metrics": "gnbench.aggregate",
    "summarize": "gnbench.aggregate",
    "write_studies": "gnbench.aggregate",
}

__all__ = ["ConfigError", "replicas", "run_id", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gnbench' has no attribute {name!r}")
