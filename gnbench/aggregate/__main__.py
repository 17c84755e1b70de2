"""``python -m gnbench.aggregate``: run directories → tables, figure and curves."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import hydra
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from gnbench import cli, files
from gnbench.aggregate.select import select_on_validation
from gnbench.aggregate.statistics import differing, settings_of, summarize
from gnbench.aggregate.study import (
    Study,
    of_their_size,
    published,
    read_metrics,
    read_study,
    short_metrics,
)
from gnbench.config import Count, Folder, Settings, conf_dir
from gnbench.config import Study as StudyName
from gnbench.errors import ConfigError
from gnbench.runs.directory import FINISHED
from gnbench.sweep.plan import find_studies

if TYPE_CHECKING:
    from gnbench.aggregate.verdict import Panel


class FigureConfig(Settings):
    """How the figure is drawn."""

    style: Literal["screen", "paper"]
    order: Literal["ascending", "descending"]
    baseline: str | None
    reference: str | None
    against: str
    registered: list[Count]


class AggregateConfig(Settings):
    """What ``conf/aggregate.yaml`` holds."""

    outputs: Folder
    study: StudyName | None
    select: str | list[str] | None
    report: bool
    figure: FigureConfig

    @property
    def selected(self) -> list[str]:
        """The settings that are chosen on the validation images."""
        given = self.select or []
        return given.split(",") if isinstance(given, str) else given


def write_studies(
    outputs: str | Path = "outputs",
    study: str | None = None,
    select: str | None = None,
    report: bool = False,
    **figure: Any,
) -> list[Study]:
    """Write tables and figures of one study, or of every one, beside its runs; print the account.

    ``report``: write their page as well. ``figure`` are settings of the group of that name in
    ``conf/aggregate.yaml``.

    Raises:
        ConfigError: before anything is written.
        WriteError: if a study cannot be written.
    """
    defaults: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "aggregate.yaml"))
    given = {"outputs": str(outputs), "study": study, "select": select, "report": report}
    given["figure"] = defaults["figure"] | figure
    return aggregate(AggregateConfig.parse(given))


def aggregate(config: AggregateConfig) -> list[Study]:
    """Do what `write_studies` says, as configured."""
    look = config.figure
    values = None if look.reference is None else published(look.reference)
    places = find_studies(config.outputs, config.study, archives=True)
    if config.report:
        from gnbench.aggregate.report.page import plotly_source

        plotly_source()  # or nothing is written
    studies = [read_study(path) for path in places]
    names = config.selected
    selected = {}
    for study in studies if names else []:
        try:
            selected[study.path] = select_on_validation(study.runs, names)
        except ConfigError as error:
            if config.study is not None:
                raise
            study.notes.append(f"nothing was selected: {error}")
    from gnbench.aggregate import figure, latex, verdict  # import matplotlib: not for --help

    counted = []
    for study in studies:
        runs, tables = study.runs, {"results.csv": study.runs}
        if study.path in selected:
            runs, tables["selected.csv"] = selected[study.path]
            study.notes.append(
                f"{', '.join(names)}: of each cell the value with the lowest validation error "
                "(selected.csv)"
            )
        finished = runs[runs["status"].isin(FINISHED)]
        fitting = None if values is None else of_their_size(values, study.runs)
        if fitting is not None and study.runs.merge(fitting, on=["dataset", "model"]).empty:
            problem = f"figure.reference={look.reference}: no values for these networks"
            study.problems.append(problem)
        summary, metrics = summarize(runs), read_metrics(runs)
        study.notes += short_metrics(finished, metrics)
        panels = verdict.panels(finished, settings_of(summary), look.against, look.registered)
        tables |= {"summary.csv": summary, "comparisons.csv": verdict.comparison_table(panels)}
        texts = {name: table.to_csv(index=False) for name, table in tables.items()}
        texts["verdict.md"] = verdict.markdown(study.path.name, panels, study.notes)
        files.make_folder(study.tables)
        if not summary.empty:
            texts["table.tex"] = latex.table(summary, panels, look.order)
        for name, text in texts.items():
            files.replace(study.tables / name, text.encode(errors="replace"))
        if not summary.empty:
            with figure.styled(look.style):
                drawn = (summary, finished, look.order, look.baseline, fitting)
                errors = figure.draw_errors(*drawn, paper=look.style == "paper")
                for suffix in ("png", "svg", "pdf"):
                    figure.save(errors, study.tables / f"figure.{suffix}")
        if not metrics.empty:
            settings = differing(runs)
            metrics = metrics.merge(runs[["run_id", *settings]], on="run_id")
            curves = figure.draw_curves(metrics, settings, look.order)
            figure.save(curves, study.tables / "curves.png")
        if study.tables != study.path:
            study.notes.append(f"tables and figures are in {study.tables}")
        print(describe(study, summary, look.order, panels))
        counted.append((study, runs))
    if config.report:
        from gnbench.aggregate.report.contents import Look
        from gnbench.aggregate.report.page import write_page

        page = Look(look.order, look.baseline, look.against, look.registered)
        chosen = [] if config.study is None else [config.study]
        print(write_page(counted, page, config.outputs, chosen))
    return studies


def describe(
    study: Study,
    summary: pd.DataFrame,
    order: str,
    panels: Mapping[tuple[str, str], Panel] = MappingProxyType({}),
) -> str:
    """Put a study into words: tables, what they show, and what is not in it."""
    parts = [f"study {study.path.name}: {len(study.finished)} finished runs in {study.path}"]
    for (dataset, model), rows in summary.groupby(["dataset", "model"]):
        title = f"{dataset}, {model}: test error in %, mean ± half its pooled 95 % interval (seeds)"
        parts.append(f"{title}\n{_table(rows, settings_of(summary), order)}")
        panel = panels.get((str(dataset), str(model)))
        if panel is not None and (said := panel.sentences()):
            parts.append("\n".join(said))
    unfinished = study.unfinished[["status", "run_id", "error"]].fillna("")
    unfinished["error"] = unfinished["error"].map(lambda error: error.partition("\n")[0])
    table = tabulate(unfinished.to_numpy().tolist(), (), "plain", disable_numparse=True)
    lists = {
        "not finished": table.splitlines(),
        "missing": study.missing,
        "left out": study.problems,
        "note": study.notes,
    }
    parts += ["\n  ".join([f"{title}:", *lines]) for title, lines in lists.items() if lines]
    return "\n\n".join(parts) + "\n"


def _table(rows: pd.DataFrame, settings: Sequence[str], order: str) -> str:
    """Return the errors of a dataset and model: a row a line of the figure, a column a size."""
    from gnbench.aggregate.figure import line_label, sort_norms  # matplotlib: not for --help

    lines: dict[str, dict[int, str]] = {}
    for _, row in sort_norms(rows).iterrows():
        text = f"{row['test_error_mean']:.2f}"
        if not pd.isna(row["pooled_high"]):
            text += f" ± {row['pooled_high'] - row['test_error_mean']:.2f}"
        text += f" ({row['n_seeds']})"
        if row["n_diverged"]:
            text += f" {row['n_diverged']} diverged"
        lines.setdefault(line_label(row, settings), {})[row["batch_size"]] = text
    sizes = sorted(rows["batch_size"].unique(), reverse=order == "descending")
    return tabulate(
        [[label, *(texts.get(size, "–") for size in sizes)] for label, texts in lines.items()],
        ["batch size", *map(str, sizes)],
        "plain",
        colalign=["left", *["right"] * len(sizes)],
        disable_numparse=True,
    )


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="aggregate")
def app(config: DictConfig) -> None:
    """Aggregate as ``conf/aggregate.yaml`` says."""
    try:
        settings = AggregateConfig.parse(config)
        cli.composed()
        aggregate(settings)
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input."""
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
