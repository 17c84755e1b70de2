import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gnbench.experiment import compose
from tests import tiny

ROOT = Path(__file__).parents[1]
# Started in the background, the tests would ignore Ctrl-C, and what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the networks of the tests are too small to share


def measured(metrics):
    """Return the rows of a metrics.csv without their times."""
    return [line.split(",")[:9] for line in metrics.read_text().splitlines()]


@pytest.fixture
def tiny_config(tmp_path):
    """Compose a run on the tiny dataset that writes under tmp_path."""

    def composed(*overrides):
        return compose(*tiny.OVERRIDES, f"outputs={tmp_path}/outputs", *overrides)

    return composed


@pytest.fixture
def cli(tmp_path):
    """Run ``python -m <module> …`` in an empty folder, as a user would."""

    def call(*arguments, module="gnbench", env=None, cwd=tmp_path, check=None):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("HYDRA_FULL_ERROR", None)  # a command run in this process may have set it
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            env={**environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check is not None:
            assert done.returncode == check, done.stderr + done.stdout
        return done

    return call
