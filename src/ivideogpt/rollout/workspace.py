"""Workspaces: the fixed buffers that CUDA graphs run in, and whose positions are in them.

Addresses inside a graph are fixed, so it runs in a *workspace*: buffers for the prefix and the own positions of one
shape of rows, and the graphs that were captured on them. Branches of one prefix share its workspace; the one that was
used last lives in its buffers, the others' own positions wait in memory of their own and change places with it. A
workspace whose branches are gone, or at rest, serves the next prefix of its shape, graphs and all.

B clips, S rows a clip, R = B*S rows, P positions of the prefix, L lead tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor

from ivideogpt.rollout.cache import KVCache, Prefix
from ivideogpt.rollout.capture import on

IDLE_WORKSPACES = 2
"""Workspaces without branches that are kept for prefixes to come."""


class GraphBranch:
    """Rows whose own positions are in their workspace's buffers, or wait beside them.

    At rest it is in no workspace: it has its prefix with it, and takes a place again when it is used.
    """

    def __init__(self, workspaces: Workspaces, workspace: Workspace, length: int = 0) -> None:
        self.rows, self.capacity = workspace.cache.rows, workspace.cache.capacity
        self.length = length
        self.waiting: tuple[Tensor, Tensor] | None = (
            None  # keys and values (N, R, K, length, d), while not in the buffers
        )
        self._workspaces = workspaces
        self._workspace: Workspace | None = workspace
        self._rested: _Rested | None = None
        workspace.branches.add(self)

    @property
    def workspace(self) -> Workspace:
        """Where it is; at rest, where it is from now on."""
        with self._workspaces.lock:
            if self._workspace is None:
                assert self._rested is not None
                self._workspace = self._rested.place(self._workspaces)
                self._workspace.branches.add(self)
                self._rested = None
            return self._workspace

    def fork(self) -> GraphBranch:
        """An independent branch from here on; it waits beside the buffers until it is used."""
        with self._workspaces.lock:
            if self._rested is not None:
                copy = GraphBranch(self._workspaces, self._rested.place(self._workspaces), self.length)
                copy.waiting = self.waiting  # which nobody writes to
                return copy
            workspace = self.workspace
        with workspace.lock, on(workspace.start.device):
            workspace.wait()
            copy = GraphBranch(self._workspaces, workspace, self.length)
            copy.waiting = workspace.filled(self)
            workspace.mark()
        return copy

    def rest(self) -> None:
        """Leaves its workspace to others."""
        with self._workspaces.lock:
            workspace = self._workspace
            if workspace is None:
                return
            with workspace.lock, on(workspace.start.device):
                workspace.wait()
                waiting, held = workspace.filled(self), workspace.cache.prefix
                prefix = Prefix(held.keys.clone(), held.values.clone())
                workspace.mark()
                self.waiting = waiting
                self._rested = _Rested(prefix, workspace.cache.samples, self.capacity, workspace.used)
                workspace.leave(self)
                self._workspace = None


@dataclass(frozen=True)
class _Rested:
    """What a branch at rest needs to take a place again; ``copied`` is the event behind the copies."""

    prefix: Prefix
    samples: int
    capacity: int
    copied: Any

    def place(self, workspaces: Workspaces) -> Workspace:
        """A workspace with the prefix in it."""
        with on(self.prefix.keys.device):
            if self.copied is not None:
                torch.cuda.current_stream().wait_event(self.copied)
            workspace = workspaces.take(self.prefix, self.samples, self.capacity)
            with workspace.lock:
                workspace.wait()
                _read_here(self.prefix.keys, self.prefix.values)
                workspace.mark()
        return workspace


@dataclass
class Frame:
    """One captured way of drawing: its inputs, which are copied into, its outputs, which are copied out of."""

    lead: Tensor
    actions: Tensor | None
    uniforms: Tensor
    run: Callable[[], None]
    outputs: list[Tensor]


@dataclass(eq=False)
class Workspace:
    """Fixed buffers for rows of one shape.

    Attributes:
        cache: prefix and own positions; the prefix' buffers are overwritten when another takes its place.
        start: scalar int64, the own position that a frame begins at.
        prefix: which one's copy ``cache`` holds, None if nothing yet.
        branches: that use it.
        resident: whose own positions are in ``cache``.
        frames: captured ways of drawing; the one that was used last is the last.
        used: behind the latest work in the buffers.
    """

    cache: KVCache
    start: Tensor
    prefix: ReferenceType[Prefix] | None = None
    branches: WeakSet[GraphBranch] = field(default_factory=WeakSet)
    resident: ReferenceType[GraphBranch] | None = None
    frames: dict[Any, Frame] = field(default_factory=dict)
    used: Any = None
    lock: Any = field(default_factory=threading.RLock)

    def take(self, prefix: Prefix) -> None:
        """Makes ``prefix`` the one that the buffers hold; no branch of another may be left."""
        if not self.holds(prefix):
            self.wait()
            self.cache.prefix.keys.copy_(prefix.keys)
            self.cache.prefix.values.copy_(prefix.values)
            self.cache.keys.zero_()  # a masked position is still multiplied: what is not finite must not stay
            self.cache.values.zero_()
            self.prefix, self.resident = ref(prefix), None
            self.mark()

    def wait(self) -> None:
        """The current stream waits for what was run in these buffers, maybe on another one."""
        if self.used is not None:
            torch.cuda.current_stream().wait_event(self.used)

    def mark(self) -> None:
        """Notes that the current stream is using the buffers."""
        if self.start.device.type == "cuda":
            self.used = torch.cuda.Event()
            self.used.record()

    def holds(self, prefix: Prefix) -> bool:
        """Whether the buffers hold ``prefix``."""
        return self.prefix is not None and self.prefix() is prefix

    def filled(self, branch: GraphBranch) -> tuple[Tensor, Tensor]:
        """Copies of the branch's own keys and values."""
        keys, values = (self.cache.keys, self.cache.values) if branch.waiting is None else branch.waiting
        if branch.waiting is not None:
            _read_here(*branch.waiting)
        assert branch.waiting is not None or branch.length == 0 or self._resident() is branch
        return keys[..., : branch.length, :].clone(), values[..., : branch.length, :].clone()

    def admit(self, branch: GraphBranch) -> None:
        """Puts the branch's own positions into the buffers, and those of the one that was there beside them."""
        resident = self._resident()
        if resident is branch:
            return
        if resident is not None:
            resident.waiting = self.filled(resident)
        if branch.waiting is not None:
            filled = branch.waiting[0].shape[3]
            self.cache.keys[..., :filled, :] = branch.waiting[0]
            self.cache.values[..., :filled, :] = branch.waiting[1]
            _read_here(*branch.waiting)
            branch.waiting = None
        self.resident = ref(branch)

    def leave(self, branch: GraphBranch) -> None:
        """The branch goes on elsewhere, with copies of all that it needs."""
        self.branches.discard(branch)
        if self._resident() is branch:
            self.resident = None

    def _resident(self) -> GraphBranch | None:
        return None if self.resident is None else self.resident()


def _read_here(*tensors: Tensor) -> None:
    """Their memory is not used again before the current stream, maybe not the one they were made on, has read them."""
    for read in tensors:
        if read.is_cuda:
            read.record_stream(torch.cuda.current_stream())


class Workspaces:
    """The workspaces of a decoder, in use and idle.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.all: list[Workspace] = []
        self.lock = threading.RLock()
        self._device = device

    def take(self, prefix: Prefix, samples: int, capacity: int) -> Workspace:
        """One that holds ``prefix``: the one that does already, an idle one of this shape, or a new one."""
        with self.lock, on(self._device):
            fitting = [
                workspace
                for workspace in self.all
                if workspace.cache.prefix.keys.shape == prefix.keys.shape
                and workspace.cache.samples == samples
                and workspace.cache.capacity == capacity
            ]
            sharing = [workspace for workspace in fitting if workspace.holds(prefix)]
            free = [workspace for workspace in fitting if not workspace.branches]
            found = [*sharing, *free]
            workspace = found[0] if found else self._add(prefix, samples, capacity)
            workspace.take(prefix)
            return workspace

    def _add(self, prefix: Prefix, samples: int, capacity: int) -> Workspace:
        def make() -> Workspace:
            buffers = Prefix(prefix.keys.new_empty(prefix.keys.shape), prefix.values.new_empty(prefix.values.shape))
            start = torch.zeros((), dtype=torch.int64, device=self._device)
            return Workspace(KVCache(buffers, samples, capacity), start)

        self._drop_idle(IDLE_WORKSPACES - 1)
        workspace = None
        with suppress(torch.OutOfMemoryError):
            workspace = make()
        if workspace is None:  # and the error is gone, which kept what had been allocated before it
            self._drop_idle(0)
            torch.cuda.empty_cache()
            workspace = make()
        self.all.append(workspace)
        return workspace

    def _idle(self) -> list[Workspace]:
        return [workspace for workspace in self.all if not workspace.branches]

    def _drop_idle(self, kept: int) -> None:
        idle = self._idle()
        for workspace in idle[: max(0, len(idle) - kept)]:
            if workspace.used is not None:
                workspace.used.synchronize()  # its memory is used again as if all had run on the stream that made it
            self.all.remove(workspace)

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers of those that nobody uses."""
        with self.lock:
            caches = [workspace.cache for workspace in self._idle()]
        return sum(x.nbytes for cache in caches for x in (cache.keys, cache.values))
