// Decode steps of a LLaMA-style transformer on a CPU: `forward` feeds positions and samples whole frames in one call.
//
// B clips, S rows a clip, row b*S + s continues clip b; L fed positions a row, M = rows * L tokens, D embed_dim,
// H query heads, K key/value heads, d head_dim. One parallel region a call; between two barriers each thread owns fixed
// blocks of weights, or fixed heads. All memory that is written is the caller's or belongs to this call.
#include <omp.h>
#include <sys/mman.h>

#include "attention.h"
#include "draw.h"
#include "model.h"
#include "pack.h"

static void rms_norm(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  const int64_t end = whole(dim, BLOCK);  // zeros behind dim
  Vec squares{};
  for (int64_t i = 0; i < end; i += LANES) squares += load(x + i) * load(x + i);
  const float scale = 1.0f / std::sqrt(sum_of(squares) / dim + eps);
  for (int64_t i = 0; i < end; i += LANES) store(out + i, load(weight + i) * (load(x + i) * scale));
}

// Runs w.x, `tokens` consecutive positions of each of `rows` rows, through all layers. Begins and ends with a barrier.
static void run_layers(const Model& m, const Branch& b, const Workspace& w, int64_t base, int64_t rows, int64_t length,
                       int64_t tokens, Team team, float* own) {
  const int64_t count = rows * tokens, blocks = whole(m.dim, BLOCK) / BLOCK;
  const bool few = count <= 4;  // each thread then computes all norms for itself, which is cheaper than a barrier
  auto normed = [&](const float* weight) {
    float* out = few ? own : w.normed;
    for (int64_t t = few ? 0 : team.begin(count); t < (few ? count : team.end(count)); t++)
      rms_norm(w.x + t * w.wide, weight, m.dim, m.eps, out + t * w.wide);
    if (!few) team.meet();
    return out;
  };
  auto add_to_x = [&](const Matrix& matrix) {
    return [&w, bias = matrix.bias](int64_t item, float (*sums)[BLOCK], int64_t top, int64_t rows) {
      for (int64_t r = 0; r < rows; r++) {
        float* x = w.x + (top + r) * w.wide + item * BLOCK;
        for (int i = 0; i < BLOCK; i++) x[i] += sums[r][i] + (bias ? bias[item * BLOCK + i] : 0.0f);
      }
    };
  };
  team.meet();
  for (int64_t layer = 0; layer < m.num_layers; layer++) {
    const Layer& of = m.layers[layer];
    const float* x = normed(of.attention_norm);
    product(of.qkv, x, w.wide, count, 0, whole(of.qkv.outputs, BLOCK) / BLOCK, 1, team,
            [&](int64_t item, float (*sums)[BLOCK], int64_t top, int64_t rows) {
              for (int64_t r = 0; r < rows; r++)
                for (int i = 0; i < BLOCK; i++)
                  w.qkv[(top + r) * w.qkv_wide + item * BLOCK + i] =
                      sums[r][i] + (of.qkv.bias ? of.qkv.bias[item * BLOCK + i] : 0.0f);
            });
    team.meet();
    attention(m, b, w, layer, base, rows, length, tokens, team, own);
    team.meet();
    product(of.out, w.heads, w.heads_wide, count, 0, blocks, 1, team, add_to_x(of.out));
    team.meet();
    x = normed(of.mlp_norm);
    product(of.gate_up, x, w.wide, count, 0, whole(m.mlp_dim, BLOCK) / BLOCK, 2, team,
            [&](int64_t item, float (*sums)[BLOCK], int64_t top, int64_t rows) {
              const float* bias = of.gate_up.bias ? of.gate_up.bias + item * 2 * BLOCK : nullptr;
              for (int64_t r = 0; r < rows; r++)
                for (int i = 0; i < BLOCK; i += LANES) {
                  Vec gate = load(sums[r] + i), up = load(sums[MAX_TOKENS + r] + i);
                  if (bias) gate += load(bias + i), up += load(bias + BLOCK + i);
                  store(w.mlp + (top + r) * w.mlp_wide + item * BLOCK + i, gate / (1.0f + exponential(-gate)) * up);
                }
            });
    team.meet();
    product(of.down, w.mlp, w.mlp_wide, count, 0, blocks, 1, team, add_to_x(of.down));
    team.meet();
  }
}

static void embed(const Model& m, const Workspace& w, int64_t token, int64_t id, const float* action) {
  float* x = w.x + token * w.wide;
  std::memcpy(x, m.embedding + id * m.dim, m.dim * 4);
  std::fill(x + m.dim, x + whole(m.dim, BLOCK), 0.0f);
  if (action)
    for (int64_t i = 0; i < m.dim; i++) x[i] += action[i];
}

struct Call {
  const Model& m;
  const Branch& b;
  const int64_t* tokens;  // (rows, L)
  int64_t length;         // L
  const float* actions;   // (rows, D), added to the embedding of token `action_at` of the L; or null
  int64_t action_at;
  const Draws* draws;     // or null
  float* hidden;          // (rows, L, D), written
};

static void run_chunk(const Call& call, const Workspace& w, int64_t base, int64_t rows, Team team, float* own) {
  const Model& m = call.m;
  const int64_t L = call.length, blocks_first = call.draws ? call.draws->first_id / BLOCK : 0;
  for (int64_t t = team.begin(rows * L); t < team.end(rows * L); t++) {
    const float* action = call.actions && t % L == call.action_at ? call.actions + (base + t / L) * m.dim : nullptr;
    embed(m, w, t, call.tokens[base * L + t], action);
  }
  run_layers(m, call.b, w, base, rows, call.b.length, L, team, own);
  for (int64_t t = team.begin(rows * L); t < team.end(rows * L); t++) {
    rms_norm(w.x + t * w.wide, m.norm, m.dim, m.eps, w.normed + t * w.wide);
    std::memcpy(call.hidden + (base * L + t) * m.dim, w.normed + t * w.wide, m.dim * 4);
  }
  team.meet();
  if (!call.draws) return;
  const Draws& d = *call.draws;
  const int64_t count = d.last_id - d.first_id + 1, blocks_last = d.last_id / BLOCK + 1;
  for (int64_t n = 0; n < d.count; n++) {
    const int64_t stride = n ? w.wide : L * w.wide;
    product(m.head, n ? w.normed : w.normed + (L - 1) * w.wide, stride, rows, blocks_first, blocks_last, 1, team,
            [&](int64_t item, float (*sums)[BLOCK], int64_t top, int64_t rows) {
              for (int64_t r = 0; r < rows; r++)
                std::memcpy(w.logits + (top + r) * w.logits_wide + (item - blocks_first) * BLOCK, sums[r], 4 * BLOCK);
            });
    team.meet();
    for (int64_t r = team.begin(rows); r < team.end(rows); r++) {
      const float* logits = w.logits + r * w.logits_wide + d.first_id - blocks_first * BLOCK;
      const int64_t place = (base + r) * d.count + n;
      d.tokens[place] = d.first_id + draw(logits, count, d, d.uniforms[place], own,
                                          reinterpret_cast<int32_t*>(own + w.logits_wide));
      if (n + 1 < d.count) embed(m, w, r, d.tokens[place], nullptr);
    }
    if (n + 1 == d.count) break;
    run_layers(m, call.b, w, base, rows, call.b.length + L + n, 1, team, own);
    for (int64_t r = team.begin(rows); r < team.end(rows); r++)
      rms_norm(w.x + r * w.wide, m.norm, m.dim, m.eps, w.normed + r * w.wide);
    team.meet();
  }
}

extern "C" __attribute__((visibility("default"))) int32_t ivideogpt_forward(
    const Model* m, const Branch* b, const int64_t* tokens, int64_t length, const float* actions, int64_t action_at,
    const Draws* draws, float* hidden, int32_t threads) {
  for (int64_t i = 0; i < b->rows * length; i++)
    if (tokens[i] < 0 || tokens[i] >= m->vocab) return BAD_ID;
  const int64_t chunks = (b->rows * length + MAX_TOKENS - 1) / MAX_TOKENS;
  const int64_t most = std::max<int64_t>(1, (b->rows + chunks - 1) / chunks);
  const int64_t ids = draws ? draws->last_id - draws->first_id + 1 : 0;
  Memory memory;
  Workspace w;
  w.cut(memory, *m, *b, most, most * length, ids, threads);
  void* base = nullptr;
  if (posix_memalign(&base, 64, memory.used)) return NO_MEMORY;
  memory.base = static_cast<char*>(base), memory.used = 0;
  w.cut(memory, *m, *b, most, most * length, ids, threads);
  Barrier barrier;
  const Call call{*m, *b, tokens, length, actions, action_at, draws, hidden};
#pragma omp parallel num_threads(threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    float* own = w.own + team.member * whole(w.own_floats, KEYS);
    for (int64_t row = 0; row < b->rows; row += most) {
      run_chunk(call, w, row, std::min(most, b->rows - row), team, own);
      team.meet();
    }
  }
  return DONE;
}

// out (rows, last_id - first_id + 1): outputs first_id to last_id of the product of x (rows, inputs) with a matrix.
extern "C" __attribute__((visibility("default"))) void ivideogpt_product(const Matrix* m, const float* x, int64_t rows,
                                                                         int64_t first_id, int64_t last_id, float* out,
                                                                         int32_t threads) {
  const int64_t wide = last_id - first_id + 1;
#pragma omp parallel num_threads(threads)
  product(*m, x, m->inputs, rows, first_id / BLOCK, last_id / BLOCK + 1, 1,
          Team{omp_get_thread_num(), omp_get_num_threads(), nullptr},
          [&](int64_t item, float (*sums)[BLOCK], int64_t top, int64_t rows) {
            const int64_t begin = std::max(first_id - item * BLOCK, int64_t{0});
            const int64_t end = std::min(last_id - item * BLOCK + 1, int64_t{BLOCK});
            for (int64_t r = 0; r < rows; r++)
              for (int64_t i = begin; i < end; i++) out[(top + r) * wide + item * BLOCK + i - first_id] = sums[r][i];
          });
}

// Packs `weight` (outputs, inputs) into m->data.
extern "C" __attribute__((visibility("default"))) void ivideogpt_pack(const Matrix* m, const float* weight,
                                                                      int32_t threads) {
  const int64_t blocks = whole(m->outputs, BLOCK) / BLOCK;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < blocks; i++) pack_block(*m, weight, i, const_cast<char*>(m->data) + i * m->block_bytes);
}

// Asks for large pages, which spare the processor most look-ups of addresses; a wish that may be refused.
extern "C" __attribute__((visibility("default"))) void ivideogpt_large_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(start, bytes, MADV_HUGEPAGE);
#endif
}

extern "C" __attribute__((visibility("default"))) int32_t ivideogpt_has_float16() { return HAS_FLOAT16; }
