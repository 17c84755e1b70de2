"""Every fault that gnbench claims to survive, caused. Counts: pytest tests/test_faults.py -rP."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gnbench.datasets import cache, sources
from tests import faults, tiny
from tests.conftest import environment, measured

pytestmark = pytest.mark.slow
RUN = (*tiny.OVERRIDES, "norm=bn", "batch_size=24", "model.dropout=0.1", "checkpoint_seconds=0")
FILES = {"run.json", "metrics.csv", "model.pt", "correct.npy", "gnbench.log", ".lock"}


def outcome(folder):
    """Return what must not depend on the faults: metrics, result, weights; and the files left."""
    [record] = folder.rglob("run.json")
    weights = torch.load(record.parent / "model.pt", weights_only=True)
    digest = [float(value.double().abs().sum()) for value in weights.values()]
    record = json.loads(record.read_text())
    [metrics] = folder.rglob("metrics.csv")
    files = {path.name for path in metrics.parent.iterdir()}
    return measured(metrics), record["status"], record["result"], digest, files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert faults.command(RUN, folder) == 0
    found = outcome(folder)
    assert found[1] == "completed"
    assert found[4] == FILES
    assert len(found[0]) == 3
    return found


@pytest.fixture(scope="module")
def changes(tmp_path_factory):
    """How often an undisturbed run changes a file of its directory."""
    folder = tmp_path_factory.mktemp("changes")
    faults.command(RUN, folder, fault="kill", at=10**9)
    return int((folder / "output").read_text().split("changes")[-1])


def until(happened, seconds=120):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def side_by_side(case, numbers):
    """Try a case for each of ``numbers``, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(case, numbers))


def test_sigkill_at_every_other_change_of_a_file(tmp_path, undisturbed, changes):
    def case(at):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert faults.command(RUN, folder, fault="kill", at=at) == -signal.SIGKILL
        assert faults.command(RUN, folder) == 0, (folder / "output").read_text()
        assert outcome(folder) == undisturbed, f"killed at change {at}"
        shutil.rmtree(folder)

    moments = range(1, changes + 1, 1 if faults.REPEAT > 1 else 2)
    side_by_side(case, moments)
    print(f"killed at {len(moments)} of {changes} changes; every run ended as if it never was")
    assert changes > 30


def test_sigkill_again_and_again_at_random_moments(tmp_path, undisturbed):
    """By the clock: at the start, in training, in evaluation, while something is being written."""
    rng = random.Random(0)
    (tmp_path / "timed").mkdir()
    began = time.monotonic()
    faults.command(RUN, tmp_path / "timed")
    usual = time.monotonic() - began

    def case(pauses):
        folder = tmp_path / str(pauses[0])
        folder.mkdir()
        kills = 0
        for pause in pauses:
            process = faults.start(RUN, folder)
            if faults.end(process, pause) is None:
                process.kill()
                faults.end(process)
                kills += 1
        assert faults.command(RUN, folder) == 0, (folder / "output").read_text()
        assert outcome(folder) == undisturbed
        shutil.rmtree(folder)
        return kills

    runs = 15 * faults.REPEAT
    kills = sum(side_by_side(case, [[rng.uniform(0, usual) for _ in "abc"] for _ in range(runs)]))
    print(f"killed {kills} times in {runs} runs; every run ended as if it never was")
    assert kills > runs


def test_sigkill_after_sigkill_at_random_changes_of_a_file(tmp_path, undisturbed):
    """Also the runs that resume are killed, and those that resume them."""

    def case(seed):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        kills = 0
        while (code := faults.command(RUN, folder, fault="kill", at=rng.randint(1, 40))) != 0:
            assert code == -signal.SIGKILL, (folder / "output").read_text()
            kills += 1
        assert outcome(folder) == undisturbed
        shutil.rmtree(folder)
        return kills

    runs = 6 * faults.REPEAT
    kills = sum(side_by_side(case, range(runs)))
    print(f"killed {kills} times in {runs} runs; every run ended as if it never was")
    assert kills > runs


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing_any_more(tmp_path, undisturbed, changes, fault):
    """From a change of a file on. The command says so in a line, and resumes afterwards."""
    remedy = {"full": "make room there", "read-only": "choose another folder"}[fault]
    reason = {"full": "No space left on device", "read-only": "Read-only file system"}[fault]

    def case(at):
        folder = tmp_path / str(at)
        folder.mkdir()
        code = faults.command(RUN, folder, fault=fault, at=at)
        said = (folder / "output").read_text()
        assert "Traceback" not in said
        last = said.splitlines()[-2]  # then comes the count of changes
        if code:
            assert code == 1
            assert last.startswith("gnbench: ")
            assert "cannot be written: " in last
            assert reason in last
            assert remedy in last
        else:
            assert "completed in" in last  # what failed was of no consequence
        assert faults.command(RUN, folder) == 0, (folder / "output").read_text()
        assert outcome(folder) == undisturbed, f"{fault} from change {at} on"
        shutil.rmtree(folder)
        return code

    moments = range(1, changes + 1, 1 if faults.REPEAT > 1 else 3)
    failures = side_by_side(case, moments)
    print(f"{fault} from each of {len(moments)} moments on; every run ended as if it never was")
    assert sum(failures) > len(moments) / 2


def test_sigkill_while_the_dataset_cache_is_written(tmp_path, monkeypatch):
    """Between the download, the file beside, its flush and its new name."""
    arrays = {
        name: np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) % (2 if "labels" in name else 40)
        for name in sources.CIFAR10.checksums
    }
    checksums = {
        name: cache.hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()
    }
    for at in itertools.count(1):
        root = tmp_path / str(at)
        root.mkdir()
        process = faults.FORKS.Process(target=faults.fetch, args=(root, arrays, checksums, at))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        for _ in range(2):  # mended, then read from the cache
            found = faults.fetch(root, arrays, checksums, at=None)
            assert found["train_images"].tobytes() == arrays["train_images"].tobytes()
        assert {path.name for path in root.iterdir()} == {"toy.npz", f".toy.{os.geteuid()}.lock"}
    print(f"killed at each of {at - 1} changes of a file; always mended, nothing left behind")
    assert at > 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_machine_without_memory_ends_a_cell_but_not_the_sweep(tmp_path, workers):
    """For real: the process may take 1 GiB, and one of the two networks wants 16."""
    models = "model._target_=tests.tiny.Greedy,gnbench.models.SimpleNetV2"
    sweep = ("-m", *tiny.OVERRIDES, models, f"hydra.launcher.n_jobs={workers}")
    code = faults.command(sweep, folder=tmp_path, memory=2**30)
    said = (tmp_path / "output").read_text()
    assert code == 1, said
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("run.json")]
    by_model = {record["config"]["model"]["_target_"]: record for record in records}
    greedy, other = by_model["tests.tiny.Greedy"], by_model["gnbench.models.SimpleNetV2"]
    assert other["status"] == "completed", said
    assert greedy["status"] == "out_of_memory"
    assert greedy["peak_memory_bytes"] > 0
    assert "you tried to allocate 17179869184 bytes" in greedy["error"]
    assert "Traceback" not in said
    assert said.count("out of memory: ") == 1


UNSHARED = ["unshare", "--map-root-user", "--mount", "sh", "-euc"]


def mounted(script, folder, *arguments):
    """Run a shell script in a mount namespace of its own, where anybody may mount a disk."""
    try:
        subprocess.run(
            [*UNSHARED, 'mount -t tmpfs -o size=1m tmpfs "$0"', str(folder)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespaces on this machine ({error})")
    return subprocess.run(
        [*UNSHARED, script, sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_real_disk_that_is_full(tmp_path):
    """8 MiB, of which a checkpoint takes 5: there is no room for a second beside the first."""
    script = """
        mkdir outputs; mount -t tmpfs -o size=8m tmpfs outputs
        "$0" -m gnbench "$@" && exit 99 || echo "code $?"
        ls outputs/default/*/run.json
        mount -o remount,size=64m outputs
        "$0" -m gnbench "$@"
        cat outputs/default/*/run.json
    """
    done = mounted(script, tmp_path, *tiny.OVERRIDES, "checkpoint_seconds=0", "norm=gn")
    assert "code 1" in done.stdout, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("gnbench: ")]
    assert "checkpoint.pt cannot be written: No space left on device; make room there" in line
    assert "resumes after step 1" in done.stderr
    assert '"status": "completed"' in done.stdout


def test_a_real_disk_that_is_read_only(tmp_path):
    script = """
        mkdir outputs; mount --bind outputs outputs; mount -o remount,bind,ro outputs
        "$0" -m gnbench "$@" || echo "code $?"
        "$0" -m gnbench -m "$@" || echo "code $?"
    """
    done = mounted(script, tmp_path, *tiny.OVERRIDES, "norm=gn")
    assert done.stdout.count("code ") == 2, done.stderr + done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith("gnbench: outputs/default")
        assert "cannot be written: Read-only file system; choose another folder" in line


def test_twenty_processes_on_one_grid_train_each_cell_once(tmp_path):
    sweep = ("-m", *tiny.OVERRIDES, "norm=gn,ln", "batch_size=8,16", "epochs=20", "wait=true")
    crowd = [
        faults.start(sweep, tmp_path, output=tmp_path / f"output{number}") for number in range(20)
    ]
    for process in crowd:
        process.join(300)
    said = [(tmp_path / f"output{number}").read_text() for number in range(20)]
    assert [process.exitcode for process in crowd] == [0] * 20, said[0]
    logs = [path.read_text() for path in tmp_path.rglob("gnbench.log")]
    assert len(logs) == 4
    assert all(log.count(" steps of ") == log.count(" completed in ") == 1 for log in logs)
    assert all(text.count("completed  ") == 4 for text in said)  # each one's table
    trained = [text.count(" steps of ") for text in said]
    assert sum(trained) == 4
    assert max(trained) < 4  # they shared the work
    for path in tmp_path.rglob("metrics.csv"):
        assert len(measured(path)) == 21


def test_a_second_process_says_who_trains_the_run_and_leaves_or_waits(tmp_path):
    run = (*tiny.OVERRIDES, "norm=gn", "epochs=500", "dataset.augmentation=none")
    first = faults.start(run, tmp_path, output=tmp_path / "first")
    until(lambda: list(tmp_path.rglob("metrics.csv")))
    assert faults.command(run, tmp_path, output=tmp_path / "second") == 3
    [line] = (tmp_path / "second").read_text().splitlines()
    assert f"is being trained by process {first.pid} on " in line
    assert line.endswith("; wait=true waits for it")
    sweep = ("-m", *run)
    assert faults.command(sweep, tmp_path, output=tmp_path / "third") == 3
    assert "; passed over" in (tmp_path / "third").read_text()
    assert "running" in (tmp_path / "third").read_text()
    (tmp_path / "fourth").touch()
    fourth = faults.start((*run, "wait=true"), tmp_path, output=tmp_path / "fourth")
    until(lambda: "waiting for it" in (tmp_path / "fourth").read_text())
    first.kill()
    assert faults.end(fourth, 1200) == 0
    assert "epoch 500/500" in (tmp_path / "fourth").read_text()
    [metrics] = tmp_path.rglob("metrics.csv")
    assert len(measured(metrics)) == 501
