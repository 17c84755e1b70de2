"""Who is timed; turns, so that a drifting machine slows all; ratios within rounds; a table."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tabulate import tabulate

# No engines of gnbench: the loop that a person would write, and the same loop as the engines
# compute: on a CPU with denormal numbers flushed to zero, on a GPU with deterministic kernels.
PLAIN, FLUSHED, DETERMINISTIC = "plain", "plain flushed", "plain deterministic"
PAUSE = 0.05  # seconds between two turns, for the threads of one to fall asleep


class CandidateError(RuntimeError):
    """A candidate cannot be built or has failed; the message names it and says why."""


@dataclass(frozen=True)
class Candidate:
    """How a case is trained: by a plain loop or an engine, ``runs`` at once that share the cores.

    ``compiled``: with torch.compile; ``replicas``: trainings in one process, side by side.
    """

    engine: str
    precision: str
    runs: int = 1
    compiled: bool = False
    replicas: int = 1

    def __str__(self) -> str:
        compiled = " compiled" if self.compiled else ""
        together = f" ×{self.runs}" if self.runs > 1 else ""
        replicas = f" {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.engine}{compiled} {self.precision}{together}{replicas}"

    @property
    def is_plain(self) -> bool:
        """Whether it is no engine of gnbench."""
        return self.engine in (PLAIN, FLUSHED, DETERMINISTIC)


def take_turns(
    players: Mapping[Any, Callable[[float], float]],
    rounds: int,
    seconds: float,
    say: Callable[[str], object],
) -> dict[Any, list[float]]:
    """Give everyone a turn of about ``seconds`` in each of ``rounds``, in an order drawn anew.

    Returns how often a second each did its work, by round.
    """
    rates: dict[Any, list[float]] = {key: [] for key in players}
    draw = random.Random(0)
    for number in range(1, rounds + 1):
        for key in draw.sample(list(players), k=len(players)):
            say(f"round {number} of {rounds}: {key}")
            time.sleep(PAUSE)
            rates[key].append(players[key](seconds))
    return rates


def compare(
    batch_size: int,
    facts: Mapping[Candidate, Mapping[str, Any]],
    rates: Mapping[Any, Sequence[float]],
    flops: float,
    copies: float,
) -> list[dict[str, Any]]:
    """Return a row for every candidate; ratios are medians of those of the rounds.

    ``speedup`` is over the plain loop of the same precision, ``speedup_overall`` over that of the
    first. A step needs the time for its ``flops`` in a product of large matrices of this precision,
    and that for its bytes, as many as ``copies`` of weights and moments move. ``limit``: the longer
    of the two, if arithmetic and memory overlap; ``limit_in_turn``: their sum, if they do not. But
    where steps are replayed as graphs no less than as many kernels need, the fewest that an engine
    has for a step of this precision, each doing nothing but wait for the one before (replicas wait
    side by side).
    """
    from gnbench.bench.limit import CHAIN, COPY, LINKS, MATMUL_FLOPS

    rows = []
    for candidate, known in facts.items():
        own, precision = rates[candidate], candidate.precision
        over_plain = _times(own, rates[Candidate(PLAIN, precision)])
        counts = [f["kernels_per_step"] for c, f in facts.items() if c.precision == precision]
        kernels = min((count for count in counts if count), default=0.0) / candidate.replicas
        chains = rates.get(CHAIN) or [math.inf] * len(own)
        needed = [
            (flops / (matmul * MATMUL_FLOPS), copies / copy, kernels / (chain * LINKS))
            for matmul, copy, chain in zip(rates[precision], rates[COPY], chains, strict=True)
        ]
        limits = {
            "limit": [max(times) for times in needed],
            "limit_in_turn": [max(product + copy, chain) for product, copy, chain in needed],
        }
        rows.append(
            {
                "who": str(candidate),
                **asdict(candidate),
                "images_per_second": batch_size * median(own),
                "ms_per_step": 1000 / median(own),
                "speedup": median(over_plain),
                "speedup_min": min(over_plain),
                "speedup_max": max(over_plain),
                "speedup_overall": median(_times(own, rates[next(iter(facts))])),
                **{f"{name}_ms_per_step": 1000 * median(times) for name, times in limits.items()},
                **{
                    f"{name}_fraction": median(a * b for a, b in zip(own, times, strict=True))
                    for name, times in limits.items()
                },
                **known,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Put the rows of a case into words."""
    several = len({row["precision"] for row in rows}) > 1
    overall = [f"× plain {rows[0]['precision']}"] * several
    lines = [
        {
            "": row["who"],
            "threads": row["threads"],
            "images/s": row["images_per_second"],
            "ms/step": row["ms_per_step"],
            "× plain": row["speedup"],
            "(least": row["speedup_min"],
            "most)": row["speedup_max"],
            **dict.fromkeys(overall, row["speedup_overall"]),
            "% of limit": 100 * row["limit_fraction"],
            "% in turn": 100 * row["limit_in_turn_fraction"],
            "MiB": row["peak_memory_bytes"] and row["peak_memory_bytes"] / 2**20,
            "start, s": row["startup_seconds"],
        }
        for row in rows
    ]
    formats = ("", "", ",.0f", *[".2f"] * (4 + several), *[".0f"] * 2, ",.0f", ".1f")
    return tabulate(lines, headers="keys", tablefmt="plain", floatfmt=formats, missingval="–")


def _times(own: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(own, other, strict=True)]
