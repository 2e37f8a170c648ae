"""Captured: a function of tensors whose kernels are launched together, as a CUDA graph of each shape of inputs."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from warnings import warn
from weakref import WeakMethod

import torch
from torch import Tensor

from ivideogpt.rollout.memory import is_out_of_memory

capturing = threading.Lock()
"""Held while a graph is captured: two captures at once would see each other's work."""

FEW_CLIPS = 4
"""Clips up to which launching kernels takes longer than running them, so that a graph is worth its memory."""

GRAPHS = 8
"""Graphs, each of one shape, that a function keeps; further shapes run op by op."""


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current GPU inside, where Triton's kernels, new streams and events are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Recorder:
    """Captures graphs of one GPU, all of its own on one stream.

    Graphs that share a pool of memory use it again only within a stream, and libraries keep memory for each stream. Two
    recorders have two, as their graphs may run at the same time. Its methods are called inside of :meth:`held`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other capture goes on inside, and the recorder's GPU is the current one."""
        with capturing, on(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            yield

    def warm_up(self, run: Callable[[], object], times: int = 1) -> None:
        """Runs what is going to be captured, so that libraries allocate what they do not allocate again."""
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
        """What is run inside becomes ``graph``."""
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                yield
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves the thread on its stream


@dataclass
class _Graph:
    """One captured call: inputs that are copied into, outputs that are copied out of, and its last use."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    used: torch.cuda.Event


class Captured:
    """``function`` as it is off a GPU; on one, the second call with a shape captures it and later ones replay that.

    What it reads beside its inputs must stay where it is in memory. May be called from several threads.

    Args:
        function: of tensors, to tensors; it must not wait for the device, nor depend on values. A bound method does not
            keep its object alive, which is taken to own this.
        name: what a warning calls it.
        most: largest first size of the inputs that is captured.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], name: str, most: int = FEW_CLIPS) -> None:
        self._reference = WeakMethod(function) if inspect.ismethod(function) else lambda: function
        self._name, self._most = name, most
        self._lock = threading.Lock()
        self._graphs: dict[object, _Graph | None] | None = {}
        self._recorder: Recorder | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in memory of their own."""
        if inputs[0].device.type == "cuda" and len(inputs[0]) <= self._most:
            with self._lock:
                graph = self._graph_of(inputs)
                if graph is not None:
                    stream = torch.cuda.current_stream(inputs[0].device)
                    stream.wait_event(graph.used)  # another thread may have been here on another stream
                    for mine, given in zip(graph.inputs, inputs, strict=True):
                        mine.copy_(given)
                    graph.graph.replay()
                    outputs = tuple(output.clone() for output in graph.outputs)
                    graph.used.record(stream)
                    return outputs
        return tuple(self._function(*inputs))

    def _function(self, *inputs: Tensor) -> Sequence[Tensor]:
        function = self._reference()
        assert function is not None
        return function(*inputs)

    def _graph_of(self, inputs: tuple[Tensor, ...]) -> _Graph | None:
        if self._graphs is None:
            return None
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._graphs:
            if len(self._graphs) < GRAPHS:
                self._graphs[key] = None
            return None
        graph = self._graphs[key]
        if graph is None:
            graph = self._capture(inputs)
            if graph is None:
                self._graphs = None
            else:
                self._graphs[key] = graph
        return graph

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph | None:
        try:
            # ordinary tensors, which may be written to in and out of inference mode
            recorder = self._recorder = self._recorder or Recorder(inputs[0].device)
            with recorder.held(), torch.inference_mode(False), torch.no_grad():
                inputs = tuple(given.clone() for given in inputs)
                recorder.warm_up(lambda: self._function(*inputs))
                graph = torch.cuda.CUDAGraph()
                with recorder.recording(graph):
                    outputs = tuple(self._function(*inputs))
                return _Graph(graph, inputs, outputs, torch.cuda.Event())
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            warn(f"the CUDA graph of {self._name} could not be captured, it runs op by op: {error}", stacklevel=3)
            return None
