"""KernelDecoder: the decoder for CPUs, whose decode steps run in one compiled kernel.

A decode step reads all weights once for little arithmetic, so its time is the memory's: the weights are packed in the
order in which each thread reads them, in as few bytes as the precision allows, and a frame is one call.

B clips, S rows a clip, R = B*S rows, P positions of the prefix, L new positions, n tokens of a frame, A action size,
D embed_dim, H query heads, K key/value heads, d head_dim, N layers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.models.transformer import Attention, Block, RMSNorm, SwiGLU, Transformer
from ivideogpt.rollout.cpu import packing
from ivideogpt.rollout.cpu.build import load_kernel, why_unavailable
from ivideogpt.rollout.cpu.fixed import has_fixed_products
from ivideogpt.rollout.cpu.prefill import context_keys_values
from ivideogpt.rollout.decoder import Branch, Sampled
from ivideogpt.rollout.sampling import Sampling

_BAD_ID, _NO_MEMORY = 1, 2


@dataclass(frozen=True)
class KernelPrefix:
    """Keys and values of B clips' contexts, packed: (N, B, K, P rounded up to 16, d) each; never written again."""

    keys: Tensor
    values: Tensor
    clips: int
    length: int


class KernelBranch:
    """Keys and values of the rows' own positions (N, R, K, room, d), behind their clips' prefixes.

    Attributes:
        rows: R.
        length: own positions that are filled; setting it to a smaller number rewinds.
        capacity: own positions that there is room for.
    """

    def __init__(
        self, prefix: KernelPrefix, samples: int, capacity: int, rope: tuple[Tensor, Tensor], keys: Tensor,
        values: Tensor,
    ) -> None:  # fmt: skip
        self.prefix = prefix
        self.samples = samples
        self.rows = prefix.clips * samples
        self.capacity = capacity
        self.length = 0
        self._rope = rope
        self._keys, self._values = keys, values

    def fork(self) -> KernelBranch:
        """An independent branch from here on: the prefix is shared, the filled own positions are copied."""
        keys, values = torch.empty_like(self._keys), torch.empty_like(self._values)
        fork = KernelBranch(self.prefix, self.samples, self.capacity, self._rope, keys, values)
        fork.length = self.length
        filled = packing.whole(self.length, packing.KEYS)
        keys[..., :filled, :] = self._keys[..., :filled, :]  # whole blocks of 16 positions, whatever order is inside
        shape = (*values.shape[:3], -1, values.shape[3], packing.value_chunk(values.shape[4]))
        values.view(shape)[..., :filled, :] = self._values.view(shape)[..., :filled, :]
        return fork

    def rest(self) -> None:
        """It holds nothing but its positions."""

    def positions(self) -> packing.Positions:
        """The kernel's view of all this."""
        cos, sin = self._rope
        return packing.Positions(
            self.prefix.keys.data_ptr(), self.prefix.values.data_ptr(), self._keys.data_ptr(),
            self._values.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            self.rows, self.samples, self.prefix.length, self._keys.shape[3], self.length,
        )  # fmt: skip


def supported(transformer: Transformer, precision: str = "float32") -> str | None:
    """Why ``transformer`` can't be run in ``precision`` here; None if it can."""
    library = load_kernel()
    if library is None:
        return why_unavailable()
    if precision not in packing.TYPES:
        return f"precision must be one of {', '.join(packing.TYPES)}, got {precision!r}"
    if precision == "float16" and not library.ivideogpt_has_float16():
        return "the compiler knows no float16 on this processor"
    head_dim = transformer.config.head_dim
    if head_dim is None or head_dim % 16:
        return f"head_dim must be a multiple of 16, got {head_dim}"
    tensors = [*transformer.parameters(), *transformer.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "the transformer is not on the CPU"
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        return f"weights must be all float32 or all bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    known = (Transformer, nn.Embedding, nn.ModuleList, Block, Attention, SwiGLU, RMSNorm, nn.Linear)
    for name, module in transformer.named_modules():
        if type(module) not in known:
            return f"{name or 'the transformer'} is a {type(module).__name__}, which the kernel does not know"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the transformer'} has hooks, which the kernel would not call"
    return None


class KernelDecoder:
    """Runs a transformer's decode steps in the compiled kernel (``decoder.Decoder``).

    The weights are copied as they are now: after an update of the transformer, build another decoder. A prefix comes
    from the transformer's own weights (:mod:`ivideogpt.rollout.cpu.prefill`).

    Args:
        transformer: one that :func:`supported` says nothing against; kept by the caller.
        precision: how weights are stored: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` (with a float32
            scale per output and group of 128 inputs). Activations and sums are float32. Keys and values are float32
            for float32 weights, else float16. The prefill uses the transformer's own weights: in float32 for
            ``"float32"``, else in products by 16-bit integers where the processor has them
            (:mod:`ivideogpt.rollout.cpu.fixed`).

    Attributes:
        precision: as given.
        bytes_per_step: bytes of weights that one decode step reads, the head over the whole vocabulary included.
        idle_bytes: none: it keeps nothing for branches to come.
    """

    idle_bytes = 0

    def __init__(self, transformer: Transformer, precision: str = "float32") -> None:
        reason = supported(transformer, precision)
        assert reason is None, reason
        library = load_kernel()
        assert library is not None
        self.precision = precision
        self._library = library
        self._source = ref(transformer)  # for the prefill; a decoder that is kept must not keep it alive
        self._config = transformer.config
        longest = transformer.config.max_positions + packing.KEYS  # branches are filled up to whole blocks
        self._rope = transformer.rope(torch.arange(longest), torch.float32)
        half = precision != "float32" and bool(library.ivideogpt_has_float16())
        self._fixed = precision != "float32" and has_fixed_products()
        self._kv_dtype = torch.float16 if half else torch.float32
        self._kept: list[Tensor] = []  # what the structs point to
        with torch.inference_mode():
            self._pack(transformer)

    def prefill(self, tokens: Tensor) -> KernelPrefix:
        """The prefix of ``tokens`` (B, P)."""
        transformer = self._source()
        assert transformer is not None, "the transformer that this decoder was made from is gone"
        clips, length = tokens.shape
        keys, values = self._empty(clips, length), self._empty(clips, length)
        for layer, (k, v) in enumerate(context_keys_values(transformer, tokens, self._fixed)):
            packing.pack_keys(k, keys[layer])
            packing.pack_values(v, values[layer])
        return KernelPrefix(keys, values, clips, length)

    def branch(self, prefix: KernelPrefix, samples: int, capacity: int) -> KernelBranch:
        """An empty branch of B * ``samples`` rows with room for ``capacity`` own positions."""
        assert samples >= 1 and capacity >= 0
        longest = self._config.max_positions
        if prefix.length + capacity > longest:  # the kernel reads a row of the rope table for each of them
            raise ValueError(f"{prefix.length} + {capacity} positions are beyond the transformer's {longest}")
        rows, room = prefix.clips * samples, max(packing.whole(capacity, packing.KEYS), packing.KEYS)
        own = slice(prefix.length, prefix.length + room)
        rope = self._rope[0][own], self._rope[1][own]
        return KernelBranch(prefix, samples, capacity, rope, self._empty(rows, room), self._empty(rows, room))

    def feed(self, branch: Branch, tokens: Tensor, actions: Tensor | None = None, action_at: int = -1) -> Tensor:
        """Final normed hidden states (R, L, D), float32, of the next ``tokens`` (R, L), which the branch then holds."""
        hidden = self._forward(branch, tokens, actions, action_at, None)
        branch.length += tokens.shape[1]
        return hidden

    def logits(self, hidden: Tensor, sampling: Sampling) -> Tensor:
        """Logits (..., V) float32 of the ids that ``sampling`` allows, from ``hidden`` (..., D)."""
        first, last = self._ids(sampling)
        rows = hidden.detach().float().contiguous().view(-1, self._model.dim)
        out = torch.empty(*hidden.shape[:-1], last - first + 1, dtype=torch.float32, device="cpu")
        self._library.ivideogpt_product(
            ctypes.byref(self._model.head), rows.data_ptr(), len(rows), first, last, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def sample(
        self, branch: Branch, lead: Tensor, actions: Tensor | None, uniforms: Tensor, sampling: Sampling
    ) -> Sampled:
        """Feeds ``lead`` (R, L), then draws n tokens one after another, feeding each but the last, in one call."""
        count = uniforms.shape[1]
        assert count >= 1 and uniforms.shape == (branch.rows, count)
        assert branch.length + lead.shape[1] + count - 1 <= branch.capacity, "the branch is full"
        first, last = self._ids(sampling)
        uniforms = uniforms.float().contiguous()
        tokens = torch.empty(branch.rows, count, dtype=torch.int64, device="cpu")
        draws = packing.Draws(
            uniforms.data_ptr(), tokens.data_ptr(), count, first, last, sampling.top_k or 0, sampling.temperature,
            sampling.greedy,
        )  # fmt: skip
        hidden = self._forward(branch, lead, actions, -1, draws)
        branch.length += lead.shape[1] + count - 1
        return Sampled(tokens, hidden)

    def _forward(
        self, branch: Branch, tokens: Tensor, actions: Tensor | None, action_at: int, draws: packing.Draws | None
    ) -> Tensor:
        rows, count = tokens.shape
        assert isinstance(branch, KernelBranch) and -count <= action_at < count
        assert rows == branch.rows and count >= 1 and tokens.dtype == torch.int64 and tokens.device.type == "cpu"
        assert branch.length >= 0 and branch.length + count <= branch.capacity, "the branch is full"
        tokens = tokens.contiguous()
        added = self._embed_actions(actions, rows) if actions is not None else None
        hidden = torch.empty(rows, count, self._model.dim, dtype=torch.float32, device="cpu")
        status = self._library.ivideogpt_forward(
            ctypes.byref(self._model), ctypes.byref(branch.positions()), tokens.data_ptr(), count,
            None if added is None else added.data_ptr(), action_at % count,
            None if draws is None else ctypes.byref(draws),
            hidden.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        assert status != _BAD_ID, f"token ids must lie in [0, {self._model.vocab})"
        if status == _NO_MEMORY:
            raise MemoryError("no memory for the activations of a decode step")
        return hidden

    def _embed_actions(self, actions: Tensor, rows: int) -> Tensor:
        assert self._action is not None, "the transformer has no action layer"
        assert actions.shape == (rows, self._action[0].shape[1])
        return F.linear(actions.detach().float(), *self._action).contiguous()

    def _ids(self, sampling: Sampling) -> tuple[int, int]:
        first = sampling.first_id
        last = self._model.vocab - 1 if sampling.last_id is None else sampling.last_id
        assert 0 <= first <= last < self._model.vocab, f"ids {first} to {last} of {self._model.vocab}"
        return first, last

    def _empty(self, rows: int, positions: int) -> Tensor:
        """Room (N, rows, K, positions rounded up to 16, d) for keys or values."""
        config = self._config
        assert config.num_kv_heads is not None and config.head_dim is not None
        shape = (
            config.num_layers, rows, config.num_kv_heads, packing.whole(positions, packing.KEYS), config.head_dim
        )  # fmt: skip
        count = torch.Size(shape).numel() * self._kv_dtype.itemsize
        return packing.empty_bytes(count, self._library).view(self._kv_dtype).view(shape)

    def _pack(self, transformer: Transformer) -> None:
        config = transformer.config
        blocks: list[Any] = list(transformer.layers)
        groups: list[tuple[nn.Linear, ...]] = []
        for layer in blocks:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            groups += [qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
        groups.append((transformer.lm_head,))
        shapes = [(_rows(group), group[0].in_features) for group in groups]
        sizes = [packing.packed_bytes(*shape, self.precision) for shape in shapes]
        self.bytes_per_step = sum(sizes)
        memory = packing.empty_bytes(sum(packing.whole(size, 64) for size in sizes), self._library)
        self._kept.append(memory)
        matrices, start = [], 0
        for group, size in zip(groups, sizes, strict=True):
            matrices.append(self._matrix(group, memory.narrow(0, start, size)))
            start += packing.whole(size, 64)
        layers = (packing.Layer * config.num_layers)()
        for index, layer in enumerate(blocks):
            norms = (self._norm(layer.input_layernorm), self._norm(layer.post_attention_layernorm))
            layers[index] = packing.Layer(*norms, *matrices[4 * index : 4 * index + 4])
        embedding = self._keep(transformer.embed_tokens.weight.float().clone())
        self._model = packing.Model(
            embedding, self._norm(transformer.norm), layers, matrices[-1],
            config.num_layers, config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim,
            config.mlp_dim, config.vocab_size, config.norm_eps,
            packing.TYPES["float16" if self._kv_dtype == torch.float16 else "float32"],
        )  # fmt: skip
        self._action: tuple[Tensor, Tensor] | None = None
        if transformer.action_linear is not None:
            weight, bias = transformer.action_linear.weight, transformer.action_linear.bias
            self._action = (weight.float().clone(), bias.float().clone())

    def _matrix(self, group: tuple[nn.Linear, ...], out: Tensor) -> packing.Matrix:
        """Packs linear layers that read the same input as one; two of them (gate and up) block by block in turn."""
        weights: list[Tensor] = [linear.weight for linear in group]
        biases: list[Tensor] = [linear.bias for linear in group]
        if len(group) == 2:
            weight = packing.interleave(*weights)
        else:
            weight = torch.cat(weights) if len(group) > 1 else weights[0]
        pointer = None
        if biases[0] is not None:
            bias = packing.interleave(*biases) if len(group) == 2 else torch.cat(biases)
            pointer = self._keep(packing.pack_bias(bias))
        return packing.pack(self._library, weight, self.precision, out, pointer)

    def _norm(self, norm: RMSNorm) -> int:
        return self._keep(packing.pack_bias(norm.weight).clone())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _rows(group: tuple[nn.Linear, ...]) -> int:
    """Outputs of linear layers that are packed as one; of two that alternate, each is filled up to whole blocks."""
    if len(group) == 2:
        return 2 * packing.whole(group[0].out_features, packing.BLOCK)
    return sum(linear.out_features for linear in group)
