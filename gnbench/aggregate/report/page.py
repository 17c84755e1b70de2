"""Studies → ``report.html``: one file, which needs no network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gnbench import files, zipped
from gnbench.aggregate.figure import is_beside, line_label, source_of
from gnbench.aggregate.report.answer import Leader, bytes_held, leaders, mebibytes, memory
from gnbench.aggregate.report.commands import commands
from gnbench.aggregate.report.contents import Look, Shown, contents
from gnbench.aggregate.statistics import settings_of
from gnbench.aggregate.study import Study, all_published, of_their_size, short_metrics
from gnbench.aggregate.verdict import Panel, comparison_rows, interval
from gnbench.errors import ConfigError

HERE = Path(__file__).parent
NAME = "report.html"
SCRIPTS = ("tables.js", "figures.js", "page.js")
MOST_NAMED = 200  # runs that are listed one by one
Cells = Mapping[tuple[str, str, str, int], npt.NDArray[np.int_]]  # dataset, model, line, batch size


def plotly_source() -> str:
    """Return the source of plotly.js.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        remedy = "pip install 'gnbench[report]'"
        raise ConfigError(f"the page needs plotly, which is not installed: {remedy}") from None
    return str(get_plotlyjs())


def page_path(outputs: str | Path, chosen: Sequence[str]) -> Path:
    """Return where the page goes: into the folder of the one chosen study, else above them.

    Of studies in an archive, where their tables go.
    """
    folder = Path(outputs, chosen[0]) if len(set(chosen)) == 1 else Path(outputs)
    return zipped.written_beside(folder) / NAME


def write_page(
    studies: Sequence[tuple[Study, pd.DataFrame]], look: Look, outputs: str, chosen: Sequence[str]
) -> Path:
    """Write the page of ``studies``, each with the runs of it that count; return its path.

    ``chosen`` are the names that were asked for; none if it was every study of ``outputs``.

    Raises:
        ConfigError: if plotly is not installed.
        WriteError: if it cannot be written.
    """
    path = page_path(outputs, chosen)
    plotly = plotly_source()
    shown = [Shown(study, runs, look) for study, runs in studies]
    data = json.dumps(contents(shown, look, path.parent), separators=(",", ":"), allow_nan=False)
    names = ", ".join(one.study.path.name for one in shown)
    parts = {
        "title": escape(f"gnbench: {names}"),
        "subtitle": escape(_subtitle(shown)),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "answer": "".join(_each(shown, _answers)),
        "verdict": "".join(_each(shown, _verdict)),
        "gaps": "".join(_each(shown, _gaps)),
        "repeat": _repeated(shown, outputs, chosen),
        "data": data.replace("<", "\\u003c"),  # or a name might end the script
        "plotly": plotly.replace("</script", "<\\/script"),
        "script": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    pieces = (HERE / "page.html").read_text(encoding="utf-8").split("@@")
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    files.make_folder(path.parent)
    files.replace(path, "".join(pieces).encode(errors="replace"))
    return path


def _each(shown: Sequence[Shown], part: Any) -> Iterator[str]:
    """Yield what ``part`` says of each study, under its name if there are several."""
    for number, one in enumerate(shown):
        heading = f"<h3>{escape(one.study.path.name)}</h3>" if len(shown) > 1 else ""
        yield f'<div data-study="{number}">{heading}{part(one)}</div>\n'


def _subtitle(shown: Sequence[Shown]) -> str:
    runs = pd.concat([one.study.runs[["started", "status"]].astype(object) for one in shown])
    days = sorted({str(day)[:10] for day in runs["started"].dropna()} - {""})
    span = f", begun {days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'}" if days else ""
    finished = sum(len(one.study.finished) for one in shown)
    return f"{finished:,} finished of {len(runs):,} runs{span}"


def _answers(one: Shown) -> str:
    if not one.panels:
        return "<p>No run is finished yet: nothing can be said.</p>"
    settings, cells = settings_of(one.summary), {}
    for row, positions in one.cells:
        key = (str(row["dataset"]), str(row["model"]))
        cells[*key, line_label(row, settings), int(row["batch_size"])] = positions
    found = {key: leaders(panel, one.look.registered) for key, panel in _panels(one)}
    return "".join(_answer(key, own, cells, one.finished) for key, own in found.items())


def _panels(one: Shown) -> list[tuple[tuple[str, str], Panel]]:
    """Return the panels of a study, the baseline last."""
    rows = one.summary[is_beside(one.summary, one.look.baseline)]
    beside = set(zip(rows["dataset"], rows["model"], strict=True))
    return sorted(one.panels.items(), key=lambda item: item[0] in beside)


def _answer(
    key: tuple[str, str],
    found: Sequence[Leader],
    cells: Cells,
    runs: pd.DataFrame,
) -> str:
    """Answer for a dataset and model: at the smallest batch size, then at all of them.

    ``cells`` are the positions of their runs in ``runs``.
    """
    network = f"{key[0]}, {key[1]}"
    if not found:
        return f"<article><h4>{escape(network)}</h4><p>All of its runs diverged.</p></article>"
    first = found[0]
    there = runs.iloc[cells[*key, first.line.label, first.batch_size]]
    other = None
    if second := first.next_line:
        other = (second.label, runs.iloc[cells[*key, second.label, first.batch_size]])
    norms = [*dict.fromkeys(str(own["norm"].iloc[0]) for own in (there, *(other or ())[1:]))]
    measured = f"dataset={key[0]} model={key[1]} norms=[{','.join(norms)}]"
    held = memory(there, other, f"{measured} batch_sizes=[{first.batch_size}]")
    facts = {
        "Lowest test error": f"<strong>{escape(first.line.label)}</strong>: {escape(first.error)}",
        "How sure": f"{_mark(first)} {escape(first.sure())}",
        "Memory": escape(held),
    }
    if below := _published_below(key, first.batch_size, runs):
        size, text = below
        facts[f"At batch size {size}"] = escape(text)
    if first.diverged:
        facts["Diverged"] = escape(", ".join(first.diverged))
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    heading = f"{network}, at batch size {first.batch_size}"
    return (
        f"<article><h4>{escape(heading)}</h4><dl>{listed}</dl>"
        f"{_at_every_size(network, key, found, cells, runs) if len(found) > 1 else ''}</article>"
    )


def _published_below(key: tuple[str, str], size: int, runs: pd.DataFrame) -> tuple[int, str] | None:
    """Return what is published of a network at a smaller batch size than any that was run."""
    table = of_their_size(all_published(), runs)
    table = table[(table["dataset"] == key[0]) & (table["model"] == key[1])]
    if table.empty or table["batch_size"].min() >= size:
        return None
    rows = table[table["batch_size"] == table["batch_size"].min()].sort_values("test_error")
    values = [f"{str(row['norm']).upper()} {row['test_error']:.2f} %" for _, row in rows.iterrows()]
    first = rows.iloc[0]
    text = f"No run of this study. Published: {', '.join(values)} by {source_of(first)}"
    return int(first["batch_size"]), f"{text}; {first['note']}."


def _at_every_size(
    network: str,
    key: tuple[str, str],
    found: Sequence[Leader],
    cells: Cells,
    runs: pd.DataFrame,
) -> str:
    rows = []
    for one in found:
        held, kind = bytes_held(runs.iloc[cells[*key, one.line.label, one.batch_size]])
        peak = " at peak" if kind == "peak_memory_bytes" else ""
        pair = one.against
        rows.append(
            [
                str(one.batch_size),
                one.line.label,
                one.error,
                one.next_line.label if one.next_line else "–",
                "–" if pair is None else f"{pair.difference:+.2f}",
                "–" if pair is None else interval(pair.ci_low, pair.ci_high),
                "yes" if one.shown else "no",
                "–" if held is None else mebibytes(held) + peak,
            ]
        )
    heads = ["batch size", "lowest error", "test error", "next", "next − lowest, points", "95 %"]
    caption = f"The lowest error at every batch size, {network}"
    return _table(caption, [*heads, "shown", "memory"], rows)


def _mark(leader: Leader) -> str:
    known = leader.against is not None
    name, text = ("yes", "✓") if leader.shown else ("no", "?") if known else ("none", "–")
    return f'<span class="mark {name}" aria-hidden="true">{text}</span>'


def _verdict(one: Shown) -> str:
    parts = []
    for (dataset, model), panel in _panels(one):
        said = panel.sentences() or ["One line: nothing is compared."]
        items = "".join(f"<li>{escape(text)}</li>" for text in said)
        parts.append(f"<h4>{escape(f'{dataset}, {model}')}</h4><ul>{items}</ul>")
        parts.append(_comparisons(f"Comparisons, {dataset}, {model}", panel))
    return "".join(parts) or "<p>No run is finished yet: nothing is compared.</p>"


def _comparisons(caption: str, panel: Panel) -> str:
    heads, rows = comparison_rows(panel)
    if not rows:
        return ""
    table = _table(caption, heads, rows)
    return f"<details><summary>All comparisons in numbers</summary>{table}</details>"


def _gaps(one: Shown) -> str:
    """List what is not there, or is not as it should be."""
    runs = one.study.runs
    first_lines = runs["error"].map(lambda text: str(text or "").partition("\n")[0])
    lists: dict[str, list[str]] = {}
    for status in ("failed", "out_of_memory", "diverged", "interrupted", "running"):
        chosen = runs[runs["status"] == status]
        lists[status.replace("_", " ")] = [
            f"{run_id}: {error}" if error and error != "nan" else str(run_id)
            for run_id, error in zip(chosen["run_id"], first_lines[chosen.index], strict=True)
        ]
    lists |= {
        "missing": one.study.missing,
        "left out": one.study.problems,
        "to be weighed": [*one.study.notes, *short_metrics(one.finished, one.metrics)],
    }
    parts = []
    for title, lines in lists.items():
        if not lines:
            continue
        unique = list(dict.fromkeys(lines))
        items = "".join(f"<li>{escape(line)}</li>" for line in unique[:MOST_NAMED])
        if len(unique) > MOST_NAMED:
            items += f"<li>and {len(unique) - MOST_NAMED:,} more</li>"
        parts.append(f"<h4>{title.capitalize()} ({len(unique):,})</h4><ul>{items}</ul>")
    return "".join(parts) or "<p>Nothing: every run that was meant is finished and counted.</p>"


def _repeated(shown: Sequence[Shown], outputs: str, chosen: Sequence[str]) -> str:
    """Say by what the runs were made, and the commands that make them and this page again."""
    where = [] if outputs == "outputs" else [f"outputs={outputs}"]
    parts = [*_each(shown, lambda one: _repeat(one, where))]
    names = chosen[0] if len(chosen) == 1 else f"[{','.join(chosen)}]"
    command = ["python", "-m", "gnbench.report", *where, *([f"study={names}"] if chosen else [])]
    parts.append(f"<p>This page: <code>{escape(shlex.join(command))}</code></p>")
    return "".join(parts)


def _repeat(one: Shown, where: Sequence[str]) -> str:
    columns = ["gnbench", "torch", "python", "device", "engine"]
    made = one.study.runs[columns].fillna("not recorded").astype(str)
    counts = made.value_counts(sort=False).reset_index()
    rows = [[f"{row['count']:,}", *(row[name] for name in columns)] for _, row in counts.iterrows()]
    name = one.study.path.name
    words, notes = commands(one.study.runs["directory"].tolist(), name)
    words.append(["gnbench.aggregate", f"study={name}"])
    lines = [shlex.join(["python", "-m", *command, *where]) for command in words]
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    text = escape("\n".join(lines))
    return (
        (_table("Versions and machines", ["runs", *columns], rows) if rows else "")
        + f'<pre tabindex="0" role="region" aria-label="Commands"><code>{text}</code></pre>'
        + (f"<ul>{said}</ul>" if said else "")
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    name = escape(caption)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{name}"><table>'
        f"<caption>{name}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
