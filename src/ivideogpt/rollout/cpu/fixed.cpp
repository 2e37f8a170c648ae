// Products of many rows with a matrix by 16-bit integers, where the processor multiplies and adds pairs of them in one
// instruction: closer to float32 than products of bfloat16.
//
// A number is an integer times a float32 scale; GROUP inputs of a row, or of an output's weights, share a scale. Integers
// of a row reach LARGEST; a group of weights is scaled so that no sum of its products leaves 32 bits, whatever the row
// is. Sums of a group are exact, those over groups float32. What is not finite makes its scale NaN.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define HAS_FIXED 1
#include <immintrin.h>
#else
#define HAS_FIXED 0
#endif

#if HAS_FIXED
namespace {

constexpr int GROUP = 128, LANES = 16, BLOCK = 32, MAX_ROWS = 14;  // 28 sums, 2 weights, 1 pair of a row in 32 registers
constexpr float LARGEST = 8191.0f;  // 14 bits with the sign; Gaussian weights then have about as many
constexpr float SMALLEST = 1e-30f;  // groups below it are zeros

inline int64_t groups_of(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }

inline __m512 part(const float* from, int64_t left) {  // zeros behind the last
    return left >= LANES ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps((1u << std::max<int64_t>(left, 0)) - 1, from);
}

inline __m512 exponential(__m512 x) {  // e^x, as in winograd.cpp
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    __m512 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return _mm512_scalef_ps(p * r * r + r + 1.0f, n);
}

// The largest of a group of numbers, their sum (of absolute values), and 0, or NaN if any is not finite.
struct Range {
    __m512 most = _mm512_setzero_ps(), sum = _mm512_setzero_ps(), finite = _mm512_setzero_ps();
    void add(__m512 x) {
        const __m512 size = _mm512_abs_ps(x);
        most = _mm512_max_ps(most, size);
        sum += size;
        finite += x * 0.0f;
    }
};

inline void store_rounded(int16_t* to, __m512 x) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

// Outputs [first, first + 32) of `weight` (outputs, inputs) as (inputs / 2, 32, 2), with scales (groups, 32); what lies
// outside is zeros.
void pack(const float* weight, int64_t outputs, int64_t inputs, int64_t first, int16_t* out, float* scales) {
    alignas(64) int16_t rows[BLOCK][GROUP];
    for (int64_t group = 0; group < groups_of(inputs); group++, scales += BLOCK) {
        const int64_t left = inputs - group * GROUP;
        for (int j = 0; j < BLOCK; j++) {
            scales[j] = 0.0f;
            std::memset(rows[j], 0, sizeof(rows[j]));
            if (first + j >= outputs) continue;
            const float* from = weight + (first + j) * inputs + group * GROUP;
            Range range;
            for (int k = 0; k < GROUP; k += LANES) range.add(part(from + k, left - k));
            const float most = _mm512_reduce_max_ps(range.most), sum = _mm512_reduce_add_ps(range.sum);
            const float finite = _mm512_reduce_add_ps(range.finite);
            scales[j] = finite;
            if (!(most > SMALLEST) || finite != 0.0f) continue;
            // sum of |integers| * LARGEST < 2^31; rounding adds up to half of each, and float32 sums err a little
            const float factor = std::min(32000.0f / most, (2147483648.0f / LARGEST - GROUP) * 0.9999f / sum);
            for (int k = 0; k < GROUP; k += LANES) store_rounded(rows[j] + k, part(from + k, left - k) * factor);
            scales[j] = 1.0f / factor;
        }
        for (int k = 0; k < GROUP / 2; k++, out += 2 * BLOCK)
            for (int j = 0; j < BLOCK; j++) std::memcpy(out + 2 * j, rows[j] + 2 * k, 4);
    }
}

// acc += pairs of a row times pairs of 16 outputs. Written out, as compilers copy the sums around the intrinsic.
inline void multiply_add(__m512i& acc, __m512i x, __m512i w) { asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w)); }

// out[r][0..32) = the products of ROWS rows with a packed block.
template <int ROWS>
__attribute__((noinline)) void panel(const int16_t* w, const float* w_scales, const int16_t* x, const float* x_scales,
                                     int64_t groups, float (*out)[BLOCK]) {
    const int64_t x_stride = groups * GROUP;
    for (int64_t group = 0; group < groups; group++) {
        __m512i acc[ROWS][2];
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
        for (int k = 0; k < GROUP / 2; k++, w += 2 * BLOCK) {
            const __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + BLOCK);
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {
                int32_t pair;
                std::memcpy(&pair, x + r * x_stride + group * GROUP + 2 * k, 4);
                const __m512i both = _mm512_set1_epi32(pair);
                multiply_add(acc[r][0], both, first);
                multiply_add(acc[r][1], both, second);
            }
        }
        const __m512 scales[2] = {_mm512_loadu_ps(w_scales + group * BLOCK),
                                  _mm512_loadu_ps(w_scales + group * BLOCK + LANES)};
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++)
            _Pragma("GCC unroll 2") for (int v = 0; v < 2; v++) {
                const __m512 before = group ? _mm512_load_ps(out[r] + v * LANES) : _mm512_setzero_ps();
                const __m512 scale = scales[v] * x_scales[r * groups + group];
                _mm512_store_ps(out[r] + v * LANES, before + _mm512_cvtepi32_ps(acc[r][v]) * scale);
            }
    }
}

template <int MOST>
void panel_of(int64_t rows, const int16_t* w, const float* w_scales, const int16_t* x, const float* x_scales,
              int64_t groups, float (*out)[BLOCK]) {
    if (rows == MOST)
        panel<MOST>(w, w_scales, x, x_scales, groups, out);
    else if constexpr (MOST > 1)
        panel_of<MOST - 1>(rows, w, w_scales, x, x_scales, groups, out);
}

}  // namespace
#endif

#pragma GCC visibility push(default)
extern "C" {

int32_t ivideogpt_has_fixed() { return HAS_FIXED; }

#if HAS_FIXED
// x (rows, inputs) as integers (rows, inputs up to whole groups) and scales (rows, groups); of silu(gate) * x where a
// gate (rows, inputs) is given.
void ivideogpt_fixed_rows(const float* x, const float* gate, int64_t rows, int64_t inputs, int16_t* out, float* scales,
                          int32_t threads) {
    const int64_t groups = groups_of(inputs);
#pragma omp parallel for num_threads(threads)
    for (int64_t item = 0; item < rows * groups; item++) {
        const int64_t group = item % groups, left = inputs - group * GROUP, at = item / groups * inputs + group * GROUP;
        __m512 values[GROUP / LANES];
        Range range;
        for (int i = 0; i < GROUP / LANES; i++) {
            values[i] = part(x + at + i * LANES, left - i * LANES);
            if (gate) {
                const __m512 g = part(gate + at + i * LANES, left - i * LANES);
                values[i] = values[i] * g / (exponential(-g) + 1.0f);
            }
            range.add(values[i]);
        }
        const float most = _mm512_reduce_max_ps(range.most), finite = _mm512_reduce_add_ps(range.finite);
        const float factor = most > SMALLEST ? LARGEST / most : 0.0f;
        for (int i = 0; i < GROUP / LANES; i++)
            store_rounded(out + item * GROUP + i * LANES, values[i] * factor);
        scales[item] = most / LARGEST + finite;
    }
}

// y (rows, outputs) = x * weight^T + bias + residual: x as `ivideogpt_fixed_rows` gives it, weight (outputs, inputs);
// bias (outputs) and residual (rows, outputs) may be null.
void ivideogpt_fixed_product(const int16_t* x, const float* x_scales, const float* weight, const float* bias,
                             const float* residual, float* y, int64_t rows, int64_t inputs, int64_t outputs,
                             int32_t threads) {
    const int64_t groups = groups_of(inputs), blocks = (outputs + BLOCK - 1) / BLOCK;
    const int64_t panels = (rows + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel num_threads(threads)
    {
        std::vector<int16_t> packed(groups * GROUP * BLOCK);
        std::vector<float> scales(groups * BLOCK);
        alignas(64) float sums[MAX_ROWS][BLOCK];
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; block++) {
            pack(weight, outputs, inputs, block * BLOCK, packed.data(), scales.data());
            for (int64_t p = 0; p < panels; p++) {
                const int64_t row = rows * p / panels, end = rows * (p + 1) / panels;
                panel_of<MAX_ROWS>(end - row, packed.data(), scales.data(), x + row * groups * GROUP,
                                   x_scales + row * groups, groups, sums);
                for (int64_t v = 0; v < BLOCK; v += LANES) {
                    const int64_t first = block * BLOCK + v, left = outputs - first;
                    if (left <= 0) break;
                    const __mmask16 inside = left >= LANES ? 0xffff : (1 << left) - 1;
                    const __m512 added = bias ? _mm512_maskz_loadu_ps(inside, bias + first) : _mm512_setzero_ps();
                    for (int64_t r = row; r < end; r++) {
                        __m512 sum = _mm512_load_ps(sums[r - row] + v) + added;
                        if (residual) sum += _mm512_maskz_loadu_ps(inside, residual + r * outputs + first);
                        _mm512_mask_storeu_ps(y + r * outputs + first, inside, sum);
                    }
                }
            }
        }
    }
}
#endif

}  // extern "C"
#pragma GCC visibility pop
