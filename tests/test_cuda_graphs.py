"""`CudaGraphs` itself, against a stand-in for ``torch.cuda`` (tests.fake_cuda), and on a GPU."""

import gc
import itertools

import pytest
import torch
from torch.torch_version import TorchVersion

from gnbench import build
from gnbench.errors import RecordingError
from gnbench.train import cuda_graphs
from gnbench.train.cuda_graphs import CudaGraphs
from gnbench.train.replicas import ReplicaGroup
from tests.fake_cuda import Cuda
from tests.trainings import (
    CPU,
    NORMS,
    assert_same_weights,
    assert_together_as_alone,
    in_turns,
    leaving_one_by_one,
    rows,
    three,
)

SHORT = {"batch_size": 5, "epochs": 3}  # nine steps and a partial one an epoch: 4, 4, 1, and 1


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("gnbench.train.graph_engine.STEPS_A_GRAPH", 4)


@pytest.fixture
def cuda(monkeypatch):
    gc.collect()  # graphs of other tests
    monkeypatch.setattr(torch, "__version__", "2.14.1")  # as which the stand-in behaves
    found = Cuda()
    found.install(monkeypatch)
    yield found
    cuda_graphs._side_stream.cache_clear()


def branches(cuda, count, fails=None):
    """Return works that launch two kernels each, of which one fails after its first; and these."""
    launched = [[] for _ in range(count)]

    def work(number):
        launched[number].append(cuda.launch())
        if number == fails:
            raise ValueError("a fault")
        launched[number].append(cuda.launch())

    return [lambda n=n: work(n) for n in range(count)], launched


@pytest.mark.parametrize("captured", [False, True])
def test_branches_wait_for_what_came_before_and_not_for_one_another(cuda, captured):
    graphs = CudaGraphs(CPU)
    works, launched = branches(cuda, 3)
    before = cuda.launch()
    (graphs.record if captured else graphs.run)(graphs.side_by_side(works))
    if captured:
        cuda.current = graphs._stream
    after = cuda.launch()
    assert [len(own) for own in launched] == [2, 2, 2]
    assert all(
        kernel.after(before) and after.after(kernel) for kernel in itertools.chain(*launched)
    )
    for one, other in itertools.permutations(launched, 2):
        assert not any(a.after(b) for a in one for b in other)


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_after_an_error_all_have_joined_as_well(cuda, fails):
    graphs, default = CudaGraphs(CPU), cuda.current
    works, launched = branches(cuda, 3, fails)
    with pytest.raises(ValueError, match="a fault"):
        graphs.run(graphs.side_by_side(works))
    after = cuda.launch()
    assert cuda.current is default
    assert all(after.after(kernel) for kernel in itertools.chain(*launched))


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_capture_that_fails_raises_its_cause_and_leaves_nothing(cuda, fails):
    graphs, default, pools = CudaGraphs(CPU), cuda.current, len(cuda.pools)
    works, _ = branches(cuda, 3, fails)
    with pytest.raises(ValueError, match="a fault"):
        graphs.record(graphs.side_by_side(works))
    assert (cuda.current, gc.isenabled(), cuda.workspaces) == (default, True, {})
    assert len(cuda.pools) == pools + 1  # other memory for the next one
    works, _ = branches(cuda, 3)
    graphs.record(graphs.side_by_side(works))
    assert cuda.faults == []


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_has_run_before_a_capture_and_is_off_during_it(cuda, enabled):
    graphs = CudaGraphs(CPU)

    class Cycle:
        pass

    lost = Cycle()
    lost.itself, lost.graph = lost, torch.cuda.CUDAGraph()
    del lost
    seen = []

    def work():
        seen.append((gc.isenabled(), len(cuda.graphs)))

    (gc.enable if enabled else gc.disable)()
    try:
        kept = graphs.record(work)
        assert seen == [(False, 1)]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    del kept


def product():
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))


def test_workspaces_are_the_graph_s_own(cuda):
    """Neither that of the work before, which may be freed, nor afterwards that of work outside."""
    graphs = CudaGraphs(CPU)
    works = [product, product]
    graphs.run(graphs.side_by_side(works))
    replay = graphs.record(graphs.side_by_side(works))
    [graph] = cuda.graphs
    assert {workspace.pool for workspace in graph.workspaces} == {graph.pool}
    graphs.run(graphs.side_by_side(works))
    torch._C._cuda_clearCublasWorkspaces()
    replay()
    assert cuda.faults == []


@pytest.mark.slow
def test_replicas_leave_and_the_others_train_and_evaluate_on(cuda):
    """No graph dies while another one of its stream is still replayed."""
    settings = {"norm": "gn", **SHORT, "epochs": 4}
    alone, together = three(**settings), three(group=ReplicaGroup(CudaGraphs(CPU), CPU), **settings)
    expected = [rows(one) for one in alone]
    found = leaving_one_by_one(together)
    assert [len(own) for own in found] == [2, 3, 4]
    assert found == [wanted[: len(own)] for own, wanted in zip(found, expected, strict=True)]
    assert together[2].engine.name == "graph"
    assert_same_weights(together[2], alone[2])
    assert cuda.faults == []


def assert_the_second_goes_on_eagerly(together, expected):
    """It refuses to be captured; all train what was expected."""

    def refuse(*_):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a capture")

    together[1].engine.model.register_forward_pre_hook(refuse)
    assert in_turns(together) == expected
    assert [one.engine.name for one in together] == ["graph", "eager", "graph"]


@pytest.mark.slow
def test_a_branch_that_cannot_be_captured_costs_the_others_nothing(cuda):
    settings = {"norm": "gn", **SHORT}
    expected = [rows(one) for one in three(**settings)]
    together = three(group=ReplicaGroup(CudaGraphs(CPU), CPU), **settings)

    assert_the_second_goes_on_eagerly(together, expected)
    assert cuda.faults == []


class Counter:
    """A replica whose work adds to a number, by as much as ``steps`` gives next."""

    def __init__(self):
        self.value = torch.zeros(())

    def state(self):
        return [self.value]

    def adding(self, steps):
        return lambda: self.value.add_(next(steps))


def test_a_graph_that_fails_its_proof_takes_the_others_with_it(cuda):
    group = ReplicaGroup(CudaGraphs(CPU), CPU)
    replicas = [Counter(), Counter()]
    for replica in replicas:
        group.join(replica)

    def ask(key, steps):
        for replica in replicas:
            group.ask(replica, key, replica.adding(steps))

    ask("same", itertools.repeat(1))
    ask("other", itertools.count(1))
    for replica in replicas:
        with pytest.raises(RecordingError, match="does not repeat"):
            group.settle(replica)
    ask("same", itertools.repeat(1))
    assert [replica.value.item() for replica in replicas] == [2, 2]
    assert cuda.faults == []


@pytest.mark.parametrize(("release", "captures"), [("2.11.0+cu130", 1), ("2.12.1", 2)])
def test_torch_2_11_has_no_capture_after_one_that_failed(cuda, monkeypatch, release, captures):
    """And asserts when it is to free memory."""
    monkeypatch.setattr(torch, "__version__", release)
    graphs = CudaGraphs(CPU)
    [work], _ = branches(cuda, 1, fails=0)
    with pytest.raises(ValueError, match="a fault"):
        graphs.record(work)
    cuda.spoilt = release.startswith("2.11")
    cuda_graphs.empty_cache()
    [work], _ = branches(cuda, 1)
    if cuda.spoilt:
        with pytest.raises(RuntimeError, match=r"torch 2\.11"):
            graphs.record(work)
    else:
        graphs.record(work)
    assert (cuda.captures, cuda.freed_caches, cuda.faults) == (captures, 1, [])


def test_an_error_in_freeing_memory_is_not_hidden_elsewhere(cuda):
    cuda.spoilt = True
    with pytest.raises(RuntimeError, match="captures_underway"):
        cuda_graphs.empty_cache()


# On a GPU.

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def on_a_gpu():
    """Return the settings of a training on it, and a group of replicas."""
    build.make_deterministic("fp32")
    device = torch.device("cuda", 0)
    return {"device": device, **SHORT}, ReplicaGroup(CudaGraphs(device), device)


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("norm", NORMS)
def test_on_cuda_each_replica_is_what_it_is_alone(norm):
    settings, group = on_a_gpu()
    assert_together_as_alone(group, norm=norm, **settings)


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_on_cuda_the_first_replica_leaves_and_the_others_go_on(norm):
    """Whose graphs its graphs' end must not harm, nor what is captured anew (pytorch#193402)."""
    settings, group = on_a_gpu()
    settings |= {"norm": norm, "epochs": 4}
    alone = three(**settings)
    expected = [rows(one) for one in alone]
    together = three(group=group, **settings)
    found = leaving_one_by_one(together)
    for own, wanted in zip(found, expected, strict=True):
        assert own == wanted[: len(own)]
    assert len(found[2]) == 4
    assert together[2].engine.name == "graph"
    assert_same_weights(together[2], alone[2])


@pytest.mark.cuda
@on_cuda
@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12", reason="torch 2.11 has no capture after a failed one"
)
def test_on_cuda_a_branch_that_cannot_be_captured_costs_the_others_nothing():
    settings, group = on_a_gpu()
    expected = [rows(one) for one in three(**settings)]
    together = three(group=group, **settings)

    assert_the_second_goes_on_eagerly(together, expected)
    for one in together:
        one.engine.close()
    assert_together_as_alone(group, **settings)
