// Matrix product of a few rows of float32 activations with packed weights: the inner loops of the CPU decoder.
//
// A matrix (outputs x inputs) is packed in blocks of 32 outputs. Inside a block the inputs follow one another, and each
// has its 32 weights side by side: a thread that owns consecutive blocks reads one sequential stream, which is what a
// memory-bound product is made of. All sums are float32. `k` counts inputs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "threads.h"

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 12, MAX_QUERIES = 8;  // 32 registers of 16
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 3, MAX_QUERIES = 4;  // 16 registers of 8
#else
constexpr int LANES = 4, MAX_ROWS = 3, MAX_QUERIES = 4;  // 32 registers of 4 on aarch64
#endif
constexpr int BLOCK = 32;  // outputs of a block of weights
constexpr int MAX_TOKENS = 128;  // activations of so many rows stay in a core's second-level cache

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t LooseIntVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define UNROLLED _Pragma("GCC unroll 16")

static inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
static inline Vec all(float x) { return Vec{} + x; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline float sum_of(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}
static inline float max_of(Vec v) {
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x to about one unit in the last place; ends at e^-87 and e^88, NaN stays NaN.
static inline Vec exponential(Vec x) {
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  const Vec shifted = x * 1.44269504f + magic, n = shifted - magic;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec bits = (reinterpret_cast<IntVec>(shifted) << 23) + (127 << 23);
  return p * reinterpret_cast<Vec>(bits);
}

// Scores in, weights of the softmax out, before division by their sum, which is returned. count: a multiple of 16.
static float softmax_weights(float* scores, int64_t count) {
  Vec top = load(scores);
  for (int64_t i = LANES; i < count; i += LANES) top = larger(top, load(scores + i));
  const float highest = max_of(top);
  Vec total{};
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec e = exponential(load(scores + i) - highest);
    store(scores + i, e);
    total += e;
  }
  return sum_of(total);
}

// How weights and keys are stored: `vec<j>` gives the j-th LANES of the numbers at p, as float32. Compilers turn
// __builtin_convertvector into single elements where the widths differ by much, hence the intrinsics on x86.
struct Float32 {
  static constexpr int bytes = 4;
  static constexpr bool scaled = false;
  static inline Vec vec(const char* p, int j) { return load(reinterpret_cast<const float*>(p) + LANES * j); }
  static inline void put(void* p, int64_t i, float x) { static_cast<float*>(p)[i] = x; }
};

struct BFloat16 {  // outputs i and i + 16 share a 32-bit lane: unpacking is one shift or one mask
  static constexpr int bytes = 2;
  static constexpr bool scaled = false;
  static inline Vec vec(const char* p, int j) {
    constexpr int half = 16 / LANES;
    const IntVec both = reinterpret_cast<const LooseIntVec*>(p)[j % half];
    return reinterpret_cast<Vec>(j < half ? both << 16 : both & static_cast<int32_t>(0xffff0000));
  }
};

#if defined(__F16C__) || defined(__FLT16_MANT_DIG__)
#define HAS_FLOAT16 1
#else
#define HAS_FLOAT16 0
#endif
#if HAS_FLOAT16
struct Float16 {
  static constexpr int bytes = 2;
  static constexpr bool scaled = false;
  static inline Vec vec(const char* p, int j) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + j));
#elif defined(__F16C__) && defined(__AVX__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + j));
#else
    typedef _Float16 Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    return __builtin_convertvector(reinterpret_cast<const Half*>(p)[j], Vec);
#endif
  }
  static inline void put(void* p, int64_t i, float x) {
#if defined(__F16C__)
    static_cast<uint16_t*>(p)[i] = _cvtss_sh(x, 0);
#else
    static_cast<_Float16*>(p)[i] = static_cast<_Float16>(x);
#endif
  }
};
#else
using Float16 = Float32;  // never chosen: `supports` says so
#endif

struct Int8 {  // each group of inputs has its 32 float32 scales in front
  static constexpr int bytes = 1;
  static constexpr bool scaled = true;
  static inline Vec vec(const char* p, int j) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + j)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * j))));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
    return __builtin_convertvector(__builtin_convertvector(reinterpret_cast<const Bytes*>(p)[j], IntVec), Vec);
#endif
  }
};

// Where memory is asked for ahead of its use: at `at`, moving on by `pace` bytes for each input.
struct Ahead {
  const char* at;
  int64_t pace;
};

// acc[r][v] += sum over k of x[r][k] * w[k][v]: ROWS rows by COLS columns, all sums in registers. Few rows get several
// sums each, because one chain of additions would wait for itself.
template <class W, int ROWS, int COLS>
static inline __attribute__((always_inline)) void accumulate(
    const char* w, const float* x, int64_t row_stride, int64_t count, Ahead ahead, Vec (&out)[ROWS][COLS / LANES]) {
  constexpr int V = COLS / LANES, STEP = COLS * W::bytes;
  constexpr int CHAINS = ROWS == 1 ? 4 : ROWS <= 3 && LANES == 16 ? 2 : 1;
  Vec acc[CHAINS][ROWS][V] = {};
  int64_t k = 0;
  for (; k + CHAINS <= count; k += CHAINS) {
    UNROLLED for (int c = 0; c < CHAINS; c++) {
      if (c * STEP % 64 == 0) __builtin_prefetch(ahead.at + (k + c) * ahead.pace, 0, 2);
      if (STEP > 64) __builtin_prefetch(ahead.at + (k + c) * ahead.pace + 64, 0, 2);
      Vec wv[V];
      UNROLLED for (int v = 0; v < V; v++) wv[v] = W::vec(w + (k + c) * STEP, v);
      UNROLLED for (int r = 0; r < ROWS; r++) {
        const float xk = x[r * row_stride + k + c];
        UNROLLED for (int v = 0; v < V; v++) acc[c][r][v] += xk * wv[v];
      }
    }
  }
  for (; k < count; k++)
    UNROLLED for (int r = 0; r < ROWS; r++)
      UNROLLED for (int v = 0; v < V; v++) acc[0][r][v] += x[r * row_stride + k] * W::vec(w + k * STEP, v);
  UNROLLED for (int r = 0; r < ROWS; r++)
    UNROLLED for (int v = 0; v < V; v++) {
      out[r][v] = acc[0][r][v];
      UNROLLED for (int c = 1; c < CHAINS; c++) out[r][v] += acc[c][r][v];
    }
}

// out[r][0..COLS) = sum over k of x[r][k] * w[k], r < ROWS, from one block of weights, keys or values.
template <class W, int ROWS, int COLS>
static __attribute__((noinline)) void panel(const char* w, const float* x, int64_t row_stride, int64_t count,
                                            int64_t group, Ahead ahead, float* out, int64_t out_stride) {
  constexpr int V = COLS / LANES;
  Vec part[ROWS][V];
  if constexpr (!W::scaled) {
    accumulate<W, ROWS, COLS>(w, x, row_stride, count, ahead, part);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < V; v++) store(out + r * out_stride + LANES * v, part[r][v]);
  } else {
    for (int64_t k = 0; k < count; k += group) {
      const int64_t length = count - k < group ? count - k : group;
      const float* scales = reinterpret_cast<const float*>(w);
      accumulate<W, ROWS, COLS>(w + 4 * COLS, x + k, row_stride, length, ahead, part);
      for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < V; v++) {
          float* total = out + r * out_stride + LANES * v;
          const Vec scaled = part[r][v] * load(scales + LANES * v);
          store(total, k ? load(total) + scaled : scaled);
        }
      w += 4 * COLS + length * COLS;
      ahead.at += 4 * ahead.pace + length * ahead.pace;
    }
  }
}

// `panel` for a number of rows that is known at run time, from 1 to MOST.
template <class W, int COLS, int MOST>
static inline void panel_of(int64_t rows, const char* w, const float* x, int64_t row_stride, int64_t count,
                            int64_t group, Ahead ahead, float* out, int64_t out_stride) {
  if (rows == MOST)
    panel<W, MOST, COLS>(w, x, row_stride, count, group, ahead, out, out_stride);
  else if constexpr (MOST > 1)
    panel_of<W, COLS, MOST - 1>(rows, w, x, row_stride, count, group, ahead, out, out_stride);
}

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

struct Matrix {
  const char* data;   // blocks of 32 outputs, one after another
  const float* bias;  // in the order of the blocks, padded like them; or null
  int64_t inputs, outputs, block_bytes;
  int32_t type, group;
};

constexpr int64_t NEAR = 4096;  // bytes that a single row of activations asks for ahead

// Calls finish(item, sums, row, rows) for this member's share of the items [first, last). An item is `unit` consecutive
// blocks, and sums[u * MAX_TOKENS + r][0..32) their products with row `row + r` of x. More rows than MAX_TOKENS take
// turns.
template <class W, class Finish>
static void product_as(const Matrix& m, const float* x, int64_t x_stride, int64_t all_rows, int64_t first, int64_t last,
                       int unit, Team team, Finish finish) {
  alignas(64) float sums[2 * MAX_TOKENS][BLOCK];
  for (int64_t top = 0; top < all_rows; top += MAX_TOKENS, x += MAX_TOKENS * x_stride) {
    const int64_t rows = all_rows - top < MAX_TOKENS ? all_rows - top : MAX_TOKENS;
    const int64_t panels = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t item = first + team.begin(last - first); item < first + team.end(last - first); item++) {
      for (int u = 0; u < unit; u++) {
        const char* w = m.data + (item * unit + u) * m.block_bytes;
        for (int64_t p = 0; p < panels; p++) {
          const int64_t row = rows * p / panels, end = rows * (p + 1) / panels;
          // several panels share the work of fetching the next block while they compute on this one
          const Ahead ahead = panels == 1 ? Ahead{w + NEAR, BLOCK * W::bytes}
                                          : Ahead{w + m.block_bytes * (panels + p) / panels, BLOCK * W::bytes / panels};
          panel_of<W, BLOCK, MAX_ROWS>(end - row, w, x + row * x_stride, x_stride, m.inputs, m.group, ahead,
                                       sums[u * MAX_TOKENS + row], BLOCK);
        }
      }
      finish(item, sums, top, rows);
    }
  }
}

template <class Finish>
static void product(const Matrix& m, const float* x, int64_t x_stride, int64_t rows, int64_t first, int64_t last,
                    int unit, Team team, Finish finish) {
  switch (m.type) {
    case FLOAT32: return product_as<Float32>(m, x, x_stride, rows, first, last, unit, team, finish);
    case BFLOAT16: return product_as<BFloat16>(m, x, x_stride, rows, first, last, unit, team, finish);
    case FLOAT16: return product_as<Float16>(m, x, x_stride, rows, first, last, unit, team, finish);
    default: return product_as<Int8>(m, x, x_stride, rows, first, last, unit, team, finish);
  }
}
