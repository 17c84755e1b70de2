import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gnbench.check import compose
from tests import tiny

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Started in the background, the tests would ignore Ctrl-C, and what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the networks of the tests are too small to share
# The cores that joblib counts. The cells of a sweep follow each other, in the process of the
# command, unless its test wants workers: they take seconds to start.
os.environ["LOKY_MAX_CPU_COUNT"] = "1"
ALL_CORES = {"LOKY_MAX_CPU_COUNT": None}


# A fault that its test causes in another variant already.
variant = pytest.mark.skipif(
    os.environ.get("GNBENCH_FAULTS", "1") == "1", reason="a variant; GNBENCH_FAULTS=2 runs it"
)


def environment(**more):
    """Return the environment of a command; None as a value removes one."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return {name: value for name, value in found.items() if value is not None}


def started(folder, *command, env=None, **options):
    """Start ``python -m <command>`` in ``folder`` and go on."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env=environment(**(env or {})), **given
    )


def measured(metrics):
    """Return the rows of a metrics.csv without their times."""
    return [line.split(",")[:9] for line in metrics.read_text().splitlines()]


def pytest_xdist_auto_num_workers(config):
    """Have one worker more than cores for the slow tests: they wait half of the time."""
    return (os.cpu_count() or 1) + 1 if config.option.markexpr == "slow" else None


# The files whose slow tests take longest, a minute or more of waiting: none is begun last.
LONGEST = ("slurm", "launchers", "bench", "gpu_script", "cli", "distributed", "faults")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr == "slow":
        names = [f"test_{name}.py" for name in LONGEST]
        items.sort(key=lambda item: (*names, item.path.name).index(item.path.name))


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
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            # A command run in this process may have set HYDRA_FULL_ERROR.
            env=environment(**{"HYDRA_FULL_ERROR": None, **(env or {})}),
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check is not None:
            assert done.returncode == check, done.stderr + done.stdout
        return done

    return call


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Without its sandbox, which root has not.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Open a page offline; whatever it says on the console, asks for or breaks fails the test."""
    contexts, said = [], []

    def open_page(path, width=1400, scheme="light", choices="", **device):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **device
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        requests = []
        page.goto(f"file://{path}{choices}")
        page.wait_for_selector("#count:not(:empty)", state="attached")
        asked = [url for url in requests if not url.startswith(("file://", "data:", "blob:"))]
        assert asked == []
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
