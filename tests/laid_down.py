"""Run directories as training would have left them, laid down without training."""

import copy
import functools
import json

from omegaconf import OmegaConf

from gnbench.composition import composed
from gnbench.config import RunConfig, conf_dir
from gnbench.identity import run_id
from gnbench.report import ReportConfig, report
from gnbench.runs.directory import METRICS, RunDirectory


@functools.cache
def settings(*overrides):
    return RunConfig.parse(composed(*overrides)).plain()


def put(study, error, *overrides, status="completed", epochs=3, name=None, **changes):
    """Lay down the directory of a run as training would have left it."""
    config = copy.deepcopy(settings(*overrides)) | {"batch_size": 2} | changes
    run = RunDirectory(study / (name or run_id(config)))
    run.path.mkdir(parents=True)
    lines = [",".join(METRICS)]
    for epoch in range(1, epochs + 1):
        wrong = round(100 * error) + epochs - epoch
        row = (epoch, 10 * epoch, 0.001, 1.0, 50.0, 1.0, wrong / 100, wrong, 10_000, 99.0, 1.5)
        lines.append(",".join(map(str, row)))
    run.metrics_path.write_text("\n".join([*lines, ""]))
    record = {
        "status": status,
        "config": config,
        "seed": config["seed"],
        "error": "RuntimeError: it broke" if status == "failed" else None,
        "result": {"test_error": error, "test_error_final": error, "epochs": epochs},
        "versions": {"gnbench": "0.1.0", "torch": "2.11.0", "python": "3.12.0"},
        "device": "cpu",
        "engine": "eager",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 4.5,
        "peak_memory_bytes": 1000,
    }
    run.record_path.write_text(json.dumps(record))
    return run


def page(outputs, study=None, **figure):
    """Write the page of studies as the command does; return its path."""
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "report.yaml"))
    chosen = {"outputs": str(outputs), "study": study, "figure": config["figure"] | figure}
    return report(ReportConfig.parse(chosen))
