"""``python -m gnbench.bench``: how fast each engine trains, beside a plain loop and the limit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import hydra
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from gnbench import cli, runs
from gnbench.config import CHOICES, ConfigError, check_integer, conf_dir, is_number

if TYPE_CHECKING:  # imports torch: not for --help
    from gnbench.contenders import Copying, Matmul

PAUSE = 0.05  # seconds between two contenders, for the threads of one to fall asleep
TRIAL = 3  # steps from which the length of a slice is estimated
PLAIN = "plain"  # the contender that is no engine of gnbench
QUICK = "--config-name=bench_quick"


class ContenderError(RuntimeError):
    """A contender cannot be built or has failed; the message says why."""


@dataclass(frozen=True)
class Case:
    """What is trained by every contender."""

    dataset: str
    model: str
    norm: str
    batch_size: int


@dataclass(frozen=True)
class Contender:
    """How it is trained: ``runs`` at a time, each with its share of the cores.

    Besides gnbench's engines there are ``plain``, and ``matmul`` and ``copy`` for the hardware.
    """

    engine: str
    precision: str
    runs: int = 1

    def __str__(self) -> str:
        together = f" ×{self.runs}" if self.runs > 1 else ""
        return f"{self.engine} {self.precision}{together}"


class Processes:
    """A contender at work: a process for each of its runs."""

    def __init__(
        self, contender: Contender, command: tuple[str, ...], cores: int, stack: ExitStack
    ) -> None:
        from gnbench.contenders import Report, serve

        self.threads = max(1, cores // contender.runs)
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        for _ in range(contender.runs):
            ours, theirs = context.Pipe()
            engine = None if contender.engine == PLAIN else contender.engine
            arguments = (theirs, engine, command, self.threads, time.time())
            process = context.Process(target=serve, args=arguments)
            process.start()
            theirs.close()
            stack.callback(_end, process, ours)
            self._connections.append(ours)
        reports: list[Report] = [self._answer(connection) for connection in self._connections]
        self.startup_seconds = max(report.startup_seconds for report in reports)
        self.first_step_seconds = max(report.first_step_seconds for report in reports)
        self.device = reports[0].device

    def ask(self, order: str, argument: object = None) -> list[Any]:
        """Give all processes the order at once and wait for what they answer."""
        for connection in self._connections:
            connection.send((order, argument))
        return [self._answer(connection) for connection in self._connections]

    def rate(self, count: int) -> float:
        """Take ``count`` steps in every run; return the steps per second of all together."""
        began = time.perf_counter()
        done = sum(self.ask("take", count))
        return float(done / (time.perf_counter() - began))

    def _answer(self, connection: Connection) -> Any:
        try:
            answer = connection.recv()
        except (EOFError, ConnectionError):
            raise ContenderError("its process died") from None
        if getattr(answer, "error", None):
            raise ContenderError(answer.error)
        return answer


class Hardware:
    """By what its limit is measured, in this process."""

    def __init__(self, work: Matmul | Copying) -> None:
        self._work = work

    def rate(self, count: int) -> float:
        """Do the work ``count`` times; return how often a second."""
        began = time.perf_counter()
        return self._work.take(count) / (time.perf_counter() - began)


def _end(process: SpawnProcess, connection: Connection) -> None:
    """Hang up and wait for the process to end."""
    connection.close()
    process.join(10)
    if process.is_alive():
        process.kill()


def contenders(config: DictConfig) -> list[Contender]:
    """Return who is timed, the plain loop in the first precision in front."""
    engines = [name for name in CHOICES["engine"] if name != "auto"]
    return [
        *(Contender(PLAIN, precision) for precision in config.precisions),
        *(
            Contender(engine, precision, count)
            for engine in engines
            for precision in config.precisions
            for count in config.runs
        ),
    ]


def _hardware(case: Case, config: DictConfig) -> dict[Contender, Hardware]:
    """Return what takes its turns beside the contenders, so that the limit drifts as they do."""
    from gnbench.contenders import Copying, Matmul
    from gnbench.experiment import compose

    found = {}
    for precision in config.precisions:
        composed = compose(*overrides(case, precision, config))
        found[Contender("matmul", precision)] = Hardware(Matmul(composed))
        found[Contender("copy", "fp32")] = Hardware(Copying(composed))
    return found


def measure(
    case: Case, config: DictConfig, bar: tqdm[Any], folder: Path
) -> tuple[list[dict[str, Any]], str]:
    """Time every contender on ``case``; return a row each, and the device.

    All are built first and continue one training; then they take turns, a slice each in every
    round, so that a machine that slows down slows all. Ratios are medians of those of the rounds.

    Raises:
        ContenderError: if one fails without which there is nothing to compare.
    """
    from gnbench.contenders import MATMUL_FLOPS, count_flops
    from gnbench.experiment import compose

    with ExitStack() as stack:
        teams = _start(case, config, bar, stack)
        trained = [contender for contender in contenders(config) if contender in teams]
        leader = next(c for c in trained if c.engine != PLAIN and c.runs == 1)
        state = str(folder / "state.pt")
        bar.set_postfix_str(f"warming up with {leader}")
        teams[leader].ask("take", config.warmup_steps)
        teams[leader].ask("save", state)
        for contender in trained:
            if contender != leader:
                teams[contender].ask("load", state)
        bar.update()
        rates = _take_turns({**teams, **_hardware(case, config)}, config, bar)
        memory = {contender: sum(teams[contender].ask("memory")) for contender in trained}
    flops = count_flops(compose(*overrides(case, "fp32", config)))
    copies = rates[Contender("copy", "fp32")]
    rows = []
    for contender in trained:
        own, team = rates[contender], teams[contender]
        matmuls = rates[Contender("matmul", contender.precision)]
        limits = [
            max(flops / (matmul * MATMUL_FLOPS), 1 / copy)
            for matmul, copy in zip(matmuls, copies, strict=True)
        ]
        rows.append(
            {
                **asdict(case),
                **asdict(contender),
                "threads": team.threads,
                "images_per_second": case.batch_size * median(own),
                "ms_per_step": 1000 * contender.runs / median(own),
                "speedup": median(a / b for a, b in zip(own, rates[trained[0]], strict=True)),
                "limit_ms_per_step": 1000 * median(limits),
                "limit_fraction": median(a * b for a, b in zip(own, limits, strict=True)),
                "peak_memory_bytes": memory[contender],
                "startup_seconds": team.startup_seconds,
                "first_step_seconds": team.first_step_seconds,
            }
        )
    return rows, teams[leader].device


def _start(
    case: Case, config: DictConfig, bar: tqdm[Any], stack: ExitStack
) -> dict[Contender, Processes]:
    """Start every contender; leave out, and name, those that fail but can be done without."""
    teams: dict[Contender, Processes] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for contender in contenders(config):
        bar.set_postfix_str(f"starting {contender}")
        command = overrides(case, contender.precision, config)
        try:
            teams[contender] = Processes(contender, command, cores or 1, stack)
        except ContenderError as error:
            if contender == contenders(config)[0]:
                raise ContenderError(f"{_title(case)}: {contender}: {error}") from error
            _say(f"{_title(case)}: {contender} is left out: {error}")
        bar.update()
    if all(contender.engine == PLAIN or contender.runs > 1 for contender in teams):
        raise ContenderError(f"{_title(case)}: no engine can be timed")
    return teams


def _take_turns(
    teams: Mapping[Contender, Processes | Hardware], config: DictConfig, bar: tqdm[Any]
) -> dict[Contender, list[float]]:
    """Return for every contender how often a second it did its work, round by round."""
    counts = {c: round(config.seconds * team.rate(TRIAL) / c.runs) for c, team in teams.items()}
    rates: dict[Contender, list[float]] = {contender: [] for contender in teams}
    order = list(teams)
    for turn in range(config.rounds):
        for contender in order:
            bar.set_postfix_str(f"round {turn + 1}: {contender}")
            time.sleep(PAUSE)
            teams[contender].rate(TRIAL)  # what its data workers made ready meanwhile
            rates[contender].append(teams[contender].rate(max(1, counts[contender])))
            bar.update()
        order = order[1:] + order[:1]
    return rates


def overrides(case: Case, precision: str, config: DictConfig) -> tuple[str, ...]:
    """Return the command line of a run of ``case``."""
    return (
        f"model={case.model}",
        f"norm={case.norm}",
        f"batch_size={case.batch_size}",
        f"precision={precision}",
        f"dataset={case.dataset}",
        f"device={config.device}",
    )


def table(case: Case, rows: Sequence[dict[str, Any]]) -> str:
    """Put the rows of a case into words."""
    lines = [
        "",
        _title(case),
        f"  {'':<14}{'threads':>7}{'images/s':>10}{'ms/step':>9}{'× plain':>9}{'of limit':>10}"
        f"{'memory':>12}{'start':>8}{'1st step':>10}",
    ]
    for row in rows:
        name = str(Contender(row["engine"], row["precision"], row["runs"]))
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"
        lines.append(
            f"  {name:<14}{row['threads']:>7}{row['images_per_second']:>10,.0f}"
            f"{row['ms_per_step']:>9.2f}{row['speedup']:>9.2f}{row['limit_fraction']:>10.0%}"
            f"{memory:>12}{row['startup_seconds']:>6.1f} s{row['first_step_seconds']:>8.1f} s"
        )
    return "\n".join(lines)


def check(config: DictConfig) -> None:
    """Raise `ConfigError` for a setting that cannot work, before anything is started."""
    from gnbench.experiment import compose

    for key in ("datasets", "models", "norms", "batch_sizes", "precisions", "runs"):
        if not config[key]:
            raise ConfigError(f"{key}=[]: name at least one")
    for precision in config.precisions:
        if precision not in CHOICES["precision"]:
            choices = ", ".join(CHOICES["precision"])
            raise ConfigError(f"precisions={precision}: choose from {choices}")
    check_integer("rounds", config.rounds, least=1)
    check_integer("warmup_steps", config.warmup_steps, least=1)
    for count in config.runs:
        check_integer("runs", count, least=1)
    if 1 not in config.runs:
        raise ConfigError(f"runs={list(config.runs)}: 1 must be among them")
    if not is_number(config.seconds) or config.seconds <= 0:
        raise ConfigError(f"seconds={config.seconds}: must be a number over 0")
    for case in cases(config):
        compose(*overrides(case, config.precisions[0], config))


def cases(config: DictConfig) -> list[Case]:
    """Return all combinations of datasets, models, norms and batch sizes."""
    axes = (config.datasets, config.models, config.norms, config.batch_sizes)
    return [Case(*values) for values in itertools.product(*axes)]


def bench(config: DictConfig, command: str) -> bool:
    """Time all cases; print a table, write CSV, JSON and figure; return whether none failed.

    Files are written after every case, so that an interruption costs the case under way.

    Raises:
        ConfigError: for a setting that cannot work, before anything is started.
        WriteError: if the results cannot be written.
    """
    check(config)
    cli.composed()
    folder = Path(config.outputs)
    about = {
        "command": command,
        "started": runs.now(),
        "versions": runs.versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
    rows: list[dict[str, Any]] = []
    whole = True
    starts = len(contenders(config))
    turns = config.rounds * (starts + len(config.precisions) + 1)
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(
            total=len(cases(config)) * (starts + 1 + turns),
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}",
        ) as bar,
    ):
        for number, case in enumerate(cases(config), 1):
            bar.set_description_str(f"{_title(case)} ({number}/{len(cases(config))})")
            try:
                found, about["device"] = measure(case, config, bar, Path(scratch))
            except ContenderError as error:
                _say(str(error))
                whole = False
                continue
            rows += found
            _write(folder, rows, about)
            with bar.external_write_mode(file=sys.stdout):
                print(table(case, found), flush=True)
    if rows:
        print(f"\n{about['device']}, {about['cores']} cores; written to {folder}")
    return whole


def _write(folder: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    from gnbench import figure

    found = pd.DataFrame(rows)
    with runs.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    runs.replace(folder / "bench.csv", found.to_csv(index=False).encode())
    runs.replace(folder / "bench.json", (json.dumps(about, indent=1) + "\n").encode())
    for suffix in ("png", "svg"):
        figure.save(figure.draw_speed(found, str(about["device"])), folder / f"bench.{suffix}")


def _title(case: Case) -> str:
    return f"{case.dataset}, {case.model} {case.norm}, batch size {case.batch_size}"


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="bench")
def app(config: DictConfig) -> None:
    """Measure what ``conf/bench.yaml`` says."""
    overridden = " ".join(HydraConfig.get().overrides.task)
    quick = " --quick" if HydraConfig.get().job.config_name == QUICK.partition("=")[2] else ""
    try:
        whole = bench(config, f"python -m gnbench.bench{quick} {overridden}".strip())
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    if not whole:
        raise SystemExit(cli.FAILED)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.

    ``--quick`` takes the settings of ``conf/bench_quick.yaml``.
    """
    sys.argv[1:] = [QUICK if argument == "--quick" else argument for argument in sys.argv[1:]]
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
