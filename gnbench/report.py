"""``python -m gnbench.report``: studies → one page, ``report.html``, to turn over and to send."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
from omegaconf import DictConfig
from pydantic import BeforeValidator

from gnbench import cli
from gnbench.config import Count, Folder, Settings, Study, conf_dir
from gnbench.sweep.plan import find_studies


class FigureConfig(Settings):
    """How the figure looks at first, and what is compared."""

    order: Literal["ascending", "descending"]
    baseline: str | None
    against: str
    registered: list[Count]


def _several(value: Any) -> Any:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


class ReportConfig(Settings):
    """What ``conf/report.yaml`` holds; no ``study``: every one."""

    outputs: Folder
    study: Annotated[list[Study], BeforeValidator(_several)]
    figure: FigureConfig


def report(config: ReportConfig) -> Path:
    """Write the page of one study, or of several, as configured; return its path.

    Raises:
        ConfigError: before anything is written.
        WriteError: if it cannot be written.
    """
    names: list[str | None] = [*dict.fromkeys(config.study)] or [None]
    folders = [path for name in names for path in find_studies(config.outputs, name, archives=True)]
    from gnbench.aggregate.report.contents import Look  # imports matplotlib: not for --help
    from gnbench.aggregate.report.page import plotly_source, write_page
    from gnbench.aggregate.study import read_study

    plotly_source()
    cli.composed()
    studies = [read_study(path) for path in folders]
    shown = [(study, study.runs) for study in studies]
    return write_page(shown, Look(**config.figure.model_dump()), config.outputs, config.study)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="report")
def app(config: DictConfig) -> None:
    """Write the page as ``conf/report.yaml`` says."""
    try:
        print(report(ReportConfig.parse(config)))
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input."""
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
