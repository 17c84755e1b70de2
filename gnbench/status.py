"""``python -m gnbench.status``: where every cell of a study stands, while it runs elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import hydra
from omegaconf import DictConfig
from tabulate import tabulate

from gnbench import cli
from gnbench.config import Folder, Settings, Study, conf_dir
from gnbench.sweep.plan import Cell, find_studies, known_cells
from gnbench.sweep.state import STATES, RunState, exit_code, run_state, table


class StatusConfig(Settings):
    """What ``conf/status.yaml`` holds."""

    outputs: Folder
    study: Study | None


def describe(study: Path, cells: Mapping[Path, Cell | None], states: list[RunState]) -> str:
    """Put a study into words: a grid for every dataset and model, then what is not done."""
    counts = Counter(run.state for run in states)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    parts = [f"study {study.name}: {len(states)} cells: {summary}"]
    grids: dict[str, dict[tuple[str, int], list[RunState]]] = {}
    for run in states:
        cell = cells[run.run_dir]
        if cell is not None:
            grid = grids.setdefault(f"{cell.dataset}, {cell.model}", {})
            grid.setdefault((cell.norm, cell.batch_size), []).append(run)
    for title, grid in sorted(grids.items()):
        sizes = sorted({size for _, size in grid}, reverse=True)
        rows = [
            [norm, *(_square(grid.get((norm, size), [])) for size in sizes)]
            for norm in sorted({norm for norm, _ in grid})
        ]
        aligned = ["left", *["right"] * len(sizes)]
        drawn = tabulate(rows, ["batch size", *map(str, sizes)], "plain", colalign=aligned)
        parts.append(f"{title}: runs done of those meant (> being trained, ! needs you)\n{drawn}")
    if rest := [run for run in states if not run.finished]:
        parts.append(table(rest))
    return "\n\n".join(parts) + "\n"


def _square(states: list[RunState]) -> str:
    if not states:
        return "–"
    mark = ">" if any(run.running for run in states) else ""
    if any(run.needs_attention for run in states):
        mark += "!"
    return f"{sum(run.finished for run in states)}/{len(states)}{mark}"


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="status")
def app(config: DictConfig) -> None:
    """Show what ``conf/status.yaml`` says."""
    try:
        settings = StatusConfig.parse(config)
        studies = find_studies(settings.outputs, settings.study)
        cli.composed()
        everything: list[RunState] = []
        for study in studies:
            cells = known_cells(study)
            states = [run_state(run_dir) for run_dir in cells]
            print(describe(study, cells, states))
            everything += states
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    raise SystemExit(exit_code(everything))


def main() -> None:
    """Run the command line.

    Exit codes: 0 every cell is done, 1 some are not and nobody is at work, 2 bad input, 3 some are
    being trained.
    """
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
