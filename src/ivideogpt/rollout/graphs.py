"""GraphDecoder: a whole frame as a few CUDA graphs, so that no kernel waits for the host.

They run in the buffers of a workspace, see ``workspace.py``.

B clips, S rows a clip, R = B*S rows, P positions of the prefix, L lead tokens, n tokens of a frame, D embed_dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from warnings import warn
from weakref import proxy

import torch
from torch import Tensor

from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cache import KVCache, Prefix
from ivideogpt.rollout.capture import Captured, Recorder, on
from ivideogpt.rollout.decoder import Sampled
from ivideogpt.rollout.fused import TorchDecoder
from ivideogpt.rollout.sampling import Sampling, sample_token
from ivideogpt.rollout.workspace import Frame, GraphBranch, Workspace, Workspaces

FRAMES = 20
"""Captured ways of drawing that a workspace keeps: lengths of what is fed, settings of the sampling."""

WARM_UP_RUNS = 2
"""Runs in front of a capture, which let libraries allocate what they do not allocate again."""


class GraphDecoder(TorchDecoder):
    """Decoder whose frames are CUDA graphs, launched together.

    Off a GPU, or where a capture fails, the same operations run one by one.

    Args:
        transformer: whose weights are copied.
        precision: as for :class:`ivideogpt.rollout.fused.TorchDecoder`.
    """

    def __init__(self, transformer: Transformer, precision: str) -> None:
        super().__init__(transformer, precision)
        self._workspaces = Workspaces(self.device)
        self._captures = self.device.type == "cuda"
        self._recorder = Recorder(self.device)
        self._prefill = Captured(self._keys_values, "the context")

    def prefill(self, tokens: Tensor) -> Prefix:
        """The prefix of ``tokens`` (B, P), by a graph if they are few."""
        return Prefix(*self._prefill(tokens))

    def _keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        prefix = super().prefill(tokens)
        return prefix.keys, prefix.values

    def branch(self, prefix: Prefix, samples: int, capacity: int) -> GraphBranch:  # type: ignore[override]
        """An empty branch of B * ``samples`` rows with room for ``capacity`` own positions."""
        with self._workspaces.lock:
            return GraphBranch(self._workspaces, self._workspaces.take(prefix, samples, capacity))

    @property
    def idle_bytes(self) -> int:
        """Bytes of buffers that wait for branches to come, and are given up where those do not fit otherwise."""
        return self._workspaces.idle_bytes

    def feed(  # type: ignore[override]
        self, branch: GraphBranch, tokens: Tensor, actions: Tensor | None = None, action_at: int = -1
    ) -> Tensor:
        """Final normed hidden states (R, L, D), float32; one graph for each L."""
        nothing = torch.empty(branch.rows, 0, device=self.device)
        return self._run(branch, tokens, actions, nothing, Sampling(), action_at)[0]

    def sample(  # type: ignore[override]
        self, branch: GraphBranch, lead: Tensor, actions: Tensor | None, uniforms: Tensor, sampling: Sampling
    ) -> Sampled:
        """Feeds ``lead``, then draws one token after another."""
        hidden, tokens = self._run(branch, lead, actions, uniforms, sampling)
        return Sampled(tokens, hidden)

    def draw(
        self,
        cache: KVCache,
        lead: Tensor,
        start: Tensor,
        actions: Tensor | None,
        action_at: int,
        uniforms: Tensor,
        sampling: Sampling,
        outputs: list[Tensor],
    ) -> Iterator[None]:
        """Feeds ``lead`` (R, L), then draws one token after another: what graphs are captured of.

        It pauses behind each token (or behind ``lead``, where no token is drawn), so that a graph may end there.

        Args:
            cache: prefix and own positions of the rows.
            lead: (R, L) ids.
            start: the own position, a scalar on the device, that ``lead`` begins at.
            actions: (R, A), added at ``action_at`` of ``lead``.
            action_at: which token that is.
            uniforms: (R, n), the random numbers of the draws.
            sampling: how tokens are drawn.
            outputs: is given the hidden states (R, L, D) of ``lead`` and the tokens (R, n).
        """
        tokens = lead.new_empty(len(lead), uniforms.shape[1])
        hidden = self.feed_at(cache, lead, start, actions, action_at)
        outputs += [hidden, tokens]
        state = hidden[:, -1]
        for index in range(uniforms.shape[1]):
            if index:
                at = start + (lead.shape[1] + index - 1)
                state = self.feed_at(cache, tokens[:, index - 1 : index], at)[:, -1]
            tokens[:, index] = sample_token(self.logits(state, sampling), uniforms[:, index], sampling)
            yield
        if not uniforms.shape[1]:
            yield

    def _run(
        self,
        branch: GraphBranch,
        lead: Tensor,
        actions: Tensor | None,
        uniforms: Tensor,
        sampling: Sampling,
        action_at: int = -1,
    ) -> tuple[Tensor, Tensor]:
        workspace = branch.workspace
        grows = lead.shape[1] + max(uniforms.shape[1] - 1, 0)
        assert branch.length + grows <= branch.capacity, f"no room for {grows} positions behind {branch.length}"
        with workspace.lock, on(self.device):
            workspace.wait()
            workspace.admit(branch)
            workspace.start.fill_(branch.length)
            key = (lead.shape[1], uniforms.shape[1], None if actions is None else action_at, sampling)
            frame = workspace.frames.pop(key, None)
            if frame is None:
                while len(workspace.frames) >= FRAMES:
                    del workspace.frames[next(iter(workspace.frames))]
                frame = self._frame(workspace, lead, actions, uniforms, sampling, action_at)
            workspace.frames[key] = frame
            frame.lead.copy_(lead)
            frame.uniforms.copy_(uniforms)
            if frame.actions is not None and actions is not None:
                frame.actions.copy_(actions)
            frame.run()
            hidden, tokens = (output.clone() for output in frame.outputs)
            workspace.mark()
        branch.length += grows
        return hidden, tokens

    def _frame(
        self,
        workspace: Workspace,
        lead: Tensor,
        actions: Tensor | None,
        uniforms: Tensor,
        sampling: Sampling,
        action_at: int,
    ) -> Frame:
        """Buffers for drawing in this way, and what runs on them: a captured graph on a GPU."""
        lead, uniforms = (x.clone(memory_format=torch.contiguous_format) for x in (lead, uniforms))
        actions = None if actions is None else actions.clone(memory_format=torch.contiguous_format)
        outputs: list[Tensor] = []
        decoder = proxy(self)  # which owns the workspace, which owns what is made here
        start, cache = workspace.start, workspace.cache

        def draw() -> Iterator[None]:
            outputs.clear()
            return decoder.draw(cache, lead, start, actions, action_at, uniforms, sampling, outputs)

        def run_eagerly() -> None:
            for _ in draw():
                pass

        run = run_eagerly
        if self._captures:
            try:
                graphs = self._capture(draw, pieces(uniforms.shape[1]))

                def run() -> None:
                    for graph in graphs:
                        graph.replay()
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._captures = False
                warn(f"the CUDA graph of a frame could not be captured, it runs op by op: {error}", stacklevel=2)
        return Frame(lead, actions, uniforms, run, outputs)

    def _capture(self, draw: Callable[[], Iterator[None]], counts: list[int]) -> list[torch.cuda.CUDAGraph]:
        """A graph of each of the next ``counts`` pauses of what ``draw`` gives."""
        graphs: list[torch.cuda.CUDAGraph] = []
        with self._recorder.held():
            self._recorder.warm_up(lambda: deque(draw(), maxlen=0), WARM_UP_RUNS)
            steps = draw()
            for count in counts:
                graph = torch.cuda.CUDAGraph()
                pool = graphs[0].pool() if graphs else None
                with self._recorder.recording(graph, pool):
                    for _ in range(count):
                        next(steps)
                graphs.append(graph)
        return graphs


def pieces(tokens: int) -> list[int]:
    """How many tokens each of a frame's graphs draws: 1, 2, 4, ... and the rest.

    Launching a graph takes the host some time for each kernel in it, less than it takes to run. So the first is short,
    and while one runs the next, twice as long, is launched.
    """
    counts: list[int] = []
    left = max(tokens, 1)
    while left:
        counts.append(min(left, 2 ** len(counts)))
        left -= counts[-1]
    return counts
