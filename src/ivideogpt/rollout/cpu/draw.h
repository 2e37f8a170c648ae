// Sampling of a token from its logits; `sampling.sample_token` is the reference.
#pragma once
#include "model.h"

// The k-th largest score, from integers in the order of the scores: bisection, where each count is a sequential scan.
static float kth_largest(const float* scores, int32_t* keys, int64_t count, int64_t k) {
  int64_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < count; i++) {
    int32_t bits;
    std::memcpy(&bits, scores + i, 4);
    keys[i] = bits ^ ((bits >> 31) & 0x7fffffff);
  }
  int32_t lowest = INT32_MAX, highest = INT32_MIN;
  for (int64_t i = 0; i < count; i++) lowest = std::min(lowest, keys[i]), highest = std::max(highest, keys[i]);
  low = lowest, high = highest;  // at least k keys are >= low, fewer than k are > high
  while (low < high) {
    const int32_t middle = static_cast<int32_t>(low + (high - low + 1) / 2);
    int32_t at_least = 0;
    for (int64_t i = 0; i < count; i++) at_least += keys[i] >= middle;
    if (at_least >= k) low = middle;
    else high = middle - 1;
    if (at_least == k) {  // the lowest of these is the one
      int32_t least = INT32_MAX;
      for (int64_t i = 0; i < count; i++) least = std::min(least, keys[i] >= middle ? keys[i] : INT32_MAX);
      low = high = least;
    }
  }
  const int32_t key = static_cast<int32_t>(low), bits = key ^ ((key >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Index of the drawn one of `count` logits.
static int64_t draw(const float* logits, int64_t count, const Draws& how, float uniform, float* scores, int32_t* ids) {
  if (how.greedy) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
      if (logits[i] > logits[best] || (std::isnan(logits[i]) && !std::isnan(logits[best]))) best = i;
    return best;
  }
  for (int64_t i = 0; i < count; i++) scores[i] = logits[i] / how.temperature;
  int64_t kept = count;
  if (how.top_k && how.top_k < count) {
    const float threshold = kth_largest(scores, ids, count, how.top_k);
    kept = 0;
    for (int64_t i = 0; i < count; i++) {
      if (scores[i] < threshold) continue;
      scores[kept] = scores[i], ids[kept++] = static_cast<int32_t>(i);
    }
  } else {
    for (int64_t i = 0; i < count; i++) ids[i] = static_cast<int32_t>(i);
  }
  std::fill(scores + kept, scores + whole(kept, KEYS), -INFINITY);
  softmax_weights(scores, whole(kept, KEYS));
  double total = 0, sum = 0;
  for (int64_t i = 0; i < kept; i++) total += scores[i];
  int64_t last = 0;  // the last one with some mass, should rounding leave the number behind it
  for (int64_t i = 0; i < kept; i++) {
    if (!(scores[i] > 2e-38f)) continue;  // where `exponential` ends: no mass
    sum += scores[i], last = i;
    if (sum > uniform * total) break;
  }
  return ids[last];
}
