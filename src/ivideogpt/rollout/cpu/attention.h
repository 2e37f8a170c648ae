// Attention of rows over their clip's prefix, which they share, and over their own positions, in one softmax.
//
// Keys of a head lie in blocks of 16 positions, (blocks, d, 16), so that the scores of 16 positions are one vector.
// Values lie in chunks of 32 (or 16) features, (d / chunk, positions, chunk). Both are read as one sequential stream.
#pragma once
#include <type_traits>

#include "model.h"

// Attention of the queries of one key/value head of the rows [row, row_end), all of one clip. `base` is the first row
// of the chunk that the workspace holds.
template <class KV>
static void attend(const Model& m, const Branch& b, const Workspace& w, int64_t layer, int64_t kv_head, int64_t base,
                   int64_t row, int64_t row_end, int64_t length, int64_t tokens, float* own) {
  const int64_t d = m.head_dim, groups = m.heads / m.kv_heads, half = d / 2, chunk = d % 32 ? 16 : 32;
  const int64_t clip = row / b.samples, clips = b.rows / b.samples, prefix = b.prefix_length;
  const int64_t prefix_room = whole(prefix, KEYS), own_room = b.capacity;
  const int64_t of_clip = ((layer * clips + clip) * m.kv_heads + kv_head) * prefix_room * d * KV::bytes;
  const int64_t rope_at = length * d;
  float *q = own, *scores = own + MAX_QUERIES * d;
  auto of_row = [&](int64_t r) { return ((layer * b.rows + r) * m.kv_heads + kv_head) * own_room * d * KV::bytes; };
  // own positions are short pieces: memory is asked for one row ahead
  auto after = [&](int64_t r) { return r + 1 < b.rows ? of_row(r + 1) - of_row(r) : NEAR; };
  auto turned = [&](const float* x, int64_t position, int64_t i) {  // rotary embedding: i turns with i + d/2
    const float *cos = b.cos + rope_at + position * d, *sin = b.sin + rope_at + position * d;
    return i < half ? x[i] * cos[i] - x[i + half] * sin[i] : x[i] * cos[i] + x[i - half] * sin[i];
  };

  auto keep = [&](int64_t r) {  // the keys and values of a row's new positions
    for (int64_t l = 0; l < tokens; l++) {
      const float* k = w.qkv + ((r - base) * tokens + l) * w.qkv_wide + (m.heads + kv_head) * d;
      const float* v = k + m.kv_heads * d;
      const int64_t at = length + l, block = at / KEYS * KEYS;
      char *keys = b.keys + of_row(r), *values = b.values + of_row(r);
      if (at == block) std::memset(keys + block * d * KV::bytes, 0, KEYS * d * KV::bytes);
      for (int64_t i = 0; i < d; i++) KV::put(keys, block * d + i * KEYS + at - block, turned(k, l, i));
      for (int64_t i = 0; i < d; i++) KV::put(values, (i / chunk * own_room + at) * chunk + i % chunk, v[i]);
    }
  };

  const int64_t queries = (row_end - row) * tokens * groups;  // row by row, position by position, head by head
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t start = 0; start < queries; start += MAX_QUERIES) {
    const int64_t count = std::min<int64_t>(MAX_QUERIES, queries - start);
    auto token_of = [&](int64_t n) { return (start + n) / groups; };  // among the rows' tokens
    auto head_of = [&](int64_t n) { return kv_head * groups + (start + n) % groups; };
    for (int64_t n = 0; n < count; n++) {
      const float* x = w.qkv + ((row - base) * tokens + token_of(n)) * w.qkv_wide + head_of(n) * d;
      for (int64_t i = 0; i < d; i++) q[n * d + i] = turned(x, token_of(n) % tokens, i) * scale;
    }
    const char* keys = b.prefix_keys + of_clip;
    for (int64_t p = 0; p < prefix; p += KEYS, keys += KEYS * d * KV::bytes)
      panel_of<KV, KEYS, MAX_QUERIES>(count, keys, q, d, d, 0, Ahead{keys + NEAR, KEYS * KV::bytes}, scores + p,
                                      w.scores_wide);
    float sums[MAX_QUERIES];
    for (int64_t n = 0; n < count; n++) {
      float* mine = scores + n * w.scores_wide;
      const int64_t seen = length + token_of(n) % tokens + 1, end = prefix_room + whole(seen, KEYS);
      const int64_t r = row + token_of(n) / tokens;
      if ((start + n) % (tokens * groups) == 0) keep(r);
      const char* keys = b.keys + of_row(r);
      for (int64_t p = 0; p < seen; p += KEYS, keys += KEYS * d * KV::bytes)
        panel<KV, 1, KEYS>(keys, q + n * d, d, d, 0, Ahead{keys + after(r), KEYS * KV::bytes},
                           mine + prefix_room + p, 0);
      std::fill(mine + prefix, mine + prefix_room, -INFINITY);
      std::fill(mine + prefix_room + seen, mine + end, -INFINITY);
      sums[n] = softmax_weights(mine, end);
    }
    for (int64_t c = 0; c < d; c += chunk) {
      alignas(64) float seen_before[MAX_QUERIES][32], seen_own[32];
      auto weigh = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const char* values = b.prefix_values + of_clip + c * prefix_room * KV::bytes;
        panel_of<KV, W, MAX_QUERIES>(count, values, scores, w.scores_wide, prefix, 0,
                                     Ahead{values + NEAR, W * KV::bytes}, seen_before[0], 32);
        for (int64_t n = 0; n < count; n++) {
          const int64_t r = row + token_of(n) / tokens;
          const char* values = b.values + of_row(r) + c * own_room * KV::bytes;
          const int64_t seen = length + token_of(n) % tokens + 1;
          panel<KV, 1, W>(values, scores + n * w.scores_wide + prefix_room, 0, seen, 0,
                          Ahead{values + after(r), W * KV::bytes}, seen_own, 32);
          float* out = w.heads + ((row - base) * tokens + token_of(n)) * w.heads_wide + head_of(n) * d + c;
          for (int64_t i = 0; i < W; i++) out[i] = (seen_before[n][i] + seen_own[i]) / sums[n];
        }
      };
      if (chunk == 32)
        weigh(std::integral_constant<int, 32>{});
      else
        weigh(std::integral_constant<int, 16>{});
    }
  }
}

static void attention(const Model& m, const Branch& b, const Workspace& w, int64_t layer, int64_t base, int64_t rows,
                      int64_t length, int64_t tokens, Team team, float* own) {
  // rows go in groups that fill a panel of queries; a group does not cross from clip to clip
  const int64_t group = std::max<int64_t>(1, MAX_QUERIES / (tokens * m.heads / m.kv_heads));
  int64_t groups = 0;
  auto next = [&](int64_t row) { return std::min({row + group, (row / b.samples + 1) * b.samples, base + rows}); };
  for (int64_t row = base; row < base + rows; row = next(row)) groups++;
  const int64_t begin = team.begin(groups * m.kv_heads), end = team.end(groups * m.kv_heads);
  for (int64_t head = begin / groups; head * groups < end; head++) {
    int64_t unit = head * groups;
    for (int64_t row = base; row < base + rows; row = next(row), unit++)
      if (unit >= begin && unit < end) {
        if (m.kv_type == FLOAT32)
          attend<Float32>(m, b, w, layer, head, base, row, next(row), length, tokens, own);
        else
          attend<Float16>(m, b, w, layer, head, base, row, next(row), length, tokens, own);
      }
  }
}
