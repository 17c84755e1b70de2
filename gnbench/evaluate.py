"""``python -m gnbench.evaluate``: the test error of finished weights under other statistics."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from pydantic import Field
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from gnbench import build, cli, files
from gnbench.config import Count, DataFolder, Device, Folder, RunConfig, Settings, Study, conf_dir
from gnbench.datasets import Dataset
from gnbench.errors import DONE, FAILED, ConfigError, LockedError, WriteError, one_line
from gnbench.norms import BatchGroupNorm, SyncBatchNorm
from gnbench.runs.directory import RunDirectory, read_record
from gnbench.sweep.plan import find_studies
from gnbench.train import devices
from gnbench.train.batches import ResidentData, draw_epoch
from gnbench.train.engine import EVALUATION_CHUNK, autocast, find_correct

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


@dataclass(frozen=True)
class Moments:
    """What a batch norm saw of the training set, per channel (float32).

    ``variance`` is the mean of the variances of the batches, each with n − 1 as the running one;
    ``population`` the variance of all their values together.
    """

    mean: Tensor
    variance: Tensor
    population: Tensor


class OfBatches(nn.Module):
    """A batch norm by the statistics of every ``images`` images, in any mode; it adds them up."""

    def __init__(self, bn: nn.BatchNorm2d, images: int) -> None:
        super().__init__()
        self.bn = bn
        self.images = images
        self.batches = 0
        self.means: Tensor | float = 0.0  # summed over the batches, in float64
        self.variances: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each chunk of ``x`` (N,C,H,W) by itself."""
        return torch.cat([self._normalized(chunk) for chunk in torch.split(x, self.images)])

    def _normalized(self, x: Tensor) -> Tensor:
        mean, variance = torch.zeros_like(x[0, :, 0, 0]), torch.ones_like(x[0, :, 0, 0])
        if x.dtype != torch.float32:  # autocast: torch keeps statistics in float32
            mean, variance = mean.float(), variance.float()
        bn = self.bn
        # With momentum 1 the "running" statistics are those of this batch.
        output = F.batch_norm(x, mean, variance, bn.weight, bn.bias, True, 1.0, bn.eps)
        count = x.numel() // x.shape[1]
        mean, variance = mean.double(), variance.double()
        self.batches += 1
        self.means = self.means + mean
        self.variances = self.variances + variance
        self.squares = self.squares + mean.square() + variance * ((count - 1) / count)
        return output

    def moments(self) -> Moments:
        """Return the averages over all batches so far."""
        mean, variance, square = (
            torch.as_tensor(total) / self.batches
            for total in (self.means, self.variances, self.squares)
        )
        population = square - mean.square()
        return Moments(mean.float(), variance.float(), population.float())


class EvalNorm(nn.Module):
    """A batch norm that weighs an image at inference as it was in training: as one of ``images``.

    Singh & Shrivastava 2019; Summers & Dinneen 2020, on the weight of the example at inference.
    With α = 1/images, and m and v of the image itself, mean (1−α)μ + αm and variance
    (1−α)σ² + αv + α(1−α)(m−μ)².
    """

    def __init__(self, bn: nn.BatchNorm2d, moments: Moments, images: int) -> None:
        super().__init__()
        self.bn = bn
        self.share = 1 / images
        self.mean = moments.mean[:, None, None]
        self.variance = moments.population[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each image of ``x`` (N,C,H,W)."""
        a, bn = self.share, self.bn
        v, m = torch.var_mean(x.float(), (2, 3), correction=0, keepdim=True)
        mean = (1 - a) * self.mean + a * m
        variance = (1 - a) * self.variance + a * v + a * (1 - a) * (m - self.mean).square()
        normalized = (x - mean) * torch.rsqrt(variance + bn.eps)
        if bn.affine:
            normalized = normalized * bn.weight[:, None, None] + bn.bias[:, None, None]
        return normalized.to(x.dtype)


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Return the layers of ``model`` that have running statistics of batches, by their names."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None
    }


def replaced(model: nn.Module, make: Callable[[str, nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """Return a copy of ``model`` in eval mode with other layers in place of its batch norms."""
    model = copy.deepcopy(model).eval()
    for name, layer in batch_norms(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, layer))
    return model.eval()


@torch.inference_mode()
def training_moments(
    model: nn.Module, data: ResidentData, config: RunConfig, images: int
) -> dict[str, Moments]:
    """Run an epoch's images through ``model`` by the statistics of batches; return what each saw.

    Their order and augmentation are those of an epoch by the number ``epochs``. A last, smaller
    batch is left out. (fvcore's precise BN averages in the same way.)
    """
    plan = draw_epoch(config.seed, config.epochs, len(data), config.dataset.augmentation)
    plan = plan.to(data.labels.device)
    network = replaced(model, lambda _, bn: OfBatches(bn, images))
    whole = len(data) // images * images
    step = _chunk(images)
    for start in range(0, whole, step):
        inputs, _ = data.batch(plan, slice(start, min(start + step, whole)))
        with autocast(config.precision, inputs.device):
            network(inputs)
    layers = {name: network.get_submodule(name) for name in batch_norms(model)}
    return {name: layer.moments() for name, layer in layers.items() if isinstance(layer, OfBatches)}


def with_moments(
    model: nn.Module, moments: Mapping[str, Moments], population: bool = False
) -> nn.Module:
    """Return a copy of ``model`` whose running statistics are ``moments``."""
    model = copy.deepcopy(model).eval()
    for name, layer in batch_norms(model).items():
        own = moments[name]
        layer.running_mean = own.mean
        layer.running_var = own.population if population else own.variance
    return model


def evaluated(
    config: RunConfig,
    model: nn.Module,
    train: ResidentData,
    test: ResidentData,
    wanted: Mapping[int | None, list[str]],
) -> Iterator[tuple[str, int | None, int]]:
    """Yield statistics, images and the number of wrong test images for all that is ``wanted``.

    ``wanted`` names statistics by the number of images over which they are taken, None for ema.
    Batches of test images are drawn from all of them, in an order that follows from the seed.
    """

    def wrong(network: nn.Module, chunk: int = EVALUATION_CHUNK, shuffled: bool = False) -> int:
        data = test
        if shuffled:
            order = draw_epoch(config.seed, 0, len(test), "none").order
            data = test.reordered(order.to(test.labels.device))
        return int((~find_correct(network, data, config.precision, chunk)).sum())

    for images, statistics in wanted.items():
        if images is None:
            yield "ema", None, wrong(model)
            continue
        if set(statistics) & {"precise", "population", "evalnorm"}:
            moments = training_moments(model, train, config, images)
        networks: dict[str, Callable[[], nn.Module]] = {
            "precise": lambda: with_moments(model, moments),  # noqa: B023  (called at once)
            "population": lambda: with_moments(model, moments, population=True),  # noqa: B023
            "batch": lambda: replaced(model, lambda _, bn: OfBatches(bn, images)),  # noqa: B023
            "evalnorm": lambda: replaced(
                model,
                lambda name, bn: EvalNorm(bn, moments[name], images),  # noqa: B023
            ),
        }
        for name in statistics:
            batch = name == "batch"
            chunk = _chunk(images) if batch else EVALUATION_CHUNK
            yield name, images, wrong(networks[name](), chunk, batch)


def evaluate(config: EvaluateConfig) -> bool:
    """Evaluate the finished runs of one study, or of all; tell whether none failed.

    A run that fails is named in the end, and the others go on.

    Raises:
        ConfigError: before anything is evaluated.
        LockedError: if another process is evaluating one of the studies, likewise.
        WriteError: if a table cannot be written.
    """
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
        if device.type == "cuda":
            build.make_deterministic()
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
    record = read_record(path)
    if record["status"] != "completed":
        yield "not completed"
        return
    run = RunConfig.parse(record["config"])
    run_dir = RunDirectory(path.parent)
    weights = run_dir.model_path.read_bytes()
    model = build.build_model(run)
    model.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    if not batch_norms(model):
        yield f"norm={run.norm.name} has no statistics of batches: nothing to evaluate"
        return
    model = model.to(device).eval()
    names = (run.dataset.name, run.model.name, run.norm.name, run.batch_size, run.seed)
    digest = hashlib.sha256(weights).hexdigest()[:8]
    own = trained_images(run, model)
    cell = dict(zip(RUN, (run.run_id, *names, digest, own), strict=True))
    rows[:] = [r for r in rows if r["run_id"] != run.run_id or r["weights"] == cell["weights"]]
    done = {(r["statistics"], r["images"]) for r in rows if r["run_id"] == run.run_id}
    wanted, too_many = _wanted(config, run, model)
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
    mean, std = run.dataset.mean, run.dataset.std
    train = ResidentData(dataset.train_images, dataset.train_labels, mean, std, device)
    test = ResidentData(dataset.test_images, dataset.test_labels, mean, std, device)
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


def trained_images(run: RunConfig, model: nn.Module) -> int:
    """Return over how many images the batch norms of ``model`` took their statistics."""
    for layer in model.modules():
        if isinstance(layer, BatchGroupNorm):
            return layer.images
        if isinstance(layer, SyncBatchNorm):
            return run.batch_size * run.processes
    return run.batch_size


def _wanted(
    config: EvaluateConfig, run: RunConfig, model: nn.Module
) -> tuple[dict[int | None, list[str]], list[int]]:
    """Return the statistics to evaluate by the number of images, and numbers that are too large."""
    most = min(run.dataset.images, run.dataset.test_images)
    counts = sorted({trained_images(run, model), *config.images})
    others = list(dict.fromkeys(name for name in config.statistics if name != "ema"))
    wanted: dict[int | None, list[str]] = {}
    if "ema" in config.statistics:
        wanted[None] = ["ema"]
    if others:
        wanted |= {count: list(map(str, others)) for count in counts if count <= most}
    return wanted, [count for count in counts if count > most]


def _dataset(config: EvaluateConfig, run: RunConfig, known: dict[str, Dataset]) -> Dataset:
    """Load the dataset of a run from where datasets are cached here, once."""
    settings = run.plain()
    if run.dataset.root is not None:
        settings["dataset"] = {**settings["dataset"], "root": config.root}
    here = RunConfig.parse(settings)
    key = repr(here.dataset)
    if key not in known:
        known[key] = build.load_dataset(here)
    return known[key]


def _last_wrong(run_dir: RunDirectory) -> int | None:
    rows = run_dir.rows()
    wrong = rows[-1]["test_wrong"] if rows else math.nan
    return None if math.isnan(wrong) else int(wrong)


def _text(images: int | None) -> str:
    return "" if images is None else str(images)


def _chunk(images: int) -> int:
    """Return the size of a forward pass: whole batches, about as many images as an evaluation."""
    return images * max(1, EVALUATION_CHUNK // images)


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
    """Put the rows into a table: means over seeds, a line a norm (and what else differs) and size.

    All but ``batch`` as taken over the images of the training; ``evaluations.csv`` has the rest.
    """
    import pandas as pd

    from gnbench.aggregate.figure import line_label, sort_norms
    from gnbench.aggregate.statistics import differing
    from gnbench.aggregate.study import read_study

    runs = read_study(study).finished
    settings = differing(runs)
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"images": str})
    kept = ["run_id", "trained_images", "statistics", "images", "test_error"]
    table = sort_norms(runs[["run_id", "norm", "batch_size", *settings]].merge(table[kept]))
    own = table["images"] == table["trained_images"].astype(str)
    table = table[own | table["statistics"].isin(["ema", "batch"])]
    table["column"] = table["statistics"].where(
        table["statistics"] != "batch", "batch " + table["images"]
    )
    order = ["ema", "precise", "population", "evalnorm"]
    columns = [name for name in order if name in set(table["column"])]
    sizes = sorted({int(n) for n in table.loc[table["statistics"] == "batch", "images"]})
    columns += [f"batch {size}" for size in sizes]
    lines = []
    keys = ["norm", *settings, "batch_size"]
    for _, own_rows in table.groupby(keys, dropna=False, sort=False):
        errors = own_rows.assign(test_error=own_rows["test_error"].astype(float))
        means = errors.groupby("column")["test_error"].mean()
        first = own_rows.iloc[0]
        found = [f"{means[name]:.2f}" if name in means else "–" for name in columns]
        seeds = own_rows["run_id"].nunique()
        lines.append([line_label(first, settings), first["batch_size"], seeds, *found])
    return f"study {study.name}: test error in %, mean over seeds\n" + tabulate(
        lines, ["", "batch size", "seeds", *columns], "plain", disable_numparse=True
    )


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
