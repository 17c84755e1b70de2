"""``python -m gnbench.status``: where every cell of a study stands, while it runs elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import hydra
from omegaconf import DictConfig

from gnbench import cli
from gnbench.config import conf_dir
from gnbench.sweep import state as grid
from gnbench.sweep.state import Cell, Standing


def describe(study: Path, cells: Mapping[str, Cell | None], standings: list[Standing]) -> str:
    """Put a study into words: a grid for every dataset and model, then what is not done."""
    counts = Counter(cell.state for cell in standings)
    summary = ", ".join(f"{counts[state]} {state}" for state in grid.STATES if counts[state])
    lines = [f"study {study.name}: {len(standings)} cells: {summary}"]
    grids: dict[str, dict[tuple[str, int], list[Standing]]] = {}
    for found in standings:
        cell = cells[found.directory]
        if cell is not None:
            squares = grids.setdefault(f"{cell.dataset}, {cell.model}", {})
            squares.setdefault((cell.norm, cell.batch_size), []).append(found)
    for title, squares in sorted(grids.items()):
        norms = sorted({norm for norm, _ in squares})
        sizes = sorted({size for _, size in squares}, reverse=True)
        width = max(len("batch size"), *map(len, norms))
        lines += ["", f"{title}: runs done of those meant (> being trained, ! needs you)"]
        lines.append(f"  {'batch size':<{width}}" + "".join(f"{size:>9}" for size in sizes))
        for norm in norms:
            texts = "".join(f"{_square(squares.get((norm, size), [])):>9}" for size in sizes)
            lines.append(f"  {norm:<{width}}{texts}")
    rest = [found for found in standings if not found.finished]
    if rest:
        lines += ["", grid.table(rest)]
    return "\n".join([*lines, ""])


def _square(standings: list[Standing]) -> str:
    if not standings:
        return "–"
    mark = ">" if any(found.running for found in standings) else ""
    if any(found.needs_attention for found in standings):
        mark += "!"
    return f"{sum(found.finished for found in standings)}/{len(standings)}{mark}"


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="status")
def app(config: DictConfig) -> None:
    """Show what ``conf/status.yaml`` says."""
    cli.composed()
    try:
        everything: list[Standing] = []
        for path in grid.find_studies(config.outputs, config.study):
            cells = grid.cells(path)
            standings = [grid.standing(directory) for directory in cells]
            print(describe(path, cells, standings))
            everything += standings
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    raise SystemExit(grid.exit_code(everything))


def main() -> None:
    """Run the command line.

    Exit codes: 0 every cell is done, 1 some are not and nobody is at work, 2 bad input, 3 some are
    being trained.
    """
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
