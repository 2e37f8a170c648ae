// Kernels of the pixel decoder on a CPU: group norm, SiLU and 3x3 convolutions of float32 images, channels last.
//
// A convolution is done as Winograd (1980) and Lavin and Gray (arXiv 1509.09308) do it: tiles of the image are
// transformed, multiplied with the transformed weights, and transformed back. The multiplication is a batch of N * N
// matrix products, which the caller leaves to BLAS; what stands here are the transforms, with the group norm and the
// SiLU in front of a convolution and the bias and the residual behind it done in the same pass.
//
// Tile<> types: WINDOW pixels of input, STEP apart, make N products and give M pixels of output, in each direction.
// Channels are a multiple of LANES; heights and widths are a multiple of STEP.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Lanes load(const float* from) { return (Lanes)(*(const Unaligned*)from); }
inline void store(float* to, Lanes value) { *(Unaligned*)to = (Unaligned)value; }

// bfloat16, rounded to the nearest, ties to even
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef uint16_t UnalignedHalf __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
inline Lanes load(const uint16_t* from) {
    return (Lanes)(__builtin_convertvector((Half)(*(const UnalignedHalf*)from), IntLanes) << 16);
}
inline void store(uint16_t* to, Lanes value) {
    const IntLanes bits = (IntLanes)value;
    const IntLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(UnalignedHalf*)to = (UnalignedHalf)__builtin_convertvector(rounded, Half);
}

// 2^n times a polynomial in what is left, |r| <= ln(2) / 2: the coefficients of Cephes' expf, good to 2 ulp
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    x = x > 88.0f ? Lanes{} + 88.0f : x;
    const Lanes n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds: 1.5 * 2^23 leaves no fraction bits
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Lanes)((__builtin_convertvector(n, IntLanes) + 127) << 23);
}

inline Lanes silu(Lanes x) { return x / (1.0f + exponential(-x)); }

// F(4, 3) with the points 0, +-1/sqrt(2), +-sqrt(2), infinity: its rounding errors are half of those of 0, +-1, +-2
struct Four {
    static constexpr int STEP = 4, WINDOW = 6, N = 6, M = 4;
    static constexpr float A = 0.70710678f, B = 1.41421356f;  // A * B = 1, A^2 = 1/2, B^2 = 2

    static inline void forward(const Lanes* d, Lanes* o, int stride) {
        const Lanes even_a = d[4] - 2.0f * d[2], odd_a = A * (d[3] - 2.0f * d[1]);
        const Lanes even_b = d[4] - 0.5f * d[2], odd_b = B * (d[3] - 0.5f * d[1]);
        o[0] = d[0] - 2.5f * d[2] + d[4];
        o[stride] = even_a + odd_a;
        o[2 * stride] = even_a - odd_a;
        o[3 * stride] = even_b + odd_b;
        o[4 * stride] = even_b - odd_b;
        o[5 * stride] = d[1] - 2.5f * d[3] + d[5];
    }

    static inline void back(const Lanes* m, Lanes* o, int stride) {
        const Lanes even_a = m[1] + m[2], odd_a = A * (m[1] - m[2]);
        const Lanes even_b = m[3] + m[4], odd_b = B * (m[3] - m[4]);
        o[0] = m[0] + even_a + even_b;
        o[stride] = odd_a + odd_b;
        o[2 * stride] = 0.5f * even_a + 2.0f * even_b;
        o[3 * stride] = 0.5f * odd_a + 2.0f * odd_b + m[5];
    }
};

// F(2, 3): more products, of fewer weights
struct Two {
    static constexpr int STEP = 2, WINDOW = 4, N = 4, M = 2;

    static inline void forward(const Lanes* d, Lanes* o, int stride) {
        o[0] = d[0] - d[2];
        o[stride] = d[1] + d[2];
        o[2 * stride] = d[2] - d[1];
        o[3 * stride] = d[1] - d[3];
    }

    static inline void back(const Lanes* m, Lanes* o, int stride) {
        o[0] = m[0] + m[1] + m[2];
        o[stride] = m[1] - m[2] - m[3];
    }
};

// Nearest-neighbour doubling and a convolution: the two outputs over a pixel see it and one neighbour, left or right
struct Doubling {
    static constexpr int STEP = 1, WINDOW = 3, N = 3, M = 2;

    static inline void forward(const Lanes* d, Lanes* o, int stride) {
        o[0] = d[0] - d[1];
        o[stride] = d[1];
        o[2 * stride] = d[2] - d[1];
    }

    static inline void back(const Lanes* m, Lanes* o, int stride) {
        o[0] = m[0] + m[1];
        o[stride] = m[1] + m[2];
    }
};

// Stored is what the products are of, float or bfloat16 as uint16_t.

// x (batch, height, width, channels) to products (N * N, batch * tiles, channels); silu(x * scale + shift) in place of
// x where scale and shift (batch, channels) are given. Pixels around the image are 0.
template <class Tile, class Stored>
void forward(const float* x, const float* scale, const float* shift, void* products, int64_t batch, int64_t height,
             int64_t width, int64_t channels, int threads) {
    constexpr int N = Tile::N, WINDOW = Tile::WINDOW;
    const int64_t tiles_y = height / Tile::STEP, tiles_x = width / Tile::STEP, line = (width + 2) * channels;
    const int64_t plane = batch * tiles_y * tiles_x * channels;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> rows(WINDOW * line);
#pragma omp for
        for (int64_t item = 0; item < batch * tiles_y; ++item) {
            const int64_t image = item / tiles_y, top = item % tiles_y * Tile::STEP - 1;
            for (int i = 0; i < WINDOW; ++i) {
                float* row = rows.data() + i * line;
                if (top + i < 0 || top + i >= height) {
                    std::fill(row, row + line, 0.0f);
                    continue;
                }
                const float* from = x + (image * height + top + i) * width * channels;
                std::fill(row, row + channels, 0.0f);
                std::fill(row + line - channels, row + line, 0.0f);
                row += channels;
                if (!scale) std::memcpy(row, from, 4 * width * channels);
                for (int64_t pixel = 0; scale && pixel < width; ++pixel)
                    for (int64_t c = 0; c < channels; c += LANES) {
                        const Lanes factor = load(scale + image * channels + c), term = load(shift + image * channels + c);
                        store(row + pixel * channels + c, silu(load(from + pixel * channels + c) * factor + term));
                    }
            }
            for (int64_t tile = 0; tile < tiles_x; ++tile)
                for (int64_t c = 0; c < channels; c += LANES) {
                    const float* from = rows.data() + tile * Tile::STEP * channels + c;
                    Stored* to = static_cast<Stored*>(products) + (item * tiles_x + tile) * channels + c;
                    Lanes half[N * WINDOW], window[WINDOW], out[N];  // half: transformed in y
                    for (int j = 0; j < WINDOW; ++j) {
                        for (int i = 0; i < WINDOW; ++i) window[i] = load(from + i * line + j * channels);
                        Tile::forward(window, half + j, WINDOW);
                    }
                    for (int i = 0; i < N; ++i) {
                        Tile::forward(half + i * WINDOW, out, 1);
                        for (int j = 0; j < N; ++j) store(to + (i * N + j) * plane, out[j]);
                    }
                }
        }
    }
}

// products (N * N, batch * tiles, channels) to y (batch, M * tiles_y, M * tiles_x, channels), plus bias and residual
template <class Tile, class Stored>
void back(const void* products, const float* bias, const float* residual, float* y, int64_t batch, int64_t tiles_y,
          int64_t tiles_x, int64_t channels, int threads) {
    constexpr int N = Tile::N, M = Tile::M;
    const int64_t plane = batch * tiles_y * tiles_x * channels, line = tiles_x * M * channels;
#pragma omp parallel for num_threads(threads)
    for (int64_t item = 0; item < batch * tiles_y; ++item)
        for (int64_t tile = 0; tile < tiles_x; ++tile)
            for (int64_t c = 0; c < channels; c += LANES) {
                const Stored* from = static_cast<const Stored*>(products) + (item * tiles_x + tile) * channels + c;
                Lanes half[M * N], window[N], out[M];
                for (int j = 0; j < N; ++j) {
                    for (int i = 0; i < N; ++i) window[i] = load(from + (i * N + j) * plane);
                    Tile::back(window, half + j, N);
                }
                for (int i = 0; i < M; ++i) {
                    Tile::back(half + i * N, out, 1);
                    for (int j = 0; j < M; ++j) {
                        const int64_t at = (item * M + i) * line + (tile * M + j) * channels + c;
                        Lanes value = out[j] + load(bias + c);
                        if (residual) value += load(residual + at);
                        store(y + at, value);
                    }
                }
            }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// scale and shift (batch, channels) so that the group norm of x (batch, pixels, channels) is x * scale + shift
void ivideogpt_norm_coefficients(const float* x, const float* weight, const float* bias, float* scale, float* shift,
                       int64_t batch, int64_t pixels, int64_t channels, int64_t groups, float eps, int threads) {
    const int64_t parts = std::min<int64_t>(pixels, 16), size = channels / groups;
    std::vector<float> sums(batch * parts * 2 * channels);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t item = 0; item < batch * parts; ++item) {
            const float* image = x + item / parts * pixels * channels;
            float* sum = sums.data() + item * 2 * channels;
            const int64_t first = item % parts * pixels / parts, last = (item % parts + 1) * pixels / parts;
            for (int64_t c = 0; c < channels; c += LANES) {
                const Lanes pivot = load(image + c);  // sums of what is near 0: no digits are lost in the squares
                Lanes sum_x = {}, sum_xx = {};
                for (int64_t pixel = first; pixel < last; ++pixel) {
                    const Lanes value = load(image + pixel * channels + c) - pivot;
                    sum_x += value;
                    sum_xx += value * value;
                }
                store(sum + c, sum_x);
                store(sum + channels + c, sum_xx);
            }
        }
#pragma omp for
        for (int64_t item = 0; item < batch * groups; ++item) {
            const int64_t image = item / groups, start = item % groups * size;
            std::vector<double> means(size), variances(size);
            double mean = 0.0, variance = 0.0;
            for (int64_t c = 0; c < size; ++c) {
                double sum_x = 0.0, sum_xx = 0.0;
                for (int64_t part = 0; part < parts; ++part) {
                    const float* sum = sums.data() + (image * parts + part) * 2 * channels + start + c;
                    sum_x += sum[0];
                    sum_xx += sum[channels];
                }
                const double above = sum_x / pixels;
                means[c] = x[image * pixels * channels + start + c] + above;
                variances[c] = sum_xx / pixels - above * above;
                mean += means[c] / size;
            }
            for (int64_t c = 0; c < size; ++c)
                variance += (variances[c] + (means[c] - mean) * (means[c] - mean)) / size;
            const double inverse = 1.0 / std::sqrt(variance + eps);
            for (int64_t c = start; c < start + size; ++c) {
                scale[image * channels + c] = inverse * weight[c];
                shift[image * channels + c] = bias[c] - mean * inverse * weight[c];
            }
        }
    }
}

// kind: outputs of a tile in each direction, 4 or 2; 0 for the doubling. half: whether products are bfloat16, not float
void ivideogpt_transform(int kind, int half, const float* x, const float* scale, const float* shift, void* products,
               int64_t batch, int64_t height, int64_t width, int64_t channels, int threads) {
    const auto run = kind == 4 ? (half ? forward<Four, uint16_t> : forward<Four, float>)
                   : kind == 2 ? (half ? forward<Two, uint16_t> : forward<Two, float>)
                               : (half ? forward<Doubling, uint16_t> : forward<Doubling, float>);
    run(x, scale, shift, products, batch, height, width, channels, threads);
}

void ivideogpt_transform_back(int kind, int half, const void* products, const float* bias, const float* residual, float* y,
                    int64_t batch, int64_t tiles_y, int64_t tiles_x, int64_t channels, int threads) {
    const auto run = kind == 4 ? (half ? back<Four, uint16_t> : back<Four, float>)
                   : kind == 2 ? (half ? back<Two, uint16_t> : back<Two, float>)
                               : (half ? back<Doubling, uint16_t> : back<Doubling, float>);
    run(products, bias, residual, y, batch, tiles_y, tiles_x, channels, threads);
}

}  // extern "C"
#pragma GCC visibility pop
