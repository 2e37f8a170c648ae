// What a call of the kernel is handed, as packing.py declares it too, and the memory that it works in.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "gemm.h"

constexpr int KEYS = 16;  // positions of a block of keys

struct Layer {
  const float *attention_norm, *mlp_norm;  // (D), padded to whole blocks with zeros
  Matrix qkv, out, gate_up, down;          // gate and up in turns, block by block
};

struct Model {
  const float *embedding, *norm;  // (vocab, D), (D) padded
  const Layer* layers;
  Matrix head;
  int64_t num_layers, dim, heads, kv_heads, head_dim, mlp_dim, vocab;
  float eps;
  int32_t kv_type;
};

struct Branch {
  const char *prefix_keys, *prefix_values;  // (layers, B, K, ...)
  char *keys, *values;                      // (layers, rows, K, ...), room for `capacity` positions, a multiple of 16
  const float *cos, *sin;                   // (capacity, d): the own positions'
  int64_t rows, samples, prefix_length, capacity, length;
};

struct Draws {
  const float* uniforms;  // (rows, count)
  int64_t* tokens;        // (rows, count), written
  int64_t count, first_id, last_id, top_k;  // top_k 0: all
  float temperature;
  int32_t greedy;
};

enum Status : int32_t { DONE = 0, BAD_ID = 1, NO_MEMORY = 2 };

static int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
static int64_t padded(int64_t n) { return whole(n, BLOCK) + KEYS; }  // rows a power of two apart would share cache sets

struct Memory {  // one piece that is cut up
  char* base = nullptr;
  int64_t used = 0;
  ~Memory() { std::free(base); }
  float* cut(int64_t floats) {
    const int64_t at = used;
    used += whole(floats * 4, 64);
    return base ? reinterpret_cast<float*>(base + at) : nullptr;
  }
};

struct Workspace {  // shared by the threads of a call
  int64_t wide, qkv_wide, heads_wide, mlp_wide, logits_wide, scores_wide;
  float *x, *normed, *qkv, *heads, *mlp, *logits, *own;
  int64_t own_floats;
  void cut(Memory& memory, const Model& m, const Branch& b, int64_t rows, int64_t tokens, int64_t ids,
           int64_t threads) {
    wide = padded(m.dim), qkv_wide = padded((m.heads + 2 * m.kv_heads) * m.head_dim);
    heads_wide = padded(m.heads * m.head_dim), mlp_wide = padded(m.mlp_dim), logits_wide = padded(ids + BLOCK);
    scores_wide = whole(b.prefix_length, KEYS) + b.capacity + KEYS;
    x = memory.cut(tokens * wide), normed = memory.cut(tokens * wide), qkv = memory.cut(tokens * qkv_wide);
    heads = memory.cut(tokens * heads_wide), mlp = memory.cut(tokens * mlp_wide);
    logits = memory.cut(ids ? rows * logits_wide : 0);
    own_floats = std::max({MAX_QUERIES * (m.head_dim + scores_wide), 2 * logits_wide, 4 * wide});
    own = memory.cut(threads * whole(own_floats, KEYS));
  }
};
