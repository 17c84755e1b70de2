"""Trackers: a run's settings, rows and result, told to somebody else as it goes."""

from __future__ import annotations

import copy
import json
import logging
import os
import pkgutil
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from gnbench import files
from gnbench.config import TrackerConfig
from gnbench.identity import by_dotted_name

LONGEST, MOST = 6000, 100  # MLflow: characters of a parameter, parameters of a call
FINISH_SECONDS = 60.0  # that W&B may take to upload what is left at the end of a run

Row = Mapping[str, Any]  # of metrics.csv; None where an epoch was not evaluated


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of its run at the start.

    ``settings`` are all of the run's, as in its record. ``resumes`` tells whether it goes on from a
    checkpoint, and ``rows`` are then those of the epochs before.
    """

    run_id: str
    study: str
    run_dir: Path
    settings: Mapping[str, Any]
    rows: list[Row]
    resumes: bool


class Tracker:
    """What a tracker does; this one does nothing. Any class with these three will do.

    What it raises costs a warning, and the rest of its run.
    """

    needs = ""  # the package, and the extra of gnbench, without which it cannot work

    def __init__(self, run: TrackedRun) -> None:
        """Begin, or go on with, the run; settings of ``conf/tracker`` come by their names."""

    def log(self, row: Row) -> None:
        """Take the row of an epoch, right after ``metrics.csv``."""

    def close(self, record: Mapping[str, Any]) -> None:
        """Take what ``run.json`` says at the end of this process's part, its result included."""


class TensorBoard(Tracker):
    """Event files in ``tensorboard/`` of the run directory."""

    needs = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils import tensorboard

        self._settings = flat(run.settings)
        folder = run.run_dir / "tensorboard"
        known = folder.exists()
        purged = {}
        if known:
            # Readers drop what an earlier process wrote of epochs that are trained again. They
            # take the files in the order of the seconds in which these were begun.
            purged = {"purge_step": len(run.rows) + 1}
            time.sleep(1)
        writer: Any = tensorboard.SummaryWriter
        self._writer = writer(str(folder), **purged)
        if not known:
            self._writer.add_text("settings", f"```\n{json.dumps(run.settings, indent=2)}\n```", 0)
            for row in run.rows:
                self.log(row)

    def log(self, row: Row) -> None:
        """Write the scalars of an epoch, and flush them."""
        for name, value in _measured(row).items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self, record: Mapping[str, Any]) -> None:
        """Write settings and result for the HPARAMS page once the run is finished."""
        from torch.utils.tensorboard import summary

        if record["status"] in ("completed", "diverged"):
            result = {f"result/{key}": value for key, value in record["result"].items()}
            # Not by add_hparams, which opens a file of its own.
            hparams: Any = summary.hparams
            for part in hparams(self._settings, result):
                self._writer.file_writer.add_summary(part)
            for name, value in result.items():
                self._writer.add_scalar(name, value, record["result"]["epochs"])
        self._writer.close()


class MLflow(Tracker):
    """A run of the experiment that is named after the study.

    ``uri`` is a folder or whatever MLflow takes for a tracking URI. ``mlflow_run_id`` in the run
    directory says which run of MLflow's it is.
    """

    needs = "mlflow"

    def __init__(self, run: TrackedRun, uri: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would call home
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # asked for by newer releases
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 14 s; 7 are four minutes
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        lock: AbstractContextManager[Any] = nullcontext()
        if "://" not in uri:
            folder = Path(uri).absolute()
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{folder}.lock")  # two processes would make two experiments
            uri = folder.as_uri()
        note = run.run_dir / "mlflow_run_id"
        with lock:
            self._client: Any = MlflowClient(uri)
            found = self._client.get_experiment_by_name(run.study)
            experiment = found.experiment_id if found else self._client.create_experiment(run.study)
        if run.resumes and note.exists():
            self._id = note.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, run_name=run.run_id).info.run_id
            settings = {**flat(run.settings), "run_dir": run.run_dir.absolute()}
            params = [Param(key, str(value)[:LONGEST]) for key, value in settings.items()]
            for start in range(0, len(params), MOST):
                self._client.log_batch(self._id, params=params[start : start + MOST])
            files.replace(note, self._id.encode())
        known = self._client.get_metric_history(self._id, "train_loss")
        self._known = {metric.step for metric in known}
        for row in run.rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Write the metrics of an epoch, unless they are there: trained again it has the same."""
        if row["epoch"] not in self._known:
            self._log(_measured(row), row["epoch"])

    def close(self, record: Mapping[str, Any]) -> None:
        """Write the result, and how the run has ended."""
        status = record["status"]
        if status in ("completed", "diverged"):
            result = record["result"]
            named = {f"result.{key}": value for key, value in result.items()}
            self._log(named, result["epochs"])
        self._client.set_tag(self._id, "status", status)
        ends = {"completed": "FINISHED", "diverged": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._id, ends.get(status, "FAILED"))

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)


class WandB(Tracker):
    """A run of Weights & Biases: offline in ``wandb/`` of the run directory, for ``wandb sync``."""

    needs = "wandb"

    def __init__(self, run: TrackedRun, project: str, mode: Literal["offline", "online"]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would call home
        import wandb

        if mode == "offline":  # which cannot go on with a run: all of it is written anew
            shutil.rmtree(run.run_dir / "wandb", ignore_errors=True)
        settings = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
            "finish_timeout": FINISH_SECONDS,
        }
        known: Any = wandb.Settings  # older ones know no limit, and wait as long as it takes
        self._run = wandb.init(
            dir=run.run_dir,
            project=project,
            group=run.study,
            name=run.run_id,
            id=f"{run.study}-{run.run_id}"[-128:],
            config=copy.deepcopy(dict(run.settings)),
            allow_val_change=True,
            mode=mode,
            resume="allow" if run.resumes and mode == "online" else None,
            reinit="create_new",
            settings={k: v for k, v in settings.items() if k in known.model_fields},
        )
        if not self._run.resumed:
            for row in run.rows:
                self.log(row)

    def log(self, row: Row) -> None:
        """Log the row of an epoch."""
        self._run.log(_measured(row), step=row["epoch"])

    def close(self, record: Mapping[str, Any]) -> None:
        """Write the result, and wait until all is written; online for FINISH_SECONDS at most."""
        self._run.summary.update({"status": record["status"], "result": record["result"]})
        failed = record["status"] not in ("completed", "diverged")
        self._run.finish(exit_code=int(failed))


class Guard:
    """A tracker that cannot harm its run: what it raises is said once, and then it is left alone.

    It is given copies, and torch's generator is afterwards as before.
    """

    def __init__(self, config: TrackerConfig, run: TrackedRun, said: logging.Logger) -> None:
        self._name = config.name
        self._said = said
        self._tracker: Any = None
        self._tracker = self._attempt(
            lambda: pkgutil.resolve_name(config.target)(run, **config.arguments())
        )

    def log(self, row: Row) -> None:
        """Tell it of an epoch."""
        if self._tracker is not None:
            self._attempt(lambda: self._tracker.log(dict(row)))

    def close(self, record: Mapping[str, Any]) -> None:
        """Tell it how the run has ended."""
        if self._tracker is not None:
            self._attempt(lambda: self._tracker.close(copy.deepcopy(record)))
            self._tracker = None

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            with torch.random.fork_rng(devices=[]):
                return action()
        except (Exception, SystemExit) as error:
            self._tracker = None
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._said.warning("tracker=%s: %s; the run goes on without it", self._name, what)
            return None


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their dotted names, a list as JSON."""
    return {
        name: json.dumps(value) if isinstance(value, list) else value
        for name, value in by_dotted_name(settings).items()
    }


def _measured(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "epoch" and value is not None}
