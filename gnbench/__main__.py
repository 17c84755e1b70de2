"""``python -m gnbench``: compose, check, delegate."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gnbench import cli
from gnbench.config import conf_dir
from gnbench.sweep import command as sweep
from gnbench.sweep import launchers
from gnbench.train import distributed


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def app(config: DictConfig) -> float:
    """Carry out one run; return its test error in percent, for sweepers that optimize it.

    In a sweep, and of several replicas, a failing run is recorded and the others go on.
    """
    directory = HydraConfig.get().runtime.output_dir
    if HydraConfig.get().mode == RunMode.MULTIRUN or config.replicas > 1:
        launchers.enter()
        return sweep.attempt(config, directory)
    from gnbench.runs.runner import run  # imports torch: not for --help

    try:
        record = run(config, Path(directory))
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    if record["status"] == "out_of_memory":
        raise SystemExit(cli.FAILED)
    return sweep.test_error(record)


def _work() -> None:
    app()
    sweep.return_to_passed_over()


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 bad input, 3 others are still at work, 130 or 143 interrupted.
    """
    code = cli.call(launchers.heeding_signals()(_work))
    if sweep.planned and distributed.rank() == 0:
        text, verdict = sweep.account()
        print(text)
        code = code or verdict
    sys.exit(code)


if __name__ == "__main__":
    main()
