"""Baselines of the rollout benchmark: transformers' LLaMA with the weights of a WorldModel, used in two ways.

``original`` is what the published code does with it, as far as the paper, its released scripts and the reported speed
tell; where they leave a choice, the faster one was taken for it:

* One ``generate(inputs_embeds=...)`` a future frame, over the whole prefix, with HF's own cache inside of that call
  only; sampling with temperature 1 and top-k 100. It asks for n tokens, or for n + 1 with all hidden states where a
  reward is read, as its model-based RL does.
* The transformer sees candidates of one context as so many independent rows, in batches of at most 200. Their ids are
  repeated (its prediction script); its planning script even tokenizes the repeated context, which is not done here.
* A clip's tokens are detokenized at its end, context frames included, for each row. In a loop with a policy or a person
  only the newest frame is decoded, from context features that are kept (its model-based RL keeps them; its tokenizer's
  plain ``detokenize`` would decode the whole clip so far).
* bf16 autocast over float32 weights on a GPU, entered once, so that weights are cast once and not a frame at a time;
  float32 on a CPU. Past the transformer's positions the newest frames become the context of a new prompt.
* The tokenizer is this package's module, called as it is, since it computes the same; token bookkeeping that costs
  next to nothing (padding, concatenations on the host) is left out.

``hf-cached`` is a stronger use of the same class that the published code does not make: HF's static cache for the life
of the clip, one prefill, then steps of one token without ``generate``; the last token of a frame goes in together with
the next slot, unless a reward is read. Weights are bf16 on a GPU, float32 on a CPU. No torch.compile.

B clips, S rows a clip, R = B*S rows, P prompt length, F future frames, n tokens of a frame, A action size, D width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ivideogpt import WorldModel

TEMPERATURE, TOP_K = 1.0, 100
ROWS_AT_ONCE = 200
"""Rows that a baseline generates and decodes at once: the batch in which the published planning script tokenizes."""


class DifferentWorkError(AssertionError):
    """A baseline does not compute what the world model computes, so that comparing their times would mean nothing."""


class Clip(Protocol):
    """A rollout of R rows that is under way."""

    def frame(self, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids (R, n) of the next frame after ``actions`` (R, A), and the hidden state (R, D) of the last one."""


def llama_of(wm: WorldModel) -> Any:
    """Transformers' LLaMA over the very parameters of ``wm.transformer``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = wm.transformer.config
    llama_config = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.embed_dim, intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        attention_bias=config.attention_bias, mlp_bias=config.mlp_bias, tie_word_embeddings=False,
        # no id ends a clip early; the padding id is never used, generate() only wants one
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        llama = LlamaForCausalLM(llama_config)
    with torch.device(wm.device):  # the rotary frequencies are no part of the state dict
        llama.model.rotary_emb = type(llama.model.rotary_emb)(llama_config)
    state = {
        name if name.startswith("lm_head") else f"model.{name}": parameter
        for name, parameter in wm.transformer.named_parameters()
        if not name.startswith("action_linear")
    }
    llama.load_state_dict(state, strict=True, assign=True)
    return llama.eval()


class Baseline:
    """Rollouts of a WorldModel's weights by transformers' LLaMA.

    Args:
        wm: with an action layer.
        sample: argmax if False, for comparing ids.
        full_precision: float32 on every device, for comparing ids.

    Attributes:
        logits: of each id (R, V) that was not sampled but taken as argmax, for comparing; empty while sampling.
    """

    name = ""

    def __init__(self, wm: WorldModel, sample: bool = True, full_precision: bool = False) -> None:
        self.wm, self.layout = wm, wm.layout
        self.sample = sample
        self.logits: list[Tensor] = []
        self.low_precision = wm.device.type == "cuda" and not full_precision
        self.precision = "bfloat16" if self.low_precision else "float32"
        self.llama = llama_of(wm)

    def clip(self, prompt: Tensor, horizon: int) -> Clip:
        """Starts a rollout of at most ``horizon`` frames from ids ``prompt`` (R, P)."""
        raise NotImplementedError

    def step_embeddings(self, ids: Tensor) -> Tensor:
        return self.llama.get_input_embeddings()(ids)

    def action_embeddings(self, actions: Tensor) -> Tensor:
        return self.wm.transformer.embed_actions(self.wm.normalize_actions(actions))

    @contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, and bf16 autocast on a GPU."""
        with torch.no_grad(), torch.autocast(self.wm.device.type, torch.bfloat16, enabled=self.low_precision):
            yield

    def rollout(self, context_frames: Tensor, actions: Tensor, horizon: int, samples: int = 1) -> Tensor:
        """Video (R, t0 + F, C, H, W) after ``context_frames`` (B, t0, C, H, W); ``actions`` are (R, T, A)."""
        with self.running():
            prompt = self.layout.prompt(self.wm.tokenizer.encode_context(context_frames)[0])
            prompt = prompt.repeat_interleave(samples, dim=0)
            slots = self.layout.slot_actions(actions, horizon)
            rows = zip(prompt.split(ROWS_AT_ONCE), slots.split(ROWS_AT_ONCE), strict=True)
            return torch.cat([self._rows(ids, acts, horizon) for ids, acts in rows])

    def _rows(self, prompt: Tensor, slot_actions: Tensor, horizon: int) -> Tensor:
        clip = self.clip(prompt, horizon)
        tokens = [prompt[:, :-1]]
        for index in range(horizon):
            tokens += [prompt[:, -1:], clip.frame(slot_actions[:, index])[0]]
        del clip
        return self.wm.tokenizer.detokenize(torch.cat(tokens, dim=1)).clamp(0.0, 1.0).float()

    def session(self, context_frames: Tensor) -> BaselineSession:
        """A rollout from ``context_frames`` (B, t0, C, H, W) that is driven one action at a time."""
        return BaselineSession(self, context_frames)


class BaselineSession:
    """Steps of a baseline, with the newest frame's pixels; past the positions the newest frames are the context."""

    def __init__(self, baseline: Baseline, context_frames: Tensor) -> None:
        self.baseline = baseline
        self.longest = baseline.wm.config.max_horizon
        self._start(context_frames)

    def _start(self, context_frames: Tensor) -> None:
        wm = self.baseline.wm
        with self.baseline.running():
            indices = wm.tokenizer.encode_context(context_frames)[0]
            self.prompt = self.baseline.layout.prompt(indices)
            self.features = wm.tokenizer.decode_context(indices)[1]
            self.clip = self.baseline.clip(self.prompt, self.longest)
        self.recent = list(context_frames.unbind(1))
        self.taken = 0

    def step(self, action: Tensor) -> tuple[Tensor, Tensor | None]:
        """Frame (B, C, H, W) and reward (B,), None without a reward head, after ``action`` (B, A)."""
        if self.taken == self.longest:
            self._start(torch.stack(self.recent, dim=1))
        wm = self.baseline.wm
        with self.baseline.running():
            ids, hidden = self.clip.frame(action)
            tokens = torch.cat([self.prompt, ids], dim=1)
            indices = self.baseline.layout.split(tokens)[1]
            frame = wm.tokenizer.decode_future(indices, self.features)[:, 0].clamp(0.0, 1.0).float()
            reward = None
            if wm.reward_head is not None:
                assert hidden is not None
                reward = wm.reward_head.predict(hidden)
        self.recent = [*self.recent[1:], frame]
        self.taken += 1
        return frame, reward


class Original(Baseline):
    """One ``generate`` a frame, the prefix anew each time."""

    name = "original"

    def clip(self, prompt: Tensor, horizon: int) -> Clip:
        return _OriginalClip(self, prompt)


class _OriginalClip:
    def __init__(self, baseline: Original, prompt: Tensor) -> None:
        self.baseline = baseline
        self.slot = prompt[:, -1:]
        self.embeddings = baseline.step_embeddings(prompt)

    def frame(self, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        baseline, count = self.baseline, self.baseline.layout.dynamics_tokens_per_frame
        self.embeddings[:, -1] += baseline.action_embeddings(actions).to(self.embeddings.dtype)
        rewarded = baseline.wm.reward_head is not None
        choice: dict[str, Any] = {"do_sample": False}
        if baseline.sample:
            choice = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
        result = baseline.llama.generate(
            inputs_embeds=self.embeddings,
            max_new_tokens=count + rewarded,
            use_cache=True,
            return_dict_in_generate=True,
            output_hidden_states=rewarded,
            output_logits=not baseline.sample,
            **choice,
        )
        if not baseline.sample:
            baseline.logits += result.logits[:count]
        ids = result.sequences[:, :count]
        added = baseline.step_embeddings(torch.cat([ids, self.slot], dim=1))
        self.embeddings = torch.cat([self.embeddings, added], dim=1)
        return ids, result.hidden_states[-1][-1][:, -1] if rewarded else None


class HfCached(Baseline):
    """One prefill into HF's static cache, then one token at a time."""

    name = "hf-cached"

    def __init__(self, wm: WorldModel, sample: bool = True, full_precision: bool = False) -> None:
        super().__init__(wm, sample, full_precision)
        if self.low_precision:
            self.llama = copy.deepcopy(self.llama).to(torch.bfloat16)

    def clip(self, prompt: Tensor, horizon: int) -> Clip:
        return _CachedClip(self, prompt, horizon)


class _CachedClip:
    def __init__(self, baseline: HfCached, prompt: Tensor, horizon: int) -> None:
        from transformers import StaticCache

        self.baseline = baseline
        layout = baseline.layout
        # a whole number of frames of room: attention over a static cache looks at all of it
        capacity = layout.context_span + layout.frame_stride * horizon
        self.cache = StaticCache(config=baseline.llama.config, max_cache_len=capacity)
        # transformers renamed it within its fifth version
        newer = "cache" in inspect.signature(baseline.llama.model.forward).parameters
        self.cache_argument = "cache" if newer else "past_key_values"
        self.positions = torch.arange(capacity, device=prompt.device)[None]
        self.length = 0
        self.slot = prompt[:, -1:]
        self.waiting = prompt  # ids that are not in the cache yet

    def _feed(self, embeddings: Tensor) -> Tensor:
        """Final hidden state (R, D) of the last of ``embeddings`` (R, L, D)."""
        llama, end = self.baseline.llama, self.length + embeddings.shape[1]
        out = llama.model(
            inputs_embeds=embeddings.to(llama.dtype),
            position_ids=self.positions[:, self.length : end],
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        self.length = end
        return out.last_hidden_state[:, -1]

    def _draw(self, hidden: Tensor) -> Tensor:
        logits = self.baseline.llama.lm_head(hidden).float()
        if not self.baseline.sample:
            self.baseline.logits.append(logits)
            return logits.argmax(dim=-1, keepdim=True)
        scores, ids = (logits / TEMPERATURE).topk(min(TOP_K, logits.shape[-1]), dim=-1)
        return ids.gather(1, torch.multinomial(scores.softmax(dim=-1), 1))

    def frame(self, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        baseline, count = self.baseline, self.baseline.layout.dynamics_tokens_per_frame
        embeddings = baseline.step_embeddings(self.waiting)
        embeddings[:, -1] += baseline.action_embeddings(actions).to(embeddings.dtype)
        tokens = [self._draw(self._feed(embeddings))]
        while len(tokens) < count:
            tokens.append(self._draw(self._feed(baseline.step_embeddings(tokens[-1]))))
        ids = torch.cat(tokens, dim=1)
        if baseline.wm.reward_head is None:
            self.waiting = torch.cat([tokens[-1], self.slot], dim=1)
            return ids, None
        hidden = self._feed(baseline.step_embeddings(tokens[-1]))
        self.waiting = self.slot
        return ids, hidden.float()


def check_same_work(wm: WorldModel, frames: int = 2, tolerance: float = 1e-3) -> dict[str, Any]:
    """Compares what the baselines compute with ``wm``, in float32: argmax ids of some frames, and all their logits.

    The logits are those that the baselines themselves draw from, step by step, against the world model's over the
    whole clip: so caches, positions and actions are seen too, which argmax of a random model may not show.

    Args:
        wm: the world model whose rollouts are timed.
        frames: frames of the clip; with two the second action and what comes behind the first frame are seen too.
        tolerance: largest difference of logits, and the margin below which argmax may go either way; what follows such
            a tie is another clip and is not compared.

    Returns:
        What was compared and how far it differed.

    Raises:
        DifferentWorkError: if something differs.
    """
    layout, device = wm.layout, wm.device
    generator = torch.Generator().manual_seed(1)
    config = wm.config.tokenizer
    shape = (1, layout.context_length, config.in_channels, config.resolution, config.resolution)
    context = torch.rand(shape, generator=generator).to(device)
    actions = torch.randn(1, layout.context_length + frames, wm.config.action_dim or 0, generator=generator).to(device)
    exact: dict[str, Any] = {}
    if "precision" in inspect.signature(wm.rollout).parameters:
        exact["precision"] = "float32"
    with torch.inference_mode():
        prediction = wm.rollout(context, actions=actions, horizon=frames, temperature=0.0, **exact)
        logits = wm(prediction.tokens, actions).logits[:, layout.context_span :]
    expected = logits[0].unflatten(0, (frames, -1))[:, :-1].flatten(0, 1)  # of the frames' ids, without the slots
    ours = prediction.tokens[0, layout.context_span :].unflatten(0, (frames, -1))[:, 1:].flatten()
    report: dict[str, Any] = {"frames": frames, "tolerance": tolerance}
    for kind in (Original, HfCached):
        baseline = kind(wm, sample=False, full_precision=True)
        with baseline.running():
            clip = baseline.clip(prediction.tokens[:, : layout.prompt_length], frames)
            slots = layout.slot_actions(actions, frames)
            ids = torch.cat([clip.frame(slots[:, index])[0][0] for index in range(frames)])
        different = (ids != ours).nonzero()
        equal = int(different[0]) if len(different) else len(ids)
        compared = min(equal + 1, len(ids))  # the draw that differs first had the same past, too
        found = torch.cat(baseline.logits[:compared])
        error = float((found - expected[:compared]).abs().max())
        if not error <= tolerance:
            raise DifferentWorkError(f"{kind.name}: logits differ from the world model's by {error:.3g}")
        margin = float(expected[equal, ours[equal]] - expected[equal, ids[equal]]) if equal < len(ids) else 0.0
        if abs(margin) > tolerance:
            raise DifferentWorkError(f"{kind.name}: argmax ids differ: {ids.tolist()} and {ours.tolist()}")
        report[kind.name] = {"logits_max_difference": error, "equal_ids": equal, "ids": len(ids)}
    return report
