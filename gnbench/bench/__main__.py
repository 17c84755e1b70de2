"""``python -m gnbench.bench``: how fast each engine trains, beside a plain loop and the limit."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from gnbench import cli
from gnbench.config import CHOICES, ConfigError, check_integer, conf_dir, is_number
from gnbench.runs import directory as runs

if TYPE_CHECKING:  # imports torch: not for --help
    from collections.abc import Iterator

    from gnbench.bench.worker import Bookkeeping, Chain, Copying, Matmul

PLAIN = "plain"  # the contender that is no engine of gnbench
PAUSE = 0.05  # seconds between two contenders, for the threads of one to fall asleep
SETTLING = 5  # steps before a turn is timed: more than data workers can have made ready
QUICK = "--config-name=bench_quick"
# Keys of the hardware's rates; those of matrix products are the precisions.
COPY, CHAIN = "copy", "chain"


class ContenderError(RuntimeError):
    """A contender cannot be built or has failed; the message names it and says why."""


@dataclass(frozen=True)
class Case:
    """What every contender trains."""

    dataset: str
    model: str
    norm: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.dataset}, {self.model} {self.norm}, batch size {self.batch_size}"


@dataclass(frozen=True)
class Contender:
    """How it is trained: `PLAIN` or an engine, ``runs`` at a time that share the cores.

    ``compiled``: with torch.compile; ``replicas``: trainings in one process, side by side.
    """

    engine: str
    precision: str
    runs: int = 1
    compiled: bool = False
    replicas: int = 1

    def __str__(self) -> str:
        together = f" ×{self.runs}" if self.runs > 1 else ""
        packed = f" {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{self.way} {self.precision}{together}{packed}"

    @property
    def way(self) -> str:
        """What its engine calls itself."""
        return f"{self.engine}{' compiled' * self.compiled}"


class Player(Protocol):
    """Whoever takes turns, with work for so many trainings at a time."""

    trainings: int

    def settle(self) -> None:
        """Get ready for a turn."""
        ...

    def rate(self, count: int) -> float:
        """Do the work ``count`` times, in every training; return how often a second in all."""
        ...


class Team:
    """A contender at work: a process for each of its runs.

    Raises:
        ContenderError: here and in every method, if one of them fails.
    """

    def __init__(self, contender: Contender, command: tuple[str, ...], stack: ExitStack) -> None:
        from gnbench.bench.worker import serve

        self.contender = contender
        self.trainings = contender.runs * contender.replicas
        self.threads = max(1, cores() // contender.runs)
        self._connections: list[Connection] = []
        engine = None if contender.engine == PLAIN else contender.engine
        context = multiprocessing.get_context("spawn")
        with ExitStack() as own:  # if one cannot be built, the others end at once
            for _ in range(contender.runs):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=serve,
                    args=(theirs, engine, command, self.threads, contender.replicas, time.time()),
                )
                with _deaf():
                    process.start()
                theirs.close()
                own.callback(_end, process, ours)
                self._connections.append(ours)
            reports = [self._answer(connection) for connection in self._connections]
            stack.push(own.pop_all())
        self.startup_seconds = max(report.startup_seconds for report in reports)
        self.first_step_seconds = max(report.first_step_seconds for report in reports)
        self.device: str = reports[0].device
        self.memory: int | None = None  # peak in bytes, once it has been asked for
        self.bookkeeping: Bookkeeping | None = None  # of an engine, likewise
        self.kernels: float | None = None  # a step, of an engine on a GPU, likewise

    def ask(self, order: str, argument: object = None) -> list[Any]:
        """Give all processes the order at once and wait for what they answer."""
        for connection in self._connections:
            with suppress(OSError):  # of a process that died: the answer tells
                connection.send((order, argument))
        return [self._answer(connection) for connection in self._connections]

    def settle(self) -> None:
        """Use up what data workers made ready during the others' turns."""
        self.ask("take", SETTLING)

    def rate(self, count: int) -> float:
        """Take ``count`` steps in every training; return the steps per second of all together."""
        began = time.perf_counter()
        done = sum(self.ask("take", count))
        return float(done / (time.perf_counter() - began))

    def ask_for_costs(self) -> None:
        """Learn the peak memory of all runs, unknown on some systems, and their bookkeeping.

        Raises:
            ContenderError: if an engine has become another one than was to be timed.
        """
        peaks = self.ask("memory")
        self.memory = None if None in peaks else sum(peaks)
        if self.contender.engine != PLAIN:
            if others := set().union(*self.ask("engine_names")) - {self.contender.way}:
                raise ContenderError(f"{self.contender}: fell back to {others.pop()}")
            self.bookkeeping = max(self.ask("bookkeeping"), key=lambda found: found.epoch_seconds)
            self.kernels = self.ask("kernels")[0]

    def _answer(self, connection: Connection) -> Any:
        try:
            answer = connection.recv()
        except (EOFError, ConnectionError):
            raise ContenderError(f"{self.contender}: its process died") from None
        if getattr(answer, "error", None):
            raise ContenderError(f"{self.contender}: {answer.error}")
        return answer


class Hardware:
    """By what its limit is measured, in this process."""

    trainings = 1

    def __init__(self, work: Matmul | Copying | Chain) -> None:
        self._work = work

    def settle(self) -> None:
        """Need nothing."""

    def rate(self, count: int) -> float:
        """Do the work ``count`` times; return how often a second."""
        began = time.perf_counter()
        return self._work.take(count) / (time.perf_counter() - began)


@contextmanager
def _deaf() -> Iterator[None]:
    """Have what is started meanwhile be deaf to Ctrl-C, which this process then heeds."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: SpawnProcess, connection: Connection) -> None:
    """Hang up and have the process end, after the steps at hand or without them."""
    connection.close()
    process.join(3)
    process.kill()
    process.join()


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def contenders(config: DictConfig) -> list[Contender]:
    """Return who is timed, the plain loop in the first precision in front."""
    from gnbench.train.devices import choose_device
    from gnbench.train.engine import EagerEngine, GraphEngine

    engines = [EagerEngine.kind]
    if choose_device(config.device).type == "cuda":
        engines.append(GraphEngine.kind)
    return [
        *(Contender(PLAIN, precision) for precision in config.precisions),
        *(
            Contender(engine, precision, count, compiled, replicas)
            for engine in engines
            for compiled in config.compile
            for precision in config.precisions
            for count in config.runs
            for replicas in (config.replicas if engine == GraphEngine.kind else [1])
            if count == 1 or replicas == 1
        ),
    ]


def cases(config: DictConfig) -> list[Case]:
    """Return all combinations of datasets, models, norms and batch sizes."""
    axes = (config.datasets, config.models, config.norms, config.batch_sizes)
    return [Case(*values) for values in itertools.product(*axes)]


def overrides(case: Case, precision: str, config: DictConfig) -> tuple[str, ...]:
    """Return the command line of a run of ``case`` that does not end while it is timed."""
    return (
        f"dataset={case.dataset}",
        "dataset.augmentation=flip",
        f"model={case.model}",
        f"norm={case.norm}",
        f"batch_size={case.batch_size}",
        f"precision={precision}",
        f"device={config.device}",
        "epochs=1000000",
    )


def measure(
    case: Case, config: DictConfig, bar: tqdm[Any], left_out: list[str]
) -> tuple[dict[Contender, Team], dict[Any, list[float]]]:
    """Time every contender on ``case``; return them, and all rates round by round.

    All are built first and continue one training, that of the plain loop, so that none is spared
    what slows a training down as it goes on. Then they take turns, so that a machine that slows
    down slows all of them. Who fails at the start goes into ``left_out``.

    Raises:
        ContenderError: if the plain loop fails, or anyone once all have been built.
    """
    from gnbench.build import compose, draws_random_numbers
    from gnbench.train.engine import GraphEngine

    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        teams: dict[Contender, Team] = {}
        for contender in contenders(config):
            bar.set_postfix_str(f"starting {contender}")
            command = overrides(case, contender.precision, config)
            if contender.replicas > 1 and draws_random_numbers(compose(*command)):
                bar.total -= 1 + config.rounds  # those go one by one
                continue
            try:
                command += (f"compile={str(contender.compiled).lower()}",)
                teams[contender] = Team(contender, command, stack)
            except ContenderError as error:
                if not teams:
                    raise
                left_out.append(f"{case}: left out: {error}")
            bar.update()
        leader, *others = teams.values()
        bar.set_postfix_str(f"warming up with {leader.contender}")
        leader.ask("take", config.warmup_steps)
        state = str(Path(scratch, "state.pt"))
        leader.ask("save", state)
        for team in others:
            team.ask("load", state)
            if team.contender.engine == GraphEngine.kind:
                team.ask("pass_epoch_ends")
        bar.update()
        rates = take_turns({**teams, **_hardware(case, config)}, config, bar)
        for contender, team in list(teams.items()):
            try:
                team.ask_for_costs()
            except ContenderError as error:
                left_out.append(f"{case}: left out: {error}")
                del teams[contender], rates[contender]
    return teams, rates


def take_turns(
    players: Mapping[Any, Player], config: DictConfig, bar: tqdm[Any]
) -> dict[Any, list[float]]:
    """Give everyone a turn of about ``seconds`` in each of ``rounds``, in an order drawn anew.

    Returns how often a second each did its work, by round.
    """
    counts = {
        key: max(1, round(config.seconds * player.rate(SETTLING) / player.trainings))
        for key, player in players.items()
    }
    rates: dict[Any, list[float]] = {key: [] for key in players}
    draw = random.Random(0)
    for turn in range(config.rounds):
        for key in draw.sample(list(players), k=len(players)):
            bar.set_postfix_str(f"round {turn + 1} of {config.rounds}: {key}")
            time.sleep(PAUSE)
            players[key].settle()
            rates[key].append(players[key].rate(counts[key]))
            bar.update()
    return rates


def _hardware(case: Case, config: DictConfig) -> dict[str, Hardware]:
    """Return what takes its turns beside the contenders, so that the limit drifts as they do."""
    import torch

    from gnbench.bench.worker import Chain, Copying, Matmul
    from gnbench.build import compose
    from gnbench.train.cuda_graphs import recorder
    from gnbench.train.devices import choose_device

    torch.set_num_threads(cores())
    composed = {p: compose(*overrides(case, p, config)) for p in config.precisions}
    found = {precision: Hardware(Matmul(c)) for precision, c in composed.items()}
    found[COPY] = Hardware(Copying(composed[config.precisions[0]]))
    device = choose_device(config.device)
    if graphs := recorder(device):
        found[CHAIN] = Hardware(Chain(graphs, device))
    return found


def compare(
    case: Case,
    teams: Mapping[Contender, Any],
    rates: Mapping[Any, Sequence[float]],
    flops: float,
    pause: float,
) -> list[dict[str, Any]]:
    """Return a row for every contender; ratios are medians of those of the rounds.

    ``flops`` are those of a step, ``pause`` the seconds between two checkpoints. The limit is the
    longest of three times: for as many FLOPs in a product of large matrices; for one copy of the
    weights and Adam's moments; and, where steps are replayed as graphs, for as many kernels, the
    fewest that an engine needs for a step of this precision, each doing nothing but wait for the
    one before (replicas wait side by side).
    """
    from gnbench.bench.worker import LINKS, MATMUL_FLOPS

    rows = []
    plain = rates[next(iter(teams))]
    for contender, team in teams.items():
        own, matmuls = rates[contender], rates[contender.precision]
        needed = [t.kernels for c, t in teams.items() if c.precision == contender.precision]
        kernels = min((count for count in needed if count), default=0.0)
        chains = rates.get(CHAIN) or [math.inf] * len(own)
        limits = [
            max(
                flops / (matmul * MATMUL_FLOPS),
                1 / copy,
                kernels / (chain * LINKS) / contender.replicas,
            )
            for matmul, copy, chain in zip(matmuls, rates[COPY], chains, strict=True)
        ]
        ratios = [one / other for one, other in zip(own, plain, strict=True)]
        rows.append(
            {
                **asdict(case),
                **asdict(contender),
                "threads": team.threads,
                "images_per_second": case.batch_size * median(own),
                "ms_per_step": 1000 / median(own),
                "speedup": median(ratios),
                "speedup_min": min(ratios),
                "speedup_max": max(ratios),
                "limit_ms_per_step": 1000 * median(limits),
                "limit_fraction": median(a * b for a, b in zip(own, limits, strict=True)),
                "kernels_per_step": team.kernels,
                "overhead": team.bookkeeping
                and team.bookkeeping.share(median(own) / contender.runs, pause, contender.replicas),
                "peak_memory_bytes": team.memory,
                "startup_seconds": team.startup_seconds,
                "first_step_seconds": team.first_step_seconds,
            }
        )
    return rows


def table(case: Case, rows: Sequence[Mapping[str, Any]]) -> str:
    """Put the rows of a case into words."""
    lines = [
        "",
        str(case),
        f"  {'':<24}{'threads':>7}{'images/s':>10}{'ms/step':>9}{'× plain':>9}{'(range)':>14}"
        f"{'of limit':>10}{'overhead':>10}{'memory':>12}{'start':>8}{'1st step':>10}",
    ]
    for row in rows:
        name = str(Contender(**{field.name: row[field.name] for field in fields(Contender)}))
        overhead = "–" if row["overhead"] is None else f"{row['overhead']:.1%}"
        peak = row["peak_memory_bytes"]
        memory = "–" if peak is None else f"{peak / 2**20:,.0f} MiB"
        spread = f"({row['speedup_min']:.2f}–{row['speedup_max']:.2f})"
        lines.append(
            f"  {name:<24}{row['threads']:>7}{row['images_per_second']:>10,.0f}"
            f"{row['ms_per_step']:>9.2f}{row['speedup']:>9.2f}{spread:>14}"
            f"{row['limit_fraction']:>10.0%}{overhead:>10}{memory:>12}"
            f"{row['startup_seconds']:>6.1f} s{row['first_step_seconds']:>8.1f} s"
        )
    return "\n".join(lines)


def check(config: DictConfig) -> None:
    """Raise `ConfigError` for a setting that cannot work, before anything is started."""
    from gnbench.build import compose
    from gnbench.train.cuda_graphs import MOST_BRANCHES

    cases_of = ("datasets", "models", "norms", "batch_sizes")
    for key in (*cases_of, "precisions", "runs", "replicas", "compile"):
        values = list(config[key])
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key}={values}: name at least one, and none twice")
    for precision in config.precisions:
        if precision not in CHOICES["precision"]:
            choices = ", ".join(CHOICES["precision"])
            raise ConfigError(f"precisions={precision}: choose from {choices}")
    check_integer("rounds", config.rounds, least=1)
    check_integer("warmup_steps", config.warmup_steps, least=1)
    for count in config.runs:
        check_integer("runs", count, least=1)
    for count in config.replicas:
        check_integer("replicas", count, least=1, most=MOST_BRANCHES)
    if not is_number(config.seconds) or config.seconds <= 0:
        raise ConfigError(f"seconds={config.seconds}: must be a number over 0")
    if not config.outputs:
        raise ConfigError("outputs='' is not a folder: choose one, e.g. outputs=outputs/bench")
    for case in cases(config):
        compose(*overrides(case, config.precisions[0], config))


def bench(config: DictConfig, command: str) -> bool:
    """Time all cases; print a table, write CSV, JSON and figure; return whether none failed.

    The files are written after every case, so that an interruption costs only the case under way.

    Raises:
        ConfigError: for a setting that cannot work, before anything is started or written.
        DataError: if a dataset is not to be had, likewise.
        WriteError: if the results cannot be written.
    """
    check(config)
    cli.composed()
    from gnbench.bench.worker import count_flops
    from gnbench.build import compose, load_dataset
    from gnbench.train.devices import choose_device

    for name in config.datasets:
        load_dataset(compose(f"dataset={name}"))  # downloaded now, not by several at once
    folder = Path(config.outputs)
    with runs.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command,
        "started": runs.now(),
        "versions": runs.versions(),
        "platform": platform.platform(),
        "cores": cores(),
    }
    rows: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    failures: list[str] = []
    hardware = len(config.precisions) + (2 if choose_device(config.device).type == "cuda" else 1)
    turns = config.rounds * (len(contenders(config)) + hardware)
    with tqdm(
        total=len(cases(config)) * (len(contenders(config)) + 1 + turns),
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}",
    ) as bar:
        for number, case in enumerate(cases(config), 1):
            bar.set_description_str(f"{case} ({number}/{len(cases(config))})")
            known = len(failures)
            try:
                teams, rates = measure(case, config, bar, failures)
            except ContenderError as error:
                failures.append(f"{case}: {error}")
            else:
                about["device"] = next(iter(teams.values())).device
                composed = compose(*overrides(case, config.precisions[0], config))
                pause = composed.checkpoint_seconds
                found = compare(case, teams, rates, count_flops(composed), pause)
                with bar.external_write_mode(file=sys.stdout):
                    print(table(case, found), flush=True)
                rows += found
                raw += [
                    {**asdict(case), "who": str(key), "round": turn, "per_second": rate}
                    for key, values in rates.items()
                    for turn, rate in enumerate(values, 1)
                ]
                _write(folder, rows, raw, about)
            for failure in failures[known:]:
                bar.write(f"gnbench: {failure}", file=sys.stderr)
    if rows:
        print(f"\n{about['device']}, {about['cores']} cores; written to {folder}")
    return not failures


def _write(
    folder: Path, rows: list[dict[str, Any]], raw: list[dict[str, Any]], about: dict[str, Any]
) -> None:
    import pandas as pd  # not for --help

    from gnbench.aggregate import figure

    tables = {"bench.csv": rows, "bench_rounds.csv": raw}
    for name, entries in tables.items():
        runs.replace(folder / name, pd.DataFrame(entries).to_csv(index=False).encode())
    runs.replace(folder / "bench.json", (json.dumps(about, indent=1) + "\n").encode())
    drawn = figure.draw_speed(pd.DataFrame(rows), str(about["device"]))
    for suffix in ("png", "svg"):
        path = folder / f"bench.{suffix}"
        with runs.explained(path):
            figure.save(drawn, path)


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
    """Run the command line. Exit codes: 0 done, 1 something failed, 2 bad input, 130 interrupted.

    ``--quick`` takes the settings of ``conf/bench_quick.yaml``.
    """
    sys.argv[1:] = [QUICK if argument == "--quick" else argument for argument in sys.argv[1:]]
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
