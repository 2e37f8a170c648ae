// Packs a matrix of float32 weights into the blocks that gemm.h reads.
#pragma once
#include "gemm.h"

// The nearest bfloat16, ties to even; NaN stays NaN.
static inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One group of inputs of a block: 32 scales, then the weights. A scale is NaN where a weight is not finite.
static void pack_group(const float* const (&rows)[BLOCK], int64_t length, char* out) {
  float inverse[BLOCK], *scales = reinterpret_cast<float*>(out);
  for (int j = 0; j < BLOCK; j++) {
    float most = 0, finite = 0;  // the second one is NaN if anything is not
    for (int64_t k = 0; rows[j] && k < length; k++) {
      const float size = std::fabs(rows[j][k]);
      most = size > most ? size : most;
      finite += rows[j][k] * 0.0f;
    }
    scales[j] = most / 127 + finite;
    inverse[j] = most > 1e-30f && finite == 0 ? 127 / most : 0.0f;
  }
  int8_t* weights = reinterpret_cast<int8_t*>(out + 4 * BLOCK);
  for (int64_t k = 0; k < length; k++)
    for (int j = 0; j < BLOCK; j++)
      weights[k * BLOCK + j] = inverse[j] > 0 ? static_cast<int8_t>(std::nearbyint(rows[j][k] * inverse[j])) : 0;
}

// Block `index` of `weight` (m.outputs, m.inputs); outputs behind the last are zeros.
static void pack_block(const Matrix& m, const float* weight, int64_t index, char* out) {
  const float* rows[BLOCK];
  for (int j = 0; j < BLOCK; j++) {
    const int64_t row = index * BLOCK + j;
    rows[j] = row < m.outputs ? weight + row * m.inputs : nullptr;
  }
  if (m.type == INT8) {
    for (int64_t k = 0; k < m.inputs; k += m.group) {
      const int64_t length = m.inputs - k < m.group ? m.inputs - k : m.group;
      pack_group(rows, length, out);
      for (const float*& row : rows) row = row ? row + length : nullptr;
      out += 4 * BLOCK + length * BLOCK;
    }
    return;
  }
  for (int64_t k = 0; k < m.inputs; k++)
    for (int j = 0; j < BLOCK; j++) {
      const float x = rows[j] ? rows[j][k] : 0.0f;
      const int64_t at = k * BLOCK + j;
      if (m.type == FLOAT32) Float32::put(out, at, x);
      if (m.type == FLOAT16) Float16::put(out, at, x);
      if (m.type == BFLOAT16)  // outputs j and j + 16 share a lane
        reinterpret_cast<uint16_t*>(out)[k * BLOCK + j % 16 * 2 + j / 16] = to_bfloat16(x);
    }
}
