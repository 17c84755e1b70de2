"""``python -m gnbench.bench``: how fast each engine trains, beside a plain loop and the limit."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import AfterValidator
from tqdm import tqdm

from gnbench import cli, files
from gnbench.bench.compare import (
    DETERMINISTIC,
    FLUSHED,
    PLAIN,
    Candidate,
    CandidateError,
    compare,
    table,
    take_turns,
)
from gnbench.config import (
    Count,
    Device,
    Folder,
    Positive,
    Precision,
    RunConfig,
    Settings,
    conf_dir,
)
from gnbench.errors import FAILED, ConfigError
from gnbench.runs.directory import now, versions

if TYPE_CHECKING:
    import torch

QUICK = "--config-name=bench_quick"
CASE = ("dataset", "model", "norm", "batch_size")  # what all candidates train
T = TypeVar("T")


def _each_once(values: list[T]) -> list[T]:
    if not values or len(set(values)) < len(values):
        raise ValueError("name at least one, and none twice")
    return values


Chosen = Annotated[list[T], AfterValidator(_each_once)]


class BenchConfig(Settings):
    """What is timed, and how (``conf/bench.yaml``)."""

    datasets: Chosen[str]
    models: Chosen[str]
    norms: Chosen[str]
    batch_sizes: Chosen[Count]
    precisions: Chosen[Precision]
    runs: Chosen[Count]
    replicas: Chosen[Count]
    compile: Chosen[bool]
    device: Device
    warmup_steps: Count
    rounds: Count
    seconds: Positive
    outputs: Folder


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def candidates(config: BenchConfig, on_gpu: bool) -> list[Candidate]:
    """Return who is timed, the plain loop in front."""
    plain = [PLAIN, DETERMINISTIC if on_gpu else FLUSHED]
    return [
        *(Candidate(engine, precision) for engine in plain for precision in config.precisions),
        *(
            Candidate(engine, precision, runs, compiled, replicas)
            for engine in (["eager", "graph"] if on_gpu else ["eager"])
            for compiled in config.compile
            for precision in config.precisions
            for runs in config.runs
            for replicas in (config.replicas if engine == "graph" else [1])
            if runs == 1 or replicas == 1
        ),
    ]


def check(
    config: BenchConfig, folders: Sequence[str] = ()
) -> tuple[dict[tuple[Any, ...], RunConfig], list[Candidate]]:
    """Return what is trained, by the values of `CASE`, and by whom.

    ``folders`` hold YAML files of one's own. Of several precisions those are left out that the
    device has not.

    Raises:
        ConfigError: for a setting that cannot work, before anything is started.
    """
    from gnbench.check import compose
    from gnbench.train.devices import choose_device, has_native_bf16, has_tf32
    from gnbench.train.replicas import MOST_REPLICAS

    device = choose_device(config.device)
    if max(config.replicas) > MOST_REPLICAS:
        raise ConfigError(f"replicas={config.replicas}: at most {MOST_REPLICAS} go side by side")
    has: dict[str, Callable[[torch.device], bool]] = {"tf32": has_tf32, "bf16": has_native_bf16}
    optional = [name for name in config.precisions if name in has and len(config.precisions) > 1]
    lacking = [name for name in optional if not has[name](device)]
    if lacking:
        able = [name for name in config.precisions if name not in lacking]
        config = config.model_copy(update={"precisions": able or ["fp32"]})
    cases = {}
    axes = (config.datasets, config.models, config.norms, config.batch_sizes)
    for case in itertools.product(*axes):
        cases[case] = compose(
            *(f"{key}={value}" for key, value in zip(CASE, case, strict=True)),
            "dataset.augmentation=flip",
            f"precision={config.precisions[0]}",
            f"device={config.device}",
            "epochs=1000000",  # it does not end while it is timed
            config_dirs=folders,
        )
    if lacking:
        lacks = f"left out: the {device.type} of this machine does not compute so by itself"
        print(f"gnbench: {' and '.join(lacking)} {lacks}", file=sys.stderr)
    return cases, candidates(config, device.type == "cuda")


@dataclass(frozen=True)
class Measured:
    """What is known of each candidate, all rates, the kernels of a step, who failed and why."""

    facts: dict[Candidate, dict[str, Any]]
    rates: dict[Any, list[float]]
    kernels: list[dict[str, Any]]
    failures: list[str]


def measure(
    run: RunConfig, everyone: Sequence[Candidate], config: BenchConfig, say: Callable[[str], object]
) -> Measured:
    """Time everyone on a run.

    All continue one training, that of the plain loop, so that none is spared what slows a training
    down as it goes on. Once all have been built they take turns.

    Raises:
        CandidateError: if a plain loop fails, or anyone once all have been built.
    """
    from gnbench.bench import limit, worker
    from gnbench.build import draws_random_numbers

    team: dict[Candidate, worker.Processes] = {}
    failures: list[str] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        stack.callback(lambda: worker.end(team.values()))
        state = Path(scratch, "state.pt")
        for candidate in everyone:
            if candidate.replicas > 1 and draws_random_numbers(run):
                continue  # such replicas go one by one
            threads = max(1, cores() // candidate.runs)
            say(f"starting {candidate}")
            try:
                team[candidate] = worker.Processes(candidate, run, threads, state if team else None)
            except CandidateError as error:
                if candidate.is_plain:
                    raise
                failures.append(str(error))
            if len(team) == 1 and not state.exists():
                say(f"warming up with {candidate}")
                team[candidate].call(worker.warm_up, config.warmup_steps, state)
        players: dict[Any, Callable[[float], float]] = {key: team[key].turn for key in team}
        players |= limit.hardware(run, list({key.precision: key for key in team}))
        rates = take_turns(players, config.rounds, config.seconds, say)
        answers = {key: team[key].call(worker.facts)[0] for key in team}
        facts = {key: known for key, (known, _) in answers.items()}
        kernels = [{"who": str(key)} | one for key, (_, all_) in answers.items() for one in all_]
    return Measured(facts, rates, kernels, failures)


def bench(config: BenchConfig, command: str, folders: Sequence[str] = ()) -> bool:
    """Time all cases; print a table, write CSV, JSON and figure; return whether none failed.

    The files are written after every case, so that an interruption costs only the case under way.

    Raises:
        ConfigError: for a setting that cannot work, before anything is started or written.
        DataError: if a dataset is not to be had, likewise.
        WriteError: if the results cannot be written.
    """
    cases, everyone = check(config, folders)
    cli.composed()
    import torch

    from gnbench.bench.limit import count_bytes, count_flops
    from gnbench.build import load_dataset
    from gnbench.train.devices import choose_device, describe_device

    for run in {case[0]: run for case, run in cases.items()}.values():
        load_dataset(run)  # downloaded now, not by several at once
    folder = Path(config.outputs)
    files.make_folder(folder)
    torch.set_num_threads(cores())
    device = describe_device(choose_device(config.device))
    about = {
        "command": command,
        "started": now(),
        "versions": versions(),
        "cores": cores(),
        "device": device,
    }
    rows: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    failed = False
    with tqdm(total=len(cases), disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for values, run in cases.items():
            case = dict(zip(CASE, values, strict=True))
            title = "{dataset}, {model} {norm}, batch size {batch_size}".format(**case)
            bar.set_description_str(title)
            try:
                of_case = measure(run, everyone, config, bar.set_postfix_str)
                failures = of_case.failures
            except CandidateError as error:
                failures = [str(error)]
            else:
                rates = of_case.rates
                moved, copied = count_bytes(run)
                found = compare(
                    run.batch_size, of_case.facts, rates, count_flops(run), moved / copied
                )
                with bar.external_write_mode(file=sys.stdout):
                    print(f"\n{title}\n{table(found)}", flush=True)
                rows += [{**case, **row} for row in found]
                raw += [
                    {**case, "who": str(key), "round": number, "per_second": rate}
                    for key, values in rates.items()
                    for number, rate in enumerate(values, 1)
                ]
                kernels += [{**case, **one} for one in of_case.kernels]
                _write(folder, rows, raw, kernels, about)
            for failure in failures:
                failed = True
                bar.write(f"gnbench: {title}: left out: {failure}", file=sys.stderr)
            bar.update()
    if rows:
        print(f"\n{device}, {cores()} cores; written to {folder}")
    return not failed


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    raw: list[dict[str, Any]],
    kernels: list[dict[str, Any]],
    about: dict[str, Any],
) -> None:
    import pandas as pd  # not for --help

    from gnbench.aggregate.figure import save
    from gnbench.bench.figure import draw_speed

    tables = {"bench.csv": rows, "bench_rounds.csv": raw}
    if kernels:  # on a GPU
        tables["bench_kernels.csv"] = kernels
    else:
        (folder / "bench_kernels.csv").unlink(missing_ok=True)  # of another time
    for name, entries in tables.items():
        files.replace(folder / name, pd.DataFrame(entries).to_csv(index=False).encode())
    files.replace(folder / "bench.json", (json.dumps(about, indent=1) + "\n").encode())
    drawn = draw_speed(pd.DataFrame(rows), about["device"])
    for suffix in ("png", "svg"):
        save(drawn, folder / f"bench.{suffix}")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="bench")
def app(config: DictConfig) -> None:
    """Measure what ``conf/bench.yaml`` says."""
    hydra_config = HydraConfig.get()
    quick = ["--quick"] * (hydra_config.job.config_name == QUICK.partition("=")[2])
    command = ["python -m gnbench.bench", *quick, *hydra_config.overrides.task]
    try:
        from gnbench.check import config_dirs  # imports torch: not for --help

        whole = bench(BenchConfig.parse(config), " ".join(command), config_dirs())
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    if not whole:
        raise SystemExit(FAILED)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 something failed, 2 bad input, 130 interrupted.

    ``--quick`` takes the settings of ``conf/bench_quick.yaml``.
    """
    sys.argv[1:] = [QUICK if argument == "--quick" else argument for argument in sys.argv[1:]]
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
