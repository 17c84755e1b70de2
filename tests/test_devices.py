import os

import pytest
import torch

from gnbench import cli
from gnbench.check import compose
from gnbench.errors import FAILED, BusyError, ConfigError
from gnbench.train import devices
from tests.trainings import CPU


def test_flushing_denormal_numbers_changes_no_weight():
    """Of a weight that has learned once the moments of Adam fade for a thousand steps."""
    found = []
    for flush in (True, False):
        if flush:
            devices.flush_denormals()
        elif not torch.set_flush_denormal(False):
            pytest.skip("this processor does not flush denormal numbers")
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 64))
        optimizer = torch.optim.AdamW([weights], fused=True)
        for step in range(1000):
            weights.grad = torch.full_like(weights, float(step == 0))
            optimizer.step()
        fading = optimizer.state[weights]["exp_avg"]
        found.append((weights.detach(), ((fading != 0) & (fading.abs() < 1.2e-38)).sum()))
    (flushed, none), (plain, some) = found
    assert (none, some) == (0, 64)
    assert torch.equal(flushed, plain)


@pytest.mark.parametrize(("seconds", "native"), [(0.5, True), (2.0, True), (30.0, False)])
def test_bf16_that_takes_many_times_as_long_as_fp32_is_not_native(monkeypatch, seconds, native):
    taken = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(devices, "_seconds", lambda matrix: taken[matrix.dtype])
    assert devices.has_native_bf16.__wrapped__(CPU) is native


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("no"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_there_is_no_memory(error, full):
    assert devices.is_out_of_memory(error) is full


@pytest.mark.parametrize(("given", "found"), [(None, "32"), ("8", "8")])
def test_cuda_gets_a_queue_for_each_replica_unless_told_otherwise(
    monkeypatch, tmp_path, given, found
):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))  # without a service
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    devices.choose_device("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == found


def test_where_processes_share_the_queues_of_a_gpu_none_asks_for_most(monkeypatch, tmp_path):
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    devices.choose_device("cpu")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    (tmp_path / "control").unlink()  # the service has ended
    devices.choose_device("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


@pytest.mark.parametrize(
    ("message", "explained"),
    [
        ("CUDA-capable device(s) is/are busy or unavailable", True),
        ("out of memory", True),
        ("an illegal memory access was encountered", False),  # of this process itself
    ],
)
def test_a_device_that_others_hold_is_refused_in_a_line(
    monkeypatch, capsys, tmp_path, message, explained
):
    def refuse(*_, device):
        opened.append(device.index)
        raise torch.AcceleratorError(f"CUDA error: {message}\nSearch for")

    opened, expected = [], BusyError if explained else RuntimeError
    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cli, "_composed", True)
    monkeypatch.setenv("RANK", "1")  # its GPU alone may be held
    for _ in range(2):  # the second finds the seat free again
        with pytest.raises(expected) as refused, devices.claimed("auto"):
            pass
    assert opened == [0, 0]
    assert cli.report(refused.value) == FAILED
    said = capsys.readouterr().err
    assert said.startswith("gnbench: device=cuda:0") is explained
    assert ("Search" in said) is not explained


@pytest.mark.parametrize(
    ("precision", "found"), [("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")]
)
def test_float32_is_computed_in_float32_unless_asked_and_no_release_warns(precision, found):
    """Warnings are errors here."""
    cuda = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [products.fp32_precision for products in cuda]
    try:
        devices.set_float32_products("tf32" if found == "ieee" else "fp32")
        devices.set_float32_products(precision)
        assert [products.fp32_precision for products in cuda] == [found, found]
    finally:
        for products, precision in zip(cuda, before, strict=True):
            products.fp32_precision = precision


@pytest.mark.parametrize(("name", "count"), [("auto", 4), ("cuda", 3), ("cuda:0", 2)])
def test_all_processes_say_alike_that_each_needs_a_gpu(monkeypatch, name, count):
    """Rank 0 alone is heard."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    said = set()
    for rank in range(count):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(ConfigError) as caught:
            devices.choose_device(name)
        said.add(str(caught.value))
    [line] = said
    assert line.endswith(
        f" {count} processes on this machine need a GPU each, and it has 2: use device=cuda with "
        "--nproc-per-node=2, or device=cpu"
    )


def test_as_many_processes_as_gpus_have_one_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.choose_device("auto") == torch.device("cuda:1")


def test_tf32_is_refused_on_a_processor():
    with pytest.raises(ConfigError, match=r"^precision=tf32: the cpu .* choose precision=fp32$"):
        compose("precision=tf32", "device=cpu")
