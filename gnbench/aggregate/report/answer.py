"""The short answer: which line has the lowest error at a batch size, how sure, at what memory."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from gnbench.aggregate.compare import Comparison, Line, compare
from gnbench.aggregate.verdict import NO_VARIANCE, Panel, interval, p_value

MIB = 2**20


@dataclass(frozen=True)
class Leader:
    """The line of lowest mean error at a batch size, and the next, as far as there is one.

    ``against`` compares the next with it, p by Holm over the batch sizes. That they were chosen by
    looking at the errors needs no further correction: the two-sided test of the best against the
    second holds its level (Gutmann & Maymin 1987, "Is the selected population the best?").
    """

    batch_size: int
    line: Line
    half: float | None  # half the 95 % interval of its error
    next_line: Line | None
    against: Comparison | None
    diverged: list[str]  # labels of those that cannot be compared there

    @property
    def shown(self) -> bool:
        """Whether it is shown to err less than the next."""
        return self.against is not None and self.against.shown > 0

    @property
    def error(self) -> str:
        """Its test error in words."""
        cell = self.line.cells[self.batch_size]
        seeds = "1 seed" if cell.seeds == 1 else f"{cell.seeds} seeds"
        if self.half is None:
            return f"{cell.mean:.2f} % ({seeds}, no interval)"
        low, high = cell.mean - self.half, cell.mean + self.half
        return f"{cell.mean:.2f} % (95 %: {low:.2f} to {high:.2f}; {seeds})"

    def sure(self) -> str:
        """Say how sure it is that no other line errs less there."""
        if self.next_line is None or self.against is None:
            return "No other line has a result there: nothing is compared."
        one = self.against
        next_one = f"the next, {self.next_line.label}, errs {one.difference:.2f} points more"
        if one.ci_low is None:
            cells = [line.cells[self.batch_size] for line in (self.line, self.next_line)]
            if not all(cell.usable for cell in cells):
                return f"Not shown: {next_one}, but {NO_VARIANCE}."
            if max(one.n_seeds, one.n_seeds_against) > 1:
                why = "no spread over seeds is known"
            else:
                why = "a single seed has no interval"
            return f"Not shown: {next_one}, but {why}. More seeds would tell (seed=0,1,2)."
        span = f"95 %: {interval(one.ci_low, one.ci_high)}; p {p_value(one.p_holm, '= ')}"
        if one.family and one.family > 1:
            span += f" by Holm over {one.family} batch sizes"
        if self.shown:
            return f"Shown: {next_one} ({span})."
        could = f"a difference of {one.detectable:.1f} points would be" if one.detectable else ""
        return (
            f"Not shown: {next_one} ({span}), which these data do not tell from none. "
            f"With so many seeds {could} shown (power 80 %)."
        )


def leaders(panel: Panel, registered: list[int]) -> list[Leader]:
    """Find the line of lowest error at every batch size, from small to large."""
    sizes = sorted({size for line in panel.lines for size in line.cells})
    found, pairs = [], []
    for size in sizes:
        there = [line for line in panel.lines if size in line.cells]
        diverged = [line.label for line in there if line.cells[size].diverged]
        ended = [line for line in there if not line.cells[size].diverged]
        ranked = sorted(ended, key=lambda line: line.cells[size].mean)
        if not ranked:
            continue
        best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
        pair = None
        if second is not None:
            reference = Line(best.label, {size: best.cells[size]})
            pair = Line(second.label, {size: second.cells[size]}, reference)
            pairs += [reference, pair]
        found.append((size, best, second, pair, diverged))
    compare(pairs, panel.pooled, registered)
    return [
        Leader(
            size,
            best,
            None
            if panel.pooled is None or not best.cells[size].usable
            else panel.pooled.half(best.cells[size]),
            second,
            None if pair is None else pair.comparisons[0],
            diverged,
        )
        for size, best, second, pair, diverged in found
    ]


def memory(runs: pd.DataFrame, other: tuple[str, pd.DataFrame] | None, network: str) -> str:
    """Say what the finished ``runs`` of a cell hold, by `bytes_held`, and those of an ``other``.

    ``network`` are the settings with which `gnbench.memory` measures it.
    """
    held, kind = bytes_held(runs)
    command = f"python -m gnbench.memory {network} measures it."
    if held is None:
        return f"Not recorded; {command}"
    text = mebibytes(held)
    text += " held for the backward pass" if kind == "activation_bytes" else " at the run's peak"
    if other is not None:
        others, other_kind = bytes_held(other[1])
        if others is not None and kind == other_kind:
            text += f"; {other[0]}: {mebibytes(others)}"
    if kind != "activation_bytes":
        text += f". What is held for the backward pass was not recorded; {command[:-1]}"
    return f"{text}."


def bytes_held(runs: pd.DataFrame) -> tuple[float | None, str]:
    """Return the mean bytes held for the backward pass; if those are unknown, the peak."""
    for kind in ("activation_bytes", "peak_memory_bytes"):
        values = pd.to_numeric(runs[kind], errors="coerce").dropna()
        if not values.empty:
            return float(values.mean()), kind
    return None, ""


def mebibytes(count: float) -> str:
    """Return bytes as MiB in words."""
    return f"{count / MIB:,.{1 if count < 100 * MIB else 0}f} MiB"
