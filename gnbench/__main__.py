"""``python -m gnbench``: compose, check, delegate."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gnbench import sweep
from gnbench.config import conf_dir, is_config_fault, one_line

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def app(config: DictConfig) -> float:
    """Carry out one run; return its test error in percent, for sweepers that optimize it.

    In a sweep a failing run is recorded and the others go on.
    """
    from gnbench.experiment import run  # imports torch: not for --help

    hydra_config = HydraConfig.get()
    try:
        record: dict[str, Any] = run(config, Path(hydra_config.runtime.output_dir))
    except Exception as error:
        if hydra_config.mode != RunMode.MULTIRUN:
            raise
        log.error("failed: %s", one_line(error), exc_info=not is_expected(error))
        return math.nan
    return float(record["result"]["test_error"]) if record["result"] else math.nan


def is_expected(error: BaseException) -> bool:
    """Tell a fault that its message explains from a bug that needs its traceback."""
    return is_config_fault(error) or isinstance(error, OSError)  # DataError, LockedError, disk full


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 or 143 interrupted."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # have Hydra raise, not print over several lines
    code = 0
    try:
        app()
    except KeyboardInterrupt as interrupted:
        code = getattr(interrupted, "exit_code", 130)
    except Exception as error:
        bad_input = is_config_fault(error) or not sweep.passed
        if wants_traceback or not (bad_input or is_expected(error)):
            raise
        print(f"gnbench: {one_line(error)}", file=sys.stderr)
        code = 2 if bad_input else 1
    if sweep.planned:
        text, done = sweep.table(sweep.planned)
        print(text)
        code = code or int(not done)
    sys.exit(code)


if __name__ == "__main__":
    main()
