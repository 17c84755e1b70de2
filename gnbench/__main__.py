"""``python -m gnbench``: compose, check, delegate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig

from gnbench import cli
from gnbench.config import RunConfig, conf_dir
from gnbench.sweep import account, command, launchers, overrides
from gnbench.train import distributed


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def app(config: DictConfig) -> float:
    """Carry out a run or a cell; return its error in percent, for sweepers that optimize."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run = launchers.enter(RunConfig.parse(config))
        return account.Reported.of(command.attempt(run), run.runs())
    try:
        return command.carry_out(config)
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


@launchers.heeding_signals()
def _command() -> None:
    typed = sys.argv[1:]
    sys.argv[1:] = overrides.spread(typed)
    try:
        app()
    except ConfigCompositionException as error:
        from gnbench.composition import composed

        folder = get_args_parser().parse_args(typed).config_dir
        folders = [folder] if folder else []

        def compose(some: Sequence[str]) -> DictConfig:
            return composed(*some, config_dirs=folders)

        raise overrides.explained(error, typed, overrides.may_sweep(typed), compose) from error
    command.return_to_passed_over()


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 bad input, 3 others are still at work, 130 or 143 interrupted.
    """
    code = cli.call(_command)
    if account.planned and distributed.rank() == 0:
        text, verdict = command.account()
        print(text)
        code = code or verdict
    sys.exit(code)


if __name__ == "__main__":
    main()
