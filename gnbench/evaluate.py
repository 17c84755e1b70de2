"""``python -m gnbench.evaluate``: the test error of finished weights under other statistics."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import hydra
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from pydantic import Field
from tabulate import tabulate
from tqdm import tqdm

from gnbench import cli, files
from gnbench.config import Count, DataFolder, Device, Folder, RunConfig, Settings, Study, conf_dir
from gnbench.errors import DONE, FAILED, ConfigError, LockedError, WriteError, one_line
from gnbench.runs.directory import RunDirectory, read_record
from gnbench.sweep.plan import find_studies

if TYPE_CHECKING:  # torch is not for --help
    import pandas as pd
    import torch

    from gnbench.datasets import Dataset

Statistics = Literal["ema", "precise", "population", "batch", "evalnorm"]
TABLE = "evaluations.csv"
NO_WEIGHTS, FAILED_RUNS = "no model.pt", "cannot be evaluated"
RUN = ("run_id", "dataset", "model", "norm", "batch_size", "seed", "weights", "trained_images")
COLUMNS = (*RUN, "statistics", "images", "test_error", "test_wrong", "test_total")
Row = dict[str, Any]


class EvaluateConfig(Settings):
    """What ``conf/evaluate.yaml`` holds."""

    outputs: Folder
    study: Study | None
    statistics: Annotated[list[Statistics], Field(min_length=1)]
    images: list[Count]
    device: Device
    root: DataFolder
    pictures: DataFolder | None


def evaluate(config: EvaluateConfig) -> bool:
    """Evaluate the finished runs of one study, or of all; tell whether none failed.

    A run that fails is named in the end, and the others go on.

    Raises:
        ConfigError: before anything is evaluated.
        LockedError: if another process is evaluating one of the studies, likewise.
        WriteError: if a table cannot be written.
    """
    from gnbench.train import devices

    studies = find_studies(config.outputs, config.study)
    tables = {study: _read(study / TABLE) for study in studies}
    failed = False
    with ExitStack() as stack:
        for study in studies:
            try:
                stack.enter_context(FileLock(study / ".evaluations.lock").acquire(timeout=0))
            except Timeout:
                raise LockedError(f"{study}: another process is evaluating it") from None
        device = stack.enter_context(devices.claimed(config.device))
        devices.flush_denormals()
        for study, rows in tables.items():
            failed |= _evaluate_study(config, study, rows, device)
    return not failed


def _evaluate_study(
    config: EvaluateConfig, study: Path, rows: list[Row], device: torch.device
) -> bool:
    """Evaluate the runs of a study, what ``rows`` has not again; tell whether one failed."""
    left_out: dict[str, list[str]] = {}  # by the reason
    datasets: dict[str, Dataset] = {}
    paths = sorted(study.glob("*/run.json"))
    for path in tqdm(paths, study.name, unit="run", disable=None, leave=False):
        try:
            for reason in _evaluate_run(config, path, rows, datasets, device):
                left_out.setdefault(reason, []).append(path.parent.name)
        except FileNotFoundError:
            left_out.setdefault(NO_WEIGHTS, []).append(path.parent.name)
        except WriteError:
            raise
        except Exception as error:  # of a damaged file, or a part of the user's own
            line = f"{path.parent.name}: {one_line(error)}"
            left_out.setdefault(FAILED_RUNS, []).append(line)
    print(_described(study, rows))
    for reason, names in left_out.items():
        print("\n  ".join([f"{reason}:", *names]))
    return FAILED_RUNS in left_out


def _evaluate_run(
    config: EvaluateConfig,
    path: Path,
    rows: list[Row],
    datasets: dict[str, Dataset],
    device: torch.device,
) -> Iterator[str]:
    """Evaluate the run of a ``run.json``, adding to ``rows``; yield what is to be said of it."""
    import torch

    from gnbench.build import build_model, make_deterministic
    from gnbench.datasets import normalization
    from gnbench.train.batch_statistics import batch_norms, evaluated, trained_images
    from gnbench.train.batches import ResidentData
    from gnbench.train.layout import place

    record = read_record(path)
    if record["status"] != "completed":
        yield "not completed"
        return
    run = RunConfig.parse(record["config"])
    run_dir = RunDirectory(path.parent)
    weights = run_dir.model_path.read_bytes()
    model = build_model(run)
    model.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    if not batch_norms(model):
        name = run.norm.name
        yield f"norm={name}: other statistics are defined for batch norm: nothing to evaluate"
        return
    if device.type == "cuda":
        make_deterministic(run.precision)
    channels_last = place(model.eval(), device)
    names = (run.dataset.name, run.model.name, run.norm.name, run.batch_size, run.seed)
    digest = hashlib.sha256(weights).hexdigest()[:8]
    own = trained_images(run, model)
    cell = dict(zip(RUN, (run.run_id, *names, digest, own), strict=True))
    rows[:] = [r for r in rows if r["run_id"] != run.run_id or r["weights"] == cell["weights"]]
    done = {(r["statistics"], r["images"]) for r in rows if r["run_id"] == run.run_id}
    wanted, too_many = _wanted(config, run, own)
    if too_many:
        yield f"there are not so many images: {', '.join(map(str, too_many))}"
    wanted = {
        images: missing
        for images, names in wanted.items()
        if (missing := [n for n in names if (n, _text(images)) not in done])
    }
    if not wanted:
        return
    dataset = _dataset(config, run, datasets)
    mean, std = normalization(dataset, run.dataset)
    how = (mean, std, device, channels_last)
    train = ResidentData(dataset.train_images, dataset.train_labels, *how)
    test = ResidentData(dataset.test_images, dataset.test_labels, *how)
    for name, images, wrong in evaluated(run, model, train, test, wanted):
        error = 100 * wrong / len(test)
        row = {"statistics": name, "images": _text(images), "test_error": error}
        rows.append({**cell, **row, "test_wrong": wrong, "test_total": len(test)})
        files.replace(path.parents[1] / TABLE, _csv(rows))
        over = "" if images is None else f" over {images} images"
        tqdm.write(f"{run.run_id}: {name}{over}: test error {error:.2f} %")
        last = _last_wrong(run_dir)
        if name == "ema" and last is not None and wrong != last:
            yield f"ema: {wrong} wrong here, {last} when it was trained (elsewhere?)"


def _wanted(
    config: EvaluateConfig, run: RunConfig, own: int
) -> tuple[dict[int | None, list[str]], list[int]]:
    """Return the statistics to evaluate by the number of images, and numbers that are too large."""
    most = min(run.dataset.images, run.dataset.test_images)
    counts = sorted({own, *config.images})
    others: list[str] = [name for name in dict.fromkeys(config.statistics) if name != "ema"]
    wanted: dict[int | None, list[str]] = {}
    if "ema" in config.statistics:
        wanted[None] = ["ema"]
    if others:
        wanted |= {count: others for count in counts if count <= most}
    return wanted, [count for count in counts if count > most]


def _dataset(config: EvaluateConfig, run: RunConfig, known: dict[str, Dataset]) -> Dataset:
    """Load the dataset of a run from where datasets are cached here, once.

    Raises:
        ConfigError: if the pictures of a folder are not where they were.
    """
    from gnbench.build import load_dataset

    settings = run.plain()
    changed: dict[str, Any] = {"order": "shuffled", "block": None}  # which do not matter to it
    if run.dataset.cache is not None:  # the root is the user's own
        root = config.pictures or run.dataset.root
        if root is None or not Path(root).is_dir():
            raise ConfigError(f"its pictures are not in {root}: say where, with pictures=DIR")
        changed |= {"root": root, "cache": config.root}
    elif run.dataset.root is not None:
        changed |= {"root": config.root}
    settings["dataset"] = {**settings["dataset"], **changed}
    here = RunConfig.parse(settings)
    key = repr(here.dataset)
    if key not in known:
        known[key] = load_dataset(here)
    return known[key]


def _last_wrong(run_dir: RunDirectory) -> int | None:
    rows = run_dir.rows()
    wrong = rows[-1]["test_wrong"] if rows else math.nan
    return None if math.isnan(wrong) else int(wrong)


def _text(images: int | None) -> str:
    return "" if images is None else str(images)


def _read(path: Path) -> list[Row]:
    """Return the rows of an earlier ``evaluations.csv``, if there is one.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() for row in rows):
        raise ConfigError(f"{path} is not a table of gnbench.evaluate: move it away")
    return rows


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _described(study: Path, rows: list[Row]) -> str:
    """Put the rows into tables, one a network: means over seeds, a line a norm and batch size.

    All but ``batch`` as taken over the images of the training; ``evaluations.csv`` has the rest.
    """
    import pandas as pd

    from gnbench.aggregate.study import read_study

    runs = read_study(study).finished
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"images": str})
    own = table["images"] == table["trained_images"].astype(str)
    table = table[own | table["statistics"].isin(["ema", "batch"])]
    table["column"] = table["statistics"].where(
        table["statistics"] != "batch", "batch " + table["images"]
    )
    table["test_error"] = table["test_error"].astype(float)
    of_network = table.groupby(["dataset", "model"], sort=False)
    parts = [f"study {study.name}: test error in %, mean over seeds"]
    for names, found in of_network:
        if len(of_network) > 1:
            parts.append(" ".join(map(str, names)))
        parts.append(_table(found, runs[runs["run_id"].isin(found["run_id"])]))
    return "\n".join(parts)


def _table(rows: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Put the rows of a network into a table; its lines are told apart by what differs."""
    from gnbench.aggregate.figure import line_label, sort_lines
    from gnbench.aggregate.statistics import differing

    settings = differing(runs)
    told_apart = runs[["run_id", "norm", "batch_size", *settings]]
    table = sort_lines(told_apart.merge(rows[["run_id", "column", "test_error"]]), settings)
    found = set(table["column"])
    columns = [name for name in ("ema", "precise", "population", "evalnorm") if name in found]
    columns += sorted(found - {*columns}, key=lambda name: int(name.partition(" ")[2]))
    lines = []
    keys = ["norm", *settings, "batch_size"]
    for _, own in table.groupby(keys, dropna=False, sort=False):
        means = own.groupby("column")["test_error"].mean()
        first = own.iloc[0]
        errors = [f"{means[name]:.2f}" if name in means else "–" for name in columns]
        seeds = own["run_id"].nunique()
        lines.append([line_label(first, settings), first["batch_size"], seeds, *errors])
    return tabulate(lines, ["", "batch size", "seeds", *columns], "plain", disable_numparse=True)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="evaluate")
def app(config: DictConfig) -> None:
    """Evaluate as ``conf/evaluate.yaml`` says."""
    try:
        settings = EvaluateConfig.parse(config)
        find_studies(settings.outputs, settings.study)
        cli.composed()
        succeeded = evaluate(settings)
    except Exception as error:
        raise SystemExit(cli.report(error)) from error
    raise SystemExit(DONE if succeeded else FAILED)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 3 another is at work."""
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
