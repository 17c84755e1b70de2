"""A stand-in for ``torch.cuda`` on a CPU: streams that wait for one another, captures, cuBLAS.

What would be wrong on a device is noted in ``faults``, and an error where a device has one.
"""

import gc
import weakref
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gnbench.train import cuda_graphs
from tests.replays import READS, Kernels

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)  # those of cuBLAS


class Stream:
    """What is launched on it is after all that it has launched and waited for: its ``clock``."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.clock = {}  # by stream, the number of its kernels

    def wait_stream(self, other):
        if self.cuda.capturing and other in self.cuda.capturing.streams:
            self.cuda.capturing.streams.append(self)
        for stream, count in other.clock.items():
            self.clock[stream] = max(count, self.clock.get(stream, 0))

    def waits_for(self, other):
        """Tell whether it has waited for all that the other one has launched."""
        return self.clock.get(other, 0) >= other.clock.get(other, 0)


class Kernel:
    """Something launched; ``after`` says what else it waits for."""

    def __init__(self, stream):
        stream.clock[stream] = stream.clock.get(stream, 0) + 1
        self.stream, self.clock = stream, dict(stream.clock)

    def after(self, other):
        return self.clock.get(other.stream, 0) >= other.clock[other.stream]


class Workspace:
    """Memory of cuBLAS for a stream: in a graph's pool, or anybody's once it is freed (None)."""

    def __init__(self, pool):
        self.pool, self.freed = pool, False


class Graph:
    """A graph, whose end clears the workspaces of the stream that it was captured on."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.streams, self.workspaces, self.kernels = [], [], None
        cuda.graphs.add(self)
        weakref.finalize(self, cuda.graph_has_died, self.streams)

    def replay(self):
        if any(workspace.freed for workspace in self.workspaces):
            self.cuda.fault("an illegal memory access: a workspace that has been freed")
        if self in self.cuda.outlived:
            self.cuda.fault("replayed after another graph of its stream has died")
        self.cuda.replays += 1
        self.kernels.replay()


class Watch(TorchDispatchMode):
    """Tell the device of products, which take a workspace, and of waits for it."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel in READS and self.cuda.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if kernel in PRODUCTS:
            self.cuda.launch(product=True)
        return kernel(*args, **(kwargs or {}))


class Cuda:
    """One device; ``install`` puts it in the place of the real ones."""

    def __init__(self):
        self.faults = []
        self.current = Stream(self)
        self.capturing = None
        self.graphs, self.outlived = weakref.WeakSet(), weakref.WeakSet()
        self.workspaces = {}  # by stream
        self.sync_debug_mode = "default"
        self.captures = self.replays = self.freed_caches = 0
        self.pools = []
        self.spoilt = False  # as torch 2.11 is once a capture has failed

    def install(self, monkeypatch):
        parts = {
            "Stream": lambda device: Stream(self),
            "current_stream": lambda device: self.current,
            "stream": self.on,
            "device": lambda device: nullcontext(),
            "CUDAGraph": lambda: Graph(self),
            "graph": self.capture,
            "graph_pool_handle": self.new_pool,
            "get_sync_debug_mode": lambda: self.sync_debug_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_debug_mode", mode),
            "empty_cache": self.empty_cache,
            "is_current_stream_capturing": lambda: self.capturing is not None,
        }
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        clear = "_cuda_clearCublasWorkspaces"  # which a torch without CUDA lacks
        monkeypatch.setattr(torch._C, clear, self.clear_workspaces, raising=False)
        monkeypatch.setattr(cuda_graphs.CudaGraphs, "failed", False)
        cuda_graphs._side_stream.cache_clear()

    def fault(self, text):
        self.faults.append(text)
        raise RuntimeError(text)

    def launch(self, product=False):
        """Launch something on the current stream; return it."""
        graph = self.capturing
        if graph and gc.isenabled():
            self.faults.append("the collector may run during a capture")
        if graph and self.current not in graph.streams:
            self.fault("launched beside a capture, on a stream that has not waited for it")
        if product:
            own = self.workspaces.setdefault(self.current, Workspace(graph and graph.pool))
            if graph:
                graph.workspaces.append(own)
            elif own.pool:
                self.fault("a workspace in the memory of a graph is used outside of it")
        return Kernel(self.current)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            with Watch(self):
                yield
        finally:
            self.current = before

    @contextmanager
    def capture(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # DataLoaders and savers are other threads
        if self.spoilt:
            self.fault("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.captures += 1
        stream.wait_stream(self.current)  # torch waits for the whole device
        before, self.current = self.current, stream
        graph.streams.append(stream)
        graph.pool, self.capturing = pool, graph
        graph.kernels = Kernels()
        try:
            with Watch(self), graph.kernels:
                yield
        except BaseException:
            self.capturing = None  # and the current stream stays, as torch has it
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.capturing, self.current = None, before
        if not all(stream.waits_for(other) for other in graph.streams):
            self.fault("capturing stream has unjoined work")

    def new_pool(self):
        self.pools.append(object())
        return self.pools[-1]

    def graph_has_died(self, streams):
        if self.capturing:
            self.faults.append("a graph died during a capture")
        for stream in streams[:1]:
            self.clear_workspaces([stream])
            self.outlived |= {graph for graph in self.graphs if graph.streams[:1] == [stream]}

    def clear_workspaces(self, streams=None):
        for stream in list(self.workspaces) if streams is None else streams:
            if workspace := self.workspaces.pop(stream, None):
                workspace.freed = workspace.pool is None  # what is in a pool stays the graphs'

    def empty_cache(self):
        self.freed_caches += 1
        if self.spoilt:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
