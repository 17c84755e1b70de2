"""``python -m gnbench``: compose, check, delegate."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gnbench import cli, sweep
from gnbench.config import conf_dir, one_line, run_id

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def app(config: DictConfig) -> float:
    """Carry out one run; return its test error in percent, for sweepers that optimize it.

    In a sweep a failing run is recorded and the others go on.
    """
    from gnbench.execution import run  # imports torch: not for --help

    directory = HydraConfig.get().runtime.output_dir
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeping:
        sweep.note(config, directory)
    try:
        record = run(config, Path(directory))
    except Exception as error:
        if not sweeping:
            raise SystemExit(cli.report(error)) from error
        sweep.failed[run_id(config)] = one_line(error)
        log.error("%s: %s", run_id(config), one_line(error), exc_info=not cli.is_explained(error))
        return math.nan
    if not sweeping and record["status"] == "out_of_memory":
        raise SystemExit(cli.FAILED)
    return float(record["result"]["test_error"]) if record["result"] else math.nan


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 or 143 interrupted."""
    code = cli.call(app)
    if sweep.planned:
        text, done = sweep.table(sweep.planned)
        print(text)
        code = code or (cli.DONE if done else cli.FAILED)
    sys.exit(code)


if __name__ == "__main__":
    main()
