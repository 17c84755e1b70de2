"""``python -m gnbench.compare a b``: two studies side by side, and whether they are equal.

``b`` may be a source of published values: whether the study repeats their contrasts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import hydra
from omegaconf import DictConfig
from pydantic import Field
from tabulate import tabulate

from gnbench import cli, files, zipped
from gnbench.config import Folder, Settings, conf_dir
from gnbench.errors import DONE, FAILED, ConfigError
from gnbench.sweep.plan import find_studies, is_study

if TYPE_CHECKING:  # pandas is not for --help
    from gnbench.aggregate.pairs import Pair, Pairs
    from gnbench.aggregate.study import Study

HEADS = ("", "batch size", "seeds", "a", "b", "b − a", "95 %", "p (Holm)", "")
COLUMNS = ["dataset", "model", "line", "batch_size", "n_seeds_a", "n_seeds_b", "test_error_a"]
COLUMNS += ["test_error_b", "identical"]
NUMBERS = ["difference", "ci_low", "ci_high", "p", "p_holm", "detectable", "mcnemar"]


class CompareConfig(Settings):
    """What ``conf/compare.yaml`` holds."""

    outputs: Folder
    a: Folder | None
    b: Folder | None
    against: str | None
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    write: Folder | None


def compare(config: CompareConfig) -> bool:
    """Compare two studies, say what was found, and tell whether they are equal within noise.

    Held against published values, whether every contrast is replicated or consistent.

    Raises:
        ConfigError: if there is no such study, or the two have no cell in common; nothing is
            written then.
        WriteError: if ``config.write`` cannot be written.
    """
    from gnbench.aggregate.pairs import pair
    from gnbench.aggregate.study import all_published, read_study

    if config.a is None or config.b is None:
        raise ConfigError("name two studies: python -m gnbench.compare A B")
    target = None if config.write is None else Path(config.write)
    if target is not None and target.suffix not in (".csv", ".md"):
        raise ConfigError(f"write={target}: choose NAME.csv or NAME.md")
    sources = all_published()["source"].unique()
    if config.b in sources and not is_study(Path(config.outputs, config.b)):
        return _replicated(config, target)
    for name in ("against", "margin"):
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"{name}={value}: is for published values ({', '.join(sources)}); leave it out"
            )
    try:
        places = [find(name, config.outputs) for name in (config.a, config.b)]
    except ConfigError as error:
        raise ConfigError(f"{error}; b may be published: {', '.join(sources)}") from error
    studies = [read_study(place) for place in places]
    found = pair(*studies)
    if not found.cells:
        counts = " and ".join(f"{len(s.finished)} in {s.path}" for s in studies)
        raise ConfigError(
            f"no cell is finished in both (runs: {counts}): compare studies that share a dataset, "
            f"model, norm and batch size{found.apart and ', and values of ' + found.apart}"
        )
    cli.composed()
    equal, verdict = judge(found)
    print(describe(studies, found, verdict, "plain"))
    if target is not None:
        text = (
            _csv(found) if target.suffix == ".csv" else describe(studies, found, verdict, "github")
        )
        _write(target, text)
    return equal


def _replicated(config: CompareConfig, target: Path | None) -> bool:
    """Hold a study against published values, and say what was found."""
    from gnbench.aggregate import replication, replication_verdict
    from gnbench.aggregate.study import published, read_study

    study, values = read_study(find(str(config.a), config.outputs)), published(str(config.b))
    margin = config.margin or replication.MARGIN
    networks = replication.replicate(study, values, config.against, margin)
    said = (study, values, networks, replication_verdict.recipe(study, str(config.b)), margin)
    cli.composed()
    print(replication_verdict.describe(*said, form="plain"))
    if target is not None and target.suffix == ".csv":
        _write(target, replication_verdict.table(networks).to_csv(index=False))
    elif target is not None:
        _write(target, replication_verdict.describe(*said, form="github"))
    return replication.overall(networks) in (replication.REPLICATED, replication.CONSISTENT)


def _write(target: Path, text: str) -> None:
    files.make_folder(target.parent)
    files.replace(target, text.encode(errors="replace"))


def find(name: str, outputs: str) -> Path:
    """Return the folder of a study, maybe in an archive, by its name under ``outputs`` or its path.

    Raises:
        ConfigError: if there is none.
    """
    path = Path(name)
    for place in (Path(outputs, name), path):
        if place == zipped.archive_of(place):
            studies = find_studies(place, archives=True)
            if len(studies) > 1:
                names = ", ".join(str(study) for study in studies)
                raise ConfigError(f"{name}: holds several studies; name one: {names}")
            return studies[0]
        if is_study(place):
            return place
    known = ", ".join(
        folder.name for folder in sorted(Path(outputs).glob("*/")) if is_study(folder)
    )
    raise ConfigError(
        f"{name}: there is no such study; give the folder of one, an archive, or a name under "
        f"{outputs} ({known or 'which has none'})"
    )


def judge(found: Pairs) -> tuple[bool, list[str]]:
    """Return whether two studies are equal within noise, and in sentences why."""
    cells = found.cells
    same = [one for one in cells if one.identical]
    different = [one for one in cells if one.different]
    unknown = [one for one in cells if not one.known]
    alike = [one for one in cells if one.known and not (one.identical or one.different)]
    said = []
    if same:
        said.append(
            f"Identical: {_which(same, cells)}: the same seeds measured the same in every epoch."
        )
    for sign, words in ((-1, "b errs less than a"), (1, "b errs more than a")):
        if shown := [one for one in different if _sign(one) == sign]:
            said.append(f"Different: {words} at {_which(shown, cells)}.")
    if alike:
        said.append(f"Not to be told apart: {_which(alike, cells)}.")
    if tested := [one.comparison for one in cells if one.comparison.detectable is not None]:
        low, high = (f(c.detectable or 0.0 for c in tested) for f in (min, max))
        size = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        said.append(
            f"With these seeds a difference of {size} points would be shown (power 80 %); p by "
            f"Holm over {tested[0].family} cells."
        )
    if any(one.comparison.p is None for one in [*different, *alike]):
        said.append(
            "Of one seed each: what is said is of these two networks on these test images "
            "(McNemar); of other seeds it says nothing."
        )
    if unknown:
        said.append(f"Nothing can be said: {_which(unknown, cells)}: {_why(unknown)}.")
    again = [one for one in cells if one.same_seeds < one.common_seeds]
    if again and not (found.settings or found.circumstances):
        said.append(
            "Settings, versions and machine are the same, the bits are not: "
            f"{_which(again, cells)}."
        )
    if different:
        verdict = "different"
    elif unknown:
        verdict = "not known to be equal"
    else:
        verdict = "not to be told apart" if alike else "identical"
    return not (different or unknown), [*said, f"Verdict: {verdict}."]


def _sign(one: Pair) -> int:
    by = one.comparison
    difference = by.final_difference if by.p is None else by.difference
    return 1 if (difference or 0.0) > 0 else -1


def _which(chosen: Sequence[Pair], cells: Sequence[Pair]) -> str:
    """Name cells, or say that it is all."""
    if len(chosen) == len(cells):
        return "the only cell" if len(cells) == 1 else f"all {len(cells)} cells"
    several = len({one.network for one in cells}) > 1
    return "; ".join(
        f"{', '.join(one.network) + ' ' if several else ''}{one.label}, batch size "
        f"{one.comparison.batch_size}"
        for one in chosen
    )


def _why(unknown: Sequence[Pair]) -> str:
    """Say why nothing can be said of cells."""
    diverged = {one.a.diverged or one.b.diverged for one in unknown}
    reasons = {
        "runs diverged": True,
        "no cell of the network has seeds that differ, and networks of one seed each are told "
        "apart by correct.npy of the same test images only": False,
    }
    return "; ".join(reason for reason, so in reasons.items() if so in diverged)


def describe(studies: Sequence[Study], found: Pairs, verdict: Sequence[str], form: str) -> str:
    """Put a comparison into words and a table; ``form`` is one of tabulate's."""
    from gnbench.aggregate.verdict import interval, p_value

    several = len({one.network for one in found.cells}) > 1
    rows = []
    for one in found.cells:
        by = one.comparison
        paired = by.p is None and by.mcnemar is not None
        rows.append(
            [
                f"{', '.join(one.network)} {one.label}" if several else one.label,
                by.batch_size,
                f"{one.a.seeds}, {one.b.seeds}",
                f"{one.a.mean:.2f}",
                f"{one.b.mean:.2f}",
                f"{by.difference:+.2f}",
                "–" if one.identical else interval(by.ci_low, by.ci_high),
                "–" if one.identical else p_value(by.p_holm),
                _note(one, f"McNemar p {p_value(by.mcnemar, '= ')}" if paired else ""),
            ]
        )
    title = ", ".join(found.cells[0].network) + ": " if not several else ""
    aligned = ("left", *["right"] * 7, "left")
    table = tabulate(rows, HEADS, form, disable_numparse=True, colalign=aligned)
    places = [
        f"{side}: {study.path}, {len(study.finished)} finished runs"
        for side, study in zip("ab", studies, strict=True)
    ]
    lists = {
        "settings that differ": found.settings or ["none"],
        "versions and machines that differ": found.circumstances or ["none"],
        **{f"only in {side}": lines for side, lines in found.only_in.items()},
        **{
            f"left out of {side}": study.problems for side, study in zip("ab", studies, strict=True)
        },
    }
    mark = "- " if form == "github" else "  "
    break_ = "\n\n" if form == "github" else "\n"
    parts = [break_.join(places)]
    for name, lines in lists.items():
        if lines:
            parts.append(f"{name}:{break_}" + "\n".join(f"{mark}{line}" for line in lines))
    parts.append(f"{title}test error in %, mean over seeds{break_}{table}")
    parts.append(break_.join(verdict))
    return "\n\n".join(parts) + "\n"


def _note(one: Pair, paired: str) -> str:
    if one.identical:
        return "identical"
    if one.a.diverged or one.b.diverged:
        return "diverged"
    same = f"{one.same_seeds} of {one.common_seeds} seeds identical" if one.same_seeds else ""
    return "; ".join(text for text in (paired, same) if text)


def _csv(found: Pairs) -> str:
    import pandas as pd

    rows: list[list[Any]] = []
    for one in found.cells:
        numbers = [getattr(one.comparison, name) for name in NUMBERS]
        seeds, errors = [one.a.seeds, one.b.seeds], [one.a.mean, one.b.mean]
        cell = [*one.network, one.label, one.comparison.batch_size]
        rows.append([*cell, *seeds, *errors, one.identical, *numbers])
    return pd.DataFrame(rows, columns=[*COLUMNS, *NUMBERS]).to_csv(index=False)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="compare")
def app(config: DictConfig) -> None:
    """Compare as ``conf/compare.yaml`` says."""
    try:
        equal = compare(CompareConfig.parse(config))
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    raise SystemExit(DONE if equal else FAILED)


def main() -> None:
    """Run the command line. Exit codes: 0 equal within noise, 1 not, 2 bad input."""
    sys.argv[1:] = cli.with_names(sys.argv[1:], ("a", "b"))
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
