// LSQ on the CPU in one pass forward and one pass backward; what lsq.py computes with tensor operations.
//
// A tensor is seen as `rows` rows of `columns` values that lie one after the other; each row has a step size. Blocks of a
// row are spread over threads, and their sums added in order, so that results do not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 1 << 14;  // values, few enough for the second-level cache

using bfloat16 = uint16_t;  // the upper half of a float; a class of its own would keep loops from being vectorized

inline double load(double value) { return value; }
inline float load(float value) { return value; }
inline float load(bfloat16 value) {
    const uint32_t wide = uint32_t(value) << 16;
    float loaded;
    std::memcpy(&loaded, &wide, 4);
    return loaded;
}

inline void store(double value, double* place) { *place = value; }
inline void store(float value, float* place) { *place = value; }
inline void store(float value, bfloat16* place) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    *place = bfloat16((wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // what is not a number stays so
}

template <typename V> struct Arithmetic { using type = V; };
template <> struct Arithmetic<bfloat16> { using type = float; };

template <typename A> inline A clip(A value, A low, A high) {  // what is not a number stays so; two instructions, as written
    const A below = value > high ? high : value;
    return below < low ? low : below;
}

template <typename V, typename Q>
void quantize(const V* v, const typename Arithmetic<V>::type* steps, int64_t rows, int64_t columns, double qn, double qp,
              int threads, Q* q) {
    using A = typename Arithmetic<V>::type;
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
    const A low = -qn, high = qp;
    #pragma omp parallel for num_threads(threads) if(rows * blocks > 1)
    for (int64_t block = 0; block < rows * blocks; block++) {
        const A step = steps[block / blocks];
        const int64_t first = (block / blocks) * columns, begin = first + (block % blocks) * BLOCK;
        const int64_t end = begin + BLOCK < first + columns ? begin + BLOCK : first + columns;
        #pragma omp simd
        for (int64_t i = begin; i < end; i++)
            store(std::nearbyint(clip(load(v[i]) / step, low, high)) * step, q + i);
    }
}

// round(clip(v / step)) + qn, from 0 to qn + qp <= 255: what integer arithmetic takes.
void count(const float* v, const float* step, int64_t values, double qn, double qp, int threads, uint8_t* q) {
    const int64_t blocks = (values + BLOCK - 1) / BLOCK;
    const float s = *step, low = -qn, high = qp, lowest = qn;
    #pragma omp parallel for num_threads(threads) if(blocks > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t begin = block * BLOCK, end = begin + BLOCK < values ? begin + BLOCK : values;
        #pragma omp simd
        for (int64_t i = begin; i < end; i++)
            q[i] = uint8_t(int32_t(std::nearbyint(clip(v[i] / s, low, high)) + lowest));
    }
}

// grad_v may be the same memory as grad, where their types are the same; it may be null.
// For each row, the gradient of its step, and the sum of grad * v / step over clipped values, whose gradient is lost.
template <typename G, typename V>
void differentiate(const G* grad, const V* v, const typename Arithmetic<V>::type* steps, int64_t rows, int64_t columns,
                   double qn, double qp, int threads, V* grad_v, double* grad_steps, double* clipped_sums) {
    using A = typename Arithmetic<V>::type;
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
    const A low = -qn, high = qp;
    std::vector<double> sums(rows * blocks), lost_sums(rows * blocks);
    #pragma omp parallel for num_threads(threads) if(rows * blocks > 1)
    for (int64_t block = 0; block < rows * blocks; block++) {
        const A step = steps[block / blocks];
        const int64_t first = (block / blocks) * columns, begin = first + (block % blocks) * BLOCK;
        const int64_t end = begin + BLOCK < first + columns ? begin + BLOCK : first + columns;
        double sum = 0, lost = 0;
        if (grad_v == nullptr) {
            #pragma omp simd reduction(+:sum, lost)
            for (int64_t i = begin; i < end; i++) {
                const A scaled = load(v[i]) / step, clipped = clip(scaled, low, high), given = load(grad[i]);
                sum += double(given * (std::nearbyint(clipped) - (scaled == clipped ? scaled : A(0))));
                lost += double((given - (scaled == clipped ? given : A(0))) * scaled);
            }
        } else {
            #pragma omp simd reduction(+:sum, lost)
            for (int64_t i = begin; i < end; i++) {
                const A scaled = load(v[i]) / step, clipped = clip(scaled, low, high), given = load(grad[i]);
                const A kept = scaled == clipped ? given : A(0);
                sum += double(given * (std::nearbyint(clipped) - (scaled == clipped ? scaled : A(0))));
                lost += double((given - kept) * scaled);
                store(kept, grad_v + i);
            }
        }
        sums[block] = sum;
        lost_sums[block] = lost;
    }
    for (int64_t row = 0; row < rows; row++) {
        grad_steps[row] = clipped_sums[row] = 0;
        for (int64_t block = row * blocks; block < (row + 1) * blocks; block++) {
            grad_steps[row] += sums[block];
            clipped_sums[row] += lost_sums[block];
        }
    }
}

}  // namespace

#define QUANTIZE(name, V, A, Q)                                                                                            \
    extern "C" void quantize_##name(const V* v, const A* steps, int64_t rows, int64_t columns, double qn, double qp,       \
                                    int threads, Q* q) {                                                                   \
        quantize(v, steps, rows, columns, qn, qp, threads, q);                                                             \
    }
#define DIFFERENTIATE(name, G, V, A)                                                                                       \
    extern "C" void differentiate_##name(const G* grad, const V* v, const A* steps, int64_t rows, int64_t columns,         \
                                         double qn, double qp, int threads, V* grad_v, double* grad_steps,                 \
                                         double* clipped_sums) {                                                           \
        differentiate(grad, v, steps, rows, columns, qn, qp, threads, grad_v, grad_steps, clipped_sums);                   \
    }

QUANTIZE(float64_float64, double, double, double)
QUANTIZE(float32_float32, float, float, float)
QUANTIZE(float32_bfloat16, float, float, bfloat16)
QUANTIZE(bfloat16_bfloat16, bfloat16, float, bfloat16)
DIFFERENTIATE(float64_float64, double, double, double)
DIFFERENTIATE(float32_float32, float, float, float)
DIFFERENTIATE(bfloat16_float32, bfloat16, float, float)
DIFFERENTIATE(bfloat16_bfloat16, bfloat16, bfloat16, float)

extern "C" void integers_float32_uint8(const float* v, const float* step, int64_t values, double qn, double qp, int threads,
                                       uint8_t* q) {
    count(v, step, values, qn, qp, threads, q);
}
