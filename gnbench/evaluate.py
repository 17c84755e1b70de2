"""``python -m gnbench.evaluate``: the test error of finished weights under other statistics."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
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
from gnbench.errors import ConfigError, DamagedError, LockedError
from gnbench.norms import BatchGroupNorm
from gnbench.runs.directory import RunDirectory, read_record
from gnbench.sweep.plan import find_studies
from gnbench.train import devices
from gnbench.train.batches import ResidentData, draw_epoch
from gnbench.train.engine import EVALUATION_CHUNK, autocast, find_correct

Statistics = Literal["ema", "precise", "population", "batch", "evalnorm"]
RUN = ("run_id", "dataset", "model", "norm", "batch_size", "seed", "weights")
COLUMNS = (*RUN, "statistics", "images", "test_error", "test_wrong", "test_total")
Row = dict[str, Any]
Finished = tuple[RunConfig, RunDirectory, str]  # a run with the digest of its weights


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

    The epoch is the one that would have come next, with its augmentation. A last, smaller batch is
    left out. (fvcore's precise BN averages in the same way.)
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


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate the finished runs of one study, or of all, as configured.

    Raises:
        ConfigError: before anything is written.
        LockedError: if another process is evaluating a study.
        WriteError: if a table cannot be written.
    """
    studies = find_studies(config.outputs, config.study)
    with devices.claimed(config.device) as device:
        devices.flush_denormals()
        for study in studies:
            lock = FileLock(study / ".evaluations.lock")
            try:
                with lock.acquire(timeout=0):
                    _evaluate_study(config, study, device)
            except Timeout:
                raise LockedError(f"{study}: another process is evaluating it") from None


def _evaluate_study(config: EvaluateConfig, study: Path, device: torch.device) -> None:
    path = study / "evaluations.csv"
    rows = _read(path)
    datasets: dict[str, Dataset] = {}
    runs, left_out = _finished(study)
    for run, run_dir, weights in tqdm(runs, "evaluate", unit="run", disable=None, leave=False):
        cell = dict(zip(RUN, (run.run_id, *_cell(run), weights), strict=True))
        model = build.build_model(run)
        state = torch.load(run_dir.model_path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
        model = model.to(device).eval()
        if not batch_norms(model):
            left_out.setdefault(
                f"norm={run.norm.name} has no statistics of batches: nothing to evaluate", []
            ).append(run.run_id)
            continue
        wanted = _wanted(config, run, model)
        done = {(r["statistics"], r["images"]) for r in rows if _same(r, cell)}
        wanted = {
            images: missing
            for images, names in wanted.items()
            if (missing := [n for n in names if (n, _text(images)) not in done])
        }
        if not wanted:
            continue
        rows = [row for row in rows if row["run_id"] != run.run_id or _same(row, cell)]
        dataset = _dataset(config, run, datasets)
        mean, std = run.dataset.mean, run.dataset.std
        train = ResidentData(dataset.train_images, dataset.train_labels, mean, std, device)
        test = ResidentData(dataset.test_images, dataset.test_labels, mean, std, device)
        for name, images, wrong in evaluated(run, model, train, test, wanted):
            error = 100 * wrong / len(test)
            row = {"statistics": name, "images": _text(images), "test_error": error}
            rows.append({**cell, **row, "test_wrong": wrong, "test_total": len(test)})
            files.replace(path, _csv(rows))
            over = "" if images is None else f" over {images} images"
            tqdm.write(f"{run.run_id}: {name}{over}: test error {error:.2f} %")
            if name == "ema" and wrong != (found := _last_wrong(run_dir)):
                left_out.setdefault(
                    "ema differs from the run's own last error (another machine or release?)", []
                ).append(f"{run.run_id}: {wrong} wrong here, {found} then")
    print(_described(study, rows))
    for reason, names in left_out.items():
        print("\n  ".join([f"{reason}:", *names]))


def _finished(study: Path) -> tuple[list[Finished], dict[str, list[str]]]:
    """Return the runs of a study that have weights, and by reason what has to be left out."""
    runs: list[Finished] = []
    left_out: dict[str, list[str]] = {}
    for path in sorted(study.glob("*/run.json")):
        run_dir = RunDirectory(path.parent)
        try:
            record = read_record(path)
            if record["status"] != "completed":
                left_out.setdefault("not completed", []).append(path.parent.name)
                continue
            config = RunConfig.parse(record["config"])
            weights = hashlib.sha256(run_dir.model_path.read_bytes()).hexdigest()[:8]
            runs.append((config, run_dir, weights))
        except FileNotFoundError:
            left_out.setdefault("no model.pt", []).append(path.parent.name)
        except (DamagedError, ConfigError) as error:
            left_out.setdefault("cannot be read", []).append(f"{path.parent.name}: {error}")
    return runs, left_out


def _wanted(
    config: EvaluateConfig, run: RunConfig, model: nn.Module
) -> dict[int | None, list[str]]:
    """Return the statistics to evaluate by the number of images, as far as there are so many."""
    layers = [layer for layer in model.modules() if isinstance(layer, BatchGroupNorm)]
    own = layers[0].images if layers else run.batch_size
    most = min(run.dataset.images, run.dataset.test_images)
    counts = sorted({count for count in (own, *config.images) if count <= most})
    others: list[str] = [name for name in config.statistics if name != "ema"]
    wanted: dict[int | None, list[str]] = {}
    if "ema" in config.statistics:
        wanted[None] = ["ema"]
    if others:
        wanted |= dict.fromkeys(counts, others)
    return wanted


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
    return int(rows[-1]["test_wrong"]) if rows else None


def _cell(run: RunConfig) -> tuple[str, str, str, int, int]:
    return run.dataset.name, run.model.name, run.norm.name, run.batch_size, run.seed


def _same(row: Mapping[str, Any], cell: Mapping[str, Any]) -> bool:
    return bool(row["run_id"] == cell["run_id"] and row["weights"] == cell["weights"])


def _text(images: int | None) -> str:
    return "" if images is None else str(images)


def _chunk(images: int) -> int:
    """Return the size of a forward pass: whole batches, about as many images as an evaluation."""
    return images * max(1, EVALUATION_CHUNK // images)


def _read(path: Path) -> list[Row]:
    """Return the rows of an earlier ``evaluations.csv``; one of another form counts as none."""
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
    """Put the rows into a table: a line a run, a column a kind of statistics."""
    columns = sorted(
        {(r["statistics"], r["images"]) for r in rows},
        key=lambda c: (list(Statistics.__args__).index(c[0]), int(c[1] or 0)),  # type: ignore[attr-defined]
    )
    lines: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        line = lines.setdefault(row["run_id"], {})
        line[row["statistics"], row["images"]] = f"{float(row['test_error']):.2f}"
    return f"study {study.name}: test error in % by statistics and images\n" + tabulate(
        [[name, *(line.get(column, "–") for column in columns)] for name, line in lines.items()],
        ["", *(" ".join(filter(None, column)) for column in columns)],
        "plain",
        disable_numparse=True,
    )


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="evaluate")
def app(config: DictConfig) -> None:
    """Evaluate as ``conf/evaluate.yaml`` says."""
    try:
        settings = EvaluateConfig.parse(config)
        find_studies(settings.outputs, settings.study)
        cli.composed()
        evaluate(settings)
    except Exception as error:
        raise SystemExit(cli.report(error)) from error


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 3 another is at work."""
    sys.exit(cli.call(app))


if __name__ == "__main__":
    main()
