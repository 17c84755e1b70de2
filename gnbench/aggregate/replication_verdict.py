"""What a study repeats of published values, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from gnbench.aggregate.compare import CONFIDENCE, POWER
from gnbench.aggregate.pairs import as_text
from gnbench.aggregate.replication import CONSISTENT, UNDECIDED, WORDS, Contrast, Network, overall
from gnbench.aggregate.study import CELL, Study, flattened
from gnbench.aggregate.verdict import different_spreads, interval, p_value
from gnbench.composition import composed
from gnbench.config import RunConfig, conf_dir
from gnbench.identity import all_settings

NUMBERS = ["seeds", "seeds_there", "published", "found", "order", "low", "high", "p", "p_holm"]


def recipe(study: Study, source: str) -> list[str]:
    """Name the settings in which finished runs differ from the presets of ``source``.

    Those are ``experiment=replicate/<source>…`` of the same dataset and model. Data sets and
    networks that only the study has are left out.
    """
    lines: dict[str, None] = {}
    for path in sorted((conf_dir() / "experiment" / "replicate").glob(f"{source}*.yaml")):
        for norm, runs in study.finished.groupby("norm"):
            for name, values, meant in _differing(path, str(norm), runs):
                of = f" ({norm})" if name.startswith("norm.") else ""
                lines[f"{name}{of}: {values}, in replicate/{path.stem} {meant}"] = None
    return [*lines]


def _differing(path: Path, norm: str, runs: pd.DataFrame) -> list[tuple[str, str, str]]:
    preset = f"experiment=replicate/{path.stem}"
    options = str(composed(preset).hydra.sweeper.params.norm).split(",")
    configs = [RunConfig.parse(composed(preset, f"norm={name}")) for name in options]
    fitting = [config for config in configs if config.norm.name == norm] or configs
    settings = all_settings(fitting[0].plain())
    meant = {name: as_text(value) for name, value in flattened(settings).items()}
    same = (runs["dataset"] == meant["dataset.name"]) & (runs["model"] == meant["model.name"])
    found = []
    names = {*meant} & {*runs} - {*CELL, "seed", "norm.name"}
    if fitting is configs:  # a norm that the preset does not have
        names = {name for name in names if not name.startswith("norm.")}
    for name in sorted(names):
        if values := sorted({*runs.loc[same, name].map(as_text)} - {meant[name]}):
            found.append((name, ", ".join(values), meant[name]))
    return found


def table(networks: Sequence[Network]) -> pd.DataFrame:
    """Return all contrasts, a row each."""
    rows = [
        [*one.name, *one.against, c.name, *(getattr(c, name) for name in NUMBERS), c.word]
        for one in networks
        for c in one.contrasts
    ]
    heads = ["dataset", "model", "published_dataset", "published_model", "contrast"]
    return pd.DataFrame(rows, columns=[*heads, *NUMBERS, "word"])


def describe(
    study: Study,
    published: pd.DataFrame,
    networks: Sequence[Network],
    differing: Sequence[str],
    margin: float,
    form: str,
) -> str:
    """Put a comparison with ``published`` into words and tables; ``form`` is one of tabulate's."""
    source = str(published["source"].iloc[0])
    break_, mark = ("\n\n", "- ") if form == "github" else ("\n", "  ")
    notes = [*published["note"].unique()]
    notes += ["test errors corrected: docs/results.md"] if published["corrected"].any() else []
    named = {one.name for one in networks}
    others = {*study.finished[CELL[:2]].itertuples(index=False, name=None)} - named
    unfinished = study.unfinished
    lists = {
        f"{source}": notes,
        f"settings that differ from the preset of {source}": differing,
        "not published, left out": sorted(", ".join(name) for name in others),
        "not finished": [f"{r['run_id']} ({r['status']})" for _, r in unfinished.iterrows()],
        "left out": study.problems,
    }
    parts = [f"{study.path}, {len(study.finished)} finished runs, against {source}"]
    for name, lines in lists.items():
        if lines:
            parts.append(break_.join([f"{name}:", *(f"{mark}{line}" for line in lines)]))
    for one in networks:
        parts.append(f"{_title(one, margin)}{break_}{_table(one, form)}")
        if one.lacking:
            parts.append(f"published, not finished here: {', '.join(one.lacking)}")
    parts.append(break_.join(_sentences(study, networks, margin)))
    return "\n\n".join(parts) + "\n"


def _title(one: Network, margin: float) -> str:
    name = ", ".join(one.name)
    if not one.order:
        return f"{name}: contrasts of test errors in points, margin ± {margin:g}"
    other = ", ".join(one.against) if one.against != one.name else "another size of it"
    return (
        f"{name}: the order of the norms, published of {other}; differences of test errors in "
        "points"
    )


def _table(one: Network, form: str) -> str:
    heads = ["", "seeds", "published", "found", "Δ", "95 %", "p (Holm)", ""]
    rows = [
        [
            c.name,
            f"{c.seeds}, {c.seeds_there}",
            f"{c.published:+.2f}",
            f"{c.found:+.2f}",
            f"{c.tested:+.2f}",
            interval(c.low, c.high),
            p_value(c.p_holm),
            c.word,
        ]
        for c in one.contrasts
    ]
    if one.order:  # what is tested is what was found
        heads.remove("Δ")
        rows = [row[:4] + row[5:] for row in rows]
    aligned = ("left", *["right"] * (len(heads) - 2), "left")
    return tabulate(rows, heads, form, disable_numparse=True, colalign=aligned)


def _sentences(study: Study, networks: Sequence[Network], margin: float) -> list[str]:
    """Say what became of the contrasts, what must be weighed, and the verdict."""
    names = {
        id(c): f"{', '.join(one.name)} {c.name}" if len(networks) > 1 else c.name
        for one in networks
        for c in one.contrasts
    }
    everything = [c for one in networks for c in one.contrasts]

    def listed(chosen: Sequence[Contrast]) -> str:
        return "; ".join(names[id(c)] for c in chosen)

    said = []
    for word in WORDS:
        if chosen := [c for c in everything if c.word == word]:
            counted = f"{len(chosen)} of {len(everything)}"
            said.append(f"{word.capitalize()}: {counted} ({listed(chosen)}).")
    points = f"{margin:g} point{'s' if margin != 1 else ''}"
    sized = [c for c in everything if not c.order]
    if any(c.word == CONSISTENT for c in sized):
        said.append(
            "Consistent says only that Δ is within the noise of so few seeds; replicated, that it "
            f"is shown to be less than {points}."
        )
    if small := [c for c in sized if abs(c.published) < margin and c.error is not None]:
        said.append(
            f"Published as less than {points}, so that no difference at all would repeat it: "
            f"{listed(small)}."
        )
    if any(c.error is not None and c.seeds_there < 2 for c in sized):
        said.append("Single runs there are taken to spread as those here do.")
    said += _power(networks)
    said += {different_spreads(one.pooled) for one in networks if one.pooled} - {""}
    if unknown := [c for c in everything if c.error is None]:
        single = study.finished.groupby(CELL)["seed"].nunique().max() < 2
        why = (
            "single seeds have no spread; more would tell (seed=0,1,2)"
            if single
            else "no spread is known, runs diverged, or an error is 0 or 100 %"
        )
        of = "" if len(unknown) == len(everything) else f" of {listed(unknown)}"
        said.append(f"Nothing can be said{of}: {why}.")
    verdict = overall(networks)
    lacking = sum(len(one.lacking) for one in networks)
    if lacking and verdict == UNDECIDED and all(c.word != UNDECIDED for c in everything):
        verdict += f", as {lacking} published cells were not run"
    return [*said, f"Verdict: {verdict}."]


def _power(networks: Sequence[Network]) -> list[str]:
    """Say how large a difference these seeds show."""
    found = []
    for one in networks:
        errors = [c.error for c in one.contrasts if c.error is not None]
        if one.pooled is not None and errors:
            reach = one.pooled.quantile((1 + CONFIDENCE) / 2) + one.pooled.quantile(POWER)
            low, high = (f"{reach * bound(errors):.1f}" for bound in (np.min, np.max))
            what = "A difference" if one.order else "A Δ"
            size = low if low == high else f"{low} to {high}"
            of = f" of {', '.join(one.name)}" if len(networks) > 1 else ""
            found.append(
                f"{what}{of} of {size} points would be shown not to be 0 by its own 95 % interval "
                "(power 80 %)."
            )
    return found
