"""One run on several processes: two of them, over gloo, on the CPU."""

import atexit
import itertools
import json
import logging
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from gnbench.check import check_machine, compose
from gnbench.errors import ConfigError
from gnbench.runs import runner
from gnbench.train.distributed import AGREE_STEPS, ProcessGroup
from tests import process_groups, tiny
from tests.conftest import measured, started, variant
from tests.process_groups import together
from tests.trainings import CPU

JOINT_NORMS = ("syncbn", "gn", "gn_ws", "ln", "in", "lrn", "none")
RUN = (*tiny.OVERRIDES, "batch_size=4", "dataset.augmentation=none", "checkpoint_seconds=0")


def difference(found, expected):
    """Return the largest difference between two lists of numbers, relative to the largest one."""
    found, expected = torch.tensor(found).double(), torch.tensor(expected).double()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def flat(numbers):
    """Flatten the gradients of a network: a bias before a norm has none but rounding."""
    gradients = [v for name, v in numbers.items() if name.endswith((".weight", ".bias"))]
    return torch.cat([torch.tensor(values).flatten() for values in gradients]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("norm", JOINT_NORMS)
def test_the_gradients_are_those_of_one_process_with_the_joint_batch(norm):
    """Float32; the bound is for sums in another order. 11 images are 6 and 5."""
    [alone] = together(process_groups.gradients, 1, norm, 11)
    for one in together(process_groups.gradients, 2, norm, 11):
        assert one.keys() == alone.keys()
        assert difference(flat(one), flat(alone)) < 1e-5
        assert one["wrong"] == alone["wrong"]
        for name in alone:
            if "running" in name or name == "loss_sum":
                assert difference(one[name], alone[name]) < 1e-5, name


@pytest.mark.slow
def test_accumulated_gradients_are_averaged_once_also_after_unequal_passes():
    """13 images are 7 and 6: two forward passes in one process, three in the other."""
    [alone] = together(process_groups.gradients, 1, "gn", 13)
    for one in together(process_groups.gradients, 2, "gn", 13, 3):
        assert difference(flat(one), flat(alone)) < 1e-5
        assert one["wrong"] == alone["wrong"]


@pytest.mark.slow
def test_plain_batch_norm_normalizes_over_each_process_alone():
    """As Wu & He do; so its gradients are not those of the joint batch."""
    [alone] = together(process_groups.gradients, 1, "bn", 16)
    one, other = together(process_groups.gradients, 2, "bn", 16)
    assert difference(one["0.weight"], other["0.weight"]) == 0  # averaged
    assert difference(one["0.weight"], alone["0.weight"]) > 0.05
    assert one["1.running_mean"] != other["1.running_mean"]


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shares", [(3, 3), (4, 1)], ids=["equal", "unequal"])
def test_sync_batch_norm_is_batch_norm_of_the_joint_batch(shares, momentum):
    """In float64: outputs, gradients of input, γ and β, running statistics, eval mode."""
    [joint] = together(process_groups.normalized, 1, (sum(shares),), momentum)
    one, other = together(process_groups.normalized, 2, shares, momentum)
    for turn in range(2):
        for part in range(2):
            pieces = one["outputs"][turn][part] + other["outputs"][turn][part]
            assert difference(pieces, joint["outputs"][turn][part]) < 1e-12
    for name in ("mean", "variance", "eval"):
        assert difference(one[name], joint[name]) < 1e-12, name
        assert one[name] == other[name]
    for name in ("γ", "β"):  # DistributedDataParallel adds those up
        total = (torch.tensor(one[name]) + torch.tensor(other[name])).tolist()
        assert difference(total, joint[name]) < 1e-6


@pytest.mark.slow
def test_restarted_processes_do_not_look_for_the_dead_at_their_old_addresses():
    """The store in which torchrun's processes meet keeps what those before a restart wrote."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for seconds in (0, 1):
        assert together(process_groups.late, 3, seconds, store=store) == [3.0] * 3


@pytest.mark.slow
def test_all_stop_after_the_same_step_whoever_receives_the_signal():
    stopped = together(process_groups.agreements, 3, 1, 5)
    assert len(set(stopped)) == 1
    assert 5 <= stopped[0] <= 5 + AGREE_STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("skip", "told"), [(False, (True, {"step": 7})), (True, (False, {"status": "completed"}))]
)
def test_the_others_train_or_hear_of_the_record(skip, told):
    assert together(process_groups.beginnings, 2, skip) == [None, told]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_shares_of_a_batch_are_equal_and_leave_nothing_out(size):
    for images in range(size, 20):
        shares = [ProcessGroup(rank, size).share(100, 100 + images) for rank in range(size)]
        assert shares[0][0] == 100
        assert shares[-1][1] == 100 + images
        assert all(before[1] == after[0] for before, after in itertools.pairwise(shares))
        lengths = [stop - start for start, stop in shares]
        assert max(lengths) - min(lengths) <= 1


class LostError(Exception):
    """What ends one process of several."""


class Losing:
    """A run that ends so."""

    def __init__(self, *_):
        self.record = {}

    def train(self, *_):
        raise LostError
        yield

    def close(self, *_):
        pass

    let_go = close


@pytest.mark.parametrize("leads", [True, False])
def test_who_is_lost_ends_without_the_others(monkeypatch, tiny_config, leads):
    """They wait for it in a step; to destroy a group of NCCL it would wait for them."""

    def lost(*_):
        raise LostError

    config, forgotten = tiny_config(), []
    monkeypatch.setattr(atexit, "unregister", forgotten.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runner, "OpenRun", Losing)
    monkeypatch.setattr(runner, "restored", lost)
    group = SimpleNamespace(size=2, wait_to_begin=lambda: (True, None))
    shared = SimpleNamespace(device=CPU, stop=SimpleNamespace(gentle=0))
    train = runner._train(config, None, None, shared, group, logging.getLogger("lost"))
    act = train.__next__ if leads else lambda: runner._follow(config, shared, group)
    with pytest.raises(LostError):
        act()
    assert forgotten == [torch.distributed.destroy_process_group]


def test_a_process_alone_asks_nobody():
    group = ProcessGroup()
    group.begin_training({"step": 7})
    assert group.leads
    assert group.agree(15, True) == (15, True)
    assert group.gather("item") == ["item"]
    assert group.add(torch.tensor(3.0)) == 3


def test_the_number_of_processes_is_part_of_what_a_run_is(monkeypatch):
    settings = ("norm=gn", "batch_size=2")
    alone = compose(*settings)
    with pytest.raises(ConfigError, match="processes=2"):
        check_machine(compose(*settings, "processes=2"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = compose(*settings)
    assert both.processes == 2
    assert both.run_id != alone.run_id
    with pytest.raises(ConfigError, match="batch_size=30000 for 2 processes"):
        compose("batch_size=30000")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert compose(*settings).run_id == alone.run_id


# From here on, with torchrun.


def torchrun(folder, *arguments, options=()):
    launcher = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", *options)
    return started(folder, *launcher, "-m", "gnbench", *arguments, stderr=subprocess.STDOUT)


def finished(process):
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.slow
def test_torchrun_trains_one_run_and_only_rank_0_writes(tmp_path, cli):
    code, said = finished(torchrun(tmp_path, "-m", *RUN, "norm=gn,syncbn"))
    assert code == 0, said
    assert said.count("completed in") == 2  # one process speaks
    assert "Warning" not in said
    cli(*RUN, "norm=gn", "batch_size=8", "study=alone", check=0)
    records = {
        path: json.loads(path.read_text()) for path in (tmp_path / "outputs").rglob("run.json")
    }
    by_norm = {(r["config"]["norm"]["name"], r["config"]["study"]): p for p, r in records.items()}
    assert len(by_norm) == 3
    both = by_norm["gn", "default"].parent
    assert records[by_norm["gn", "default"]]["config"]["processes"] == 2
    assert {p.name for p in both.iterdir()} == {
        "run.json", "metrics.csv", "model.pt", "correct.npy", "gnbench.log", ".lock",
    }  # fmt: skip
    joint = measured(by_norm["gn", "alone"].parent / "metrics.csv")
    for row, expected in zip(measured(both / "metrics.csv"), joint, strict=True):
        if row[0] != "epoch":  # the same steps, learning rates and counts; losses but for rounding
            assert row[:3] == expected[:3]
            assert row[8] == expected[8]
            assert float(row[3]) == pytest.approx(float(expected[3]), rel=1e-3)
            assert float(row[5]) == pytest.approx(float(expected[5]), rel=1e-2)
    code, said = finished(torchrun(tmp_path, *RUN, "norm=gn"))
    assert code == 0, said
    assert "is completed (test error" in said
    assert cli("study=default", module="gnbench.aggregate", check=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = finished(torchrun(folder, *LONG))
    assert code == 0, said
    [metrics] = folder.rglob("metrics.csv")
    return measured(metrics)


LONG = (
    *(*RUN, "model._target_=tests.trainings.small", "norm=syncbn", "model.dropout=0.1"),
    *("epochs=50", "checkpoint_seconds=0.2"),
)


def under_way(folder):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for path in folder.rglob("metrics.csv"):
            if len(path.read_text().splitlines()) > 5 and (path.parent / "checkpoint.pt").exists():
                return path
        time.sleep(0.02)
    raise AssertionError("it never began")


def workers(launcher):
    """Return the processes that torchrun started, rank 0 first."""
    listed = subprocess.run(
        ["ps", "--ppid", str(launcher.pid), "-o", "pid="],
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(int(pid) for pid in listed.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=variant)])
def test_a_killed_process_is_restarted_and_all_resume(tmp_path, undisturbed, rank):
    launcher = torchrun(tmp_path, *LONG, options=["--max-restarts=1"])
    metrics = under_way(tmp_path)
    os.kill(workers(launcher)[rank], signal.SIGKILL)
    code, said = finished(launcher)
    assert code == 0, said
    assert "resumes after step" in said
    assert measured(metrics) == undisturbed


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint_and_the_same_command_resumes(
    tmp_path, undisturbed
):
    launcher = torchrun(tmp_path, *LONG)
    metrics = under_way(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    code, said = finished(launcher)
    assert code != 0
    record = json.loads((metrics.parent / "run.json").read_text())
    assert record["status"] == "interrupted", said
    code, said = finished(torchrun(tmp_path, *LONG))
    assert code == 0, said
    assert "resumes after step" in said
    assert measured(metrics) == undisturbed
