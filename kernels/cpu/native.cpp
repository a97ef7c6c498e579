// CPU kernels for bfloat16 models on processors with AVX512-BF16. Plain C interface, loaded by native.py.
//
// What bounds them: with few tokens a linear layer reads its weights once, at the speed of memory; with many it
// multiplies at the speed of vdpbf16ps. Both are served by one layout, packed once when the model is loaded:
//
//     packed[n / 32][k / 2][32][2]      32 output columns side by side, two neighbouring k's of a column together
//
// so that one 64-byte load holds 16 columns of a k pair, ready to be multiplied with a broadcast pair of x.
//
// Threads are OpenMP's. The library is linked without a runtime of its own: it uses the one that torch has loaded, so
// that there is one pool of threads, with the number that torch was told.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

typedef uint16_t bf16;

static const int COLUMNS = 32;   // output columns of a packed block
static const int ROWS = 12;      // rows of x at a time: 24 accumulators of the 32 registers

static inline __m512 widen(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

static inline void narrow(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

static inline float widen1(bf16 v) {
    uint32_t bits = uint32_t(v) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline __m512bh pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

extern "C" void pack(const bf16* weight, int64_t n, int64_t k, bf16* packed) {
#pragma omp parallel for
    for (int64_t block = 0; block < n / COLUMNS; block++)
        for (int64_t pair = 0; pair < k / 2; pair++)
            for (int64_t column = 0; column < COLUMNS; column++)
                memcpy(packed + ((block * (k / 2) + pair) * COLUMNS + column) * 2,
                       weight + (block * COLUMNS + column) * k + pair * 2, 4);
}

// M rows of x times one packed block: out[M][32] = x . block + bias + residual. The block after it is fetched
// meanwhile, if AHEAD.
template <int M, bool AHEAD>
static void multiply(const bf16* x, int64_t k, const bf16* block, const bf16* bias, const bf16* residual, bf16* out,
                     int64_t n) {
    __m512 low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < k / 2; pair++) {
        const __m512bh first = pairs(block + pair * 64), second = pairs(block + pair * 64 + 32);
        if (AHEAD) {
            _mm_prefetch((const char*)(block + k * COLUMNS + pair * 64), _MM_HINT_T1);
            _mm_prefetch((const char*)(block + k * COLUMNS + pair * 64 + 32), _MM_HINT_T1);
        }
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            int32_t two;
            memcpy(&two, x + m * k + pair * 2, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            low[m] = _mm512_dpbf16_ps(low[m], both, first);
            high[m] = _mm512_dpbf16_ps(high[m], both, second);
        }
    }
    for (int m = 0; m < M; m++) {
        if (bias) {
            low[m] = _mm512_add_ps(low[m], widen(bias));
            high[m] = _mm512_add_ps(high[m], widen(bias + 16));
        }
        if (residual) {
            low[m] = _mm512_add_ps(low[m], widen(residual + m * n));
            high[m] = _mm512_add_ps(high[m], widen(residual + m * n + 16));
        }
        narrow(out + m * n, low[m]);
        narrow(out + m * n + 16, high[m]);
    }
}

typedef void (*Multiply)(const bf16*, int64_t, const bf16*, const bf16*, const bf16*, bf16*, int64_t);
template <bool AHEAD, int... M>
static constexpr std::array<Multiply, ROWS> multiplies(std::integer_sequence<int, M...>) {
    return {multiply<M + 1, AHEAD>...};
}
static const std::array<Multiply, ROWS> MULTIPLY = multiplies<false>(std::make_integer_sequence<int, ROWS>());
static const std::array<Multiply, ROWS> MULTIPLY_AHEAD = multiplies<true>(std::make_integer_sequence<int, ROWS>());

// out[m][n] = x[m][k] . weight[n][k]^T + bias[n] + residual[m][n]; bias and residual may be null.
extern "C" void linear(const bf16* x, int64_t m, int64_t k, const bf16* packed, int64_t n, const bf16* bias,
                       const bf16* residual, bf16* out) {
    const int64_t passes = std::max<int64_t>(1, (m + ROWS - 1) / ROWS), rows = (m + passes - 1) / passes;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n / COLUMNS; block++) {
        const int64_t column = block * COLUMNS;
        const bf16* weights = packed + block * k * COLUMNS;
        for (int64_t row = 0; row < m; row += rows) {
            // The first rows bring the block in at the speed of memory, which idles while the others are multiplied:
            // the second fetch the next block.
            const auto& multiply = row == rows && block + 1 < n / COLUMNS ? MULTIPLY_AHEAD : MULTIPLY;
            multiply[std::min(rows, m - row) - 1](x + row * k, k, weights, bias ? bias + column : nullptr,
                                                  residual ? residual + row * n + column : nullptr,
                                                  out + row * n + column, n);
        }
    }
}

static inline float sum_of_squares(const bf16* x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 v = widen(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// Rounded to bf16 before the weight is applied, as the models were trained.
static inline void normalise(const bf16* x, const bf16* weight, int64_t n, float eps, bf16* out) {
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(sum_of_squares(x, n) / n + eps));
    for (int64_t i = 0; i < n; i += 16) {
        narrow(out + i, _mm512_mul_ps(widen(x + i), scale));
        narrow(out + i, _mm512_mul_ps(widen(out + i), widen(weight + i)));
    }
}

extern "C" void rms_norm(const bf16* x, const bf16* weight, int64_t rows, int64_t n, float eps, bf16* out) {
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) normalise(x + row * n, weight, n, eps, out + row * n);
}

// out[row] = the first of the highest of x[row][n].
extern "C" void argmax(const bf16* x, int64_t rows, int64_t n, int64_t* out) {
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) {
        __m512 highest = _mm512_set1_ps(-INFINITY);
        __m512i place = _mm512_setzero_si512(), at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int64_t i = 0; i < n; i += 16) {
            const __m512 v = widen(x + row * n + i);
            const __mmask16 higher = _mm512_cmp_ps_mask(v, highest, _CMP_GT_OQ);
            highest = _mm512_mask_mov_ps(highest, higher, v);
            place = _mm512_mask_mov_epi32(place, higher, at);
            at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
        }
        const __mmask16 best = _mm512_cmp_ps_mask(highest, _mm512_set1_ps(_mm512_reduce_max_ps(highest)), _CMP_EQ_OQ);
        out[row] = _mm512_mask_reduce_min_epi32(best, place);
    }
}

// exp on 16 floats for arguments <= 0: 2^i * p(f), relative error about 2e-7 (Cephes' polynomial).
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 i = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 f = _mm512_fnmadd_ps(i, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(i, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, f), f, _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, i);
}

// Scores of one row, and what each weighs: exp(score - maximum), below which 0 for what float32 cannot tell from it.
struct Scores {
    std::vector<float> scores, weights;
    float maximum;

    int64_t size() const { return scores.size(); }

    void read(const bf16* wide, const float* logits, int64_t n, float temperature) {
        scores.resize(n), weights.resize(n);
        const __m512 by = _mm512_set1_ps(temperature);
        __m512 highest = _mm512_set1_ps(-INFINITY);
        for (int64_t i = 0; i < n; i += 16) {
            const __m512 score = _mm512_div_ps(logits ? _mm512_loadu_ps(logits + i) : widen(wide + i), by);
            _mm512_storeu_ps(scores.data() + i, score);
            highest = _mm512_max_ps(highest, score);
        }
        maximum = _mm512_reduce_max_ps(highest);
        for (int64_t i = 0; i < n; i += 16) {
            const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores.data() + i), _mm512_set1_ps(maximum));
            const __mmask16 tells = _mm512_cmp_ps_mask(below, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
            _mm512_storeu_ps(weights.data() + i, _mm512_maskz_mov_ps(tells, exponential(below)));
        }
    }

    // Sum of the weights from `begin` to `end`, multiples of 16, whose scores are kept.
    double weight(int64_t begin, int64_t end, float lowest) const {
        __m512d sum = _mm512_setzero_pd();
        for (int64_t i = begin; i < end; i += 16) {
            const __mmask16 kept =
                _mm512_cmp_ps_mask(_mm512_loadu_ps(scores.data() + i), _mm512_set1_ps(lowest), _CMP_GE_OQ);
            const __m512 w = _mm512_maskz_loadu_ps(kept, weights.data() + i);
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(w)));
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(w, 1)));
        }
        return _mm512_reduce_add_pd(sum);
    }

    // Scores by distance from the maximum, in bins; the last one takes all that is far, or no number.
    static const int BINS = 2048;
    int bin(int64_t i) const {
        const float distance = (maximum - scores[i]) * 64.0f;
        return distance < BINS - 1 ? int(distance) : BINS - 1;
    }

    // The highest score such that it and those above it (all of them >= lowest) reach `target`: in number, or in
    // weight. `lowest` if they do not.
    float reaching(double target, bool weighed, float lowest) const {
        std::vector<double> bins(BINS);
        for (int64_t i = 0; i < size(); i++)
            if (scores[i] >= lowest) bins[bin(i)] += weighed ? weights[i] : 1.0;
        double sum = 0.0;
        int last = 0;
        while (last < BINS && sum + bins[last] < target) sum += bins[last++];
        if (last == BINS) return lowest;
        std::vector<std::pair<float, float>> candidates;
        for (int64_t i = 0; i < size(); i++)
            if (scores[i] >= lowest && bin(i) == last) candidates.emplace_back(scores[i], weights[i]);
        std::sort(candidates.begin(), candidates.end(), std::greater<>());
        for (const auto& [score, weight] : candidates)
            if ((sum += weighed ? weight : 1.0) >= target) return score;
        return candidates.empty() ? lowest : candidates.back().first;
    }

    // The token in which the sum of what is kept, in order of ids, passes `number` times the whole.
    int64_t draw(double number, float lowest) const {
        static const int64_t PART = 1024;
        std::vector<double> parts;
        double whole = 0.0;
        for (int64_t begin = 0; begin < size(); begin += PART) {
            parts.push_back(weight(begin, std::min(begin + PART, size()), lowest));
            whole += parts.back();
        }
        const double target = number * whole;
        double sum = 0.0;
        int64_t token = 0;
        for (size_t part = 0; part < parts.size(); part++) {
            if (sum + parts[part] <= target) {
                sum += parts[part];
                continue;
            }
            for (int64_t i = part * PART; i < std::min<int64_t>((part + 1) * PART, size()); i++)
                if (scores[i] >= lowest && weights[i] > 0.0f) {
                    token = i;  // also when rounding keeps the sum below the target
                    if ((sum += weights[i]) > target) break;
                }
            break;
        }
        return token;
    }
};

// logits[rows][n], bf16 or float, n a multiple of 16; choices[5][rows]: temperature, top_k, top_p, min_p, number.
extern "C" void sample(const void* logits, int64_t is_float, int64_t rows, int64_t n, const double* choices, int64_t* out) {
#pragma omp parallel if (rows > 1)
    {
        static thread_local Scores row;
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows; r++) {
            const bool greedy = choices[r] < 1e-5;
            const int64_t top_k = choices[rows + r];
            const double top_p = choices[2 * rows + r], min_p = choices[3 * rows + r], number = choices[4 * rows + r];
            row.read((const bf16*)logits + r * n, is_float ? (const float*)logits + r * n : nullptr, n,
                     greedy ? 1.0f : float(choices[r]));
            if (greedy) {
                const auto best = std::find(row.scores.begin(), row.scores.end(), row.maximum);
                out[r] = best == row.scores.end() ? 0 : best - row.scores.begin();
                continue;
            }
            float lowest = -INFINITY;
            if (0 < top_k && top_k < n) lowest = row.reaching(top_k, false, lowest);
            if (top_p < 1.0) lowest = row.reaching(top_p * row.weight(0, n, lowest), true, lowest);
            if (min_p > 0.0) lowest = std::max(lowest, float(double(row.maximum) + std::log(min_p)));
            out[r] = row.draw(number, lowest);
        }
    }
}

// gate_up[rows][2n], gate before up -> out[rows][n].
extern "C" void silu_and_mul(const bf16* gate_up, int64_t rows, int64_t n, bf16* out) {
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = gate_up + row * 2 * n, *up = gate + n;
        for (int64_t i = 0; i < n; i += 16) {
            const __m512 g = widen(gate + i), magnitude = _mm512_abs_ps(g);
            const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), magnitude));  // of -|g|: never overflows
            const __m512 one = _mm512_set1_ps(1.0f), below = _mm512_div_ps(e, _mm512_add_ps(one, e));
            const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
            const __m512 sigmoid = _mm512_mask_blend_ps(negative, _mm512_sub_ps(one, below), below);
            bf16 silu[16];
            narrow(silu, _mm512_mul_ps(g, sigmoid));
            narrow(out + row * n + i, _mm512_mul_ps(widen(silu), widen(up + i)));
        }
    }
}

// The first half of a head's dimensions rotates with the second half.
static inline void rotate(bf16* head, const float* cosine, const float* sine, int64_t half, bf16* out) {
    for (int64_t i = 0; i < half; i += 16) {
        const __m512 a = widen(head + i), b = widen(head + half + i);
        const __m512 c = _mm512_loadu_ps(cosine + i), s = _mm512_loadu_ps(sine + i);
        narrow(out + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        narrow(out + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

// qkv[tokens][heads + 2 kv_heads][head_dim]: queries are normed (where q_norm is given) and rotated in place; keys the
// same, then stored with the values at rows of slabs[...][head_dim]: key_rows[tokens][kv_heads], values page_size
// rows further on. cosine, sine: [tokens][head_dim / 2].
extern "C" void rotate_and_store(bf16* qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                 const float* cosine, const float* sine, const bf16* q_norm, const bf16* k_norm,
                                 float eps, bf16* slabs, const int64_t* key_rows, int64_t layer_rows,
                                 int64_t page_size) {
    const int64_t half = head_dim / 2;
#pragma omp parallel for schedule(static) if (tokens > 4)
    for (int64_t token = 0; token < tokens; token++) {
        bf16* row = qkv + token * (heads + 2 * kv_heads) * head_dim;
        const float *c = cosine + token * half, *s = sine + token * half;
        for (int64_t head = 0; head < heads + kv_heads; head++) {
            bf16* vector = row + head * head_dim;
            if (const bf16* norm = head < heads ? q_norm : k_norm) normalise(vector, norm, head_dim, eps, vector);
            if (head < heads) {
                rotate(vector, c, s, half, vector);
                continue;
            }
            const int64_t kv_head = head - heads;
            bf16* key = slabs + (key_rows[token * kv_heads + kv_head] + layer_rows) * head_dim;
            rotate(vector, c, s, half, key);
            memcpy(key + page_size * head_dim, vector + kv_heads * head_dim, head_dim * sizeof(bf16));
        }
    }
}

// Causal attention over paged keys and values, after FlashAttention-2 (Dao, 2023), for prompts and single queries alike.
//
// A task is a tile of successive positions of one sequence and one kv head. Its rows, the query heads of that kv head at
// each position, walk the pages together, 64 keys at a time. These are brought into the order of vdpbf16ps once:
//
//     keys[head_dim / 2][64][2]       so that a broadcast pair of a query meets 16 keys
//     values[32][head_dim][2]         so that a broadcast pair of probabilities meets 16 dimensions; in every 32
//                                     dimensions those of even fours come first: the order that interleaving gives
//
// A row's arithmetic depends on its own query and on absolute positions alone, not on the tile, the chunk or the batch
// that it came with: a token computed again, in whatever company, has the same bits.
static const int KEYS = 64;
static const int STRIP = 8;               // rows that share a load
static const int TILE_NUMBERS = 64 * 256;  // rows of a tile times head_dim: the sums stay in the second-level cache

// rows[i] = column i of rows, 16 by 16.
static inline void transpose(__m512i* rows) {
    __m512i a[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            a[i + 8 * j] = _mm512_shuffle_i32x4(rows[i + 8 * j], rows[i + 8 * j + 4], 0x88);
            a[i + 8 * j + 4] = _mm512_shuffle_i32x4(rows[i + 8 * j], rows[i + 8 * j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

// 16 slots of a page into columns `column` on of keys, and their values; `next` (or null) is where the same columns of
// the next 64 keys will come from. Slots from `written` on can hold anything: times a probability of 0 they must be 0.
static void arrange(const bf16* key, const bf16* next, int64_t head_dim, int64_t page_size, int64_t written, int column,
                    bf16* keys, bf16* values) {
    const int64_t to_value = page_size * head_dim;
    for (int64_t d = 0; d < head_dim; d += 32) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++) {
            rows[i] = _mm512_loadu_si512(key + i * head_dim + d);
            if (next) {
                _mm_prefetch((const char*)(next + i * head_dim + d), _MM_HINT_T0);
                _mm_prefetch((const char*)(next + to_value + i * head_dim + d), _MM_HINT_T0);
            }
        }
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(keys + ((d / 2 + i) * KEYS + column) * 2, rows[i]);
        for (int i = 0; i < 16; i += 2) {
            const bf16* value = key + to_value + i * head_dim + d;
            const __m512i none = _mm512_setzero_si512();
            const __m512i even = i < written ? _mm512_loadu_si512(value) : none;
            const __m512i odd = i + 1 < written ? _mm512_loadu_si512(value + head_dim) : none;
            bf16* at = values + ((column + i) / 2 * head_dim + d) * 2;
            _mm512_store_si512(at, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(at + 32, _mm512_unpackhi_epi16(even, odd));
        }
    }
}

static inline __m512bh broadcast(const bf16* two) {
    int32_t bits;
    memcpy(&bits, two, 4);
    return (__m512bh)_mm512_set1_epi32(bits);
}

// 2^x on 16 floats for x <= 0: 2^i * p(f), relative error about 2e-6.
static inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 i = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, i);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, i);
}

struct Row {
    const bf16* query;
    int64_t position;
    float top;            // highest score so far, in powers of two
    float total[16];      // of the probabilities, by lane
};

// Probabilities of 64 scores of one row against the keys from position `start` on; sum shrinks when the top rises.
static inline void soften(Row& row, const float* scores, int64_t start, int64_t window, int64_t head_dim, float scale,
                          float* sum, bf16* weights) {
    const int64_t oldest = window > 0 ? row.position - window + 1 : 0;
    const int64_t from = std::clamp<int64_t>(oldest - start, 0, KEYS);
    const int64_t to = std::clamp<int64_t>(row.position + 1 - start, 0, KEYS);
    if (from >= to) {
        memset(weights, 0, KEYS * sizeof(bf16));
        return;
    }
    const uint64_t seen = (to == KEYS ? ~0ull : (1ull << to) - 1) & (~0ull << from);
    __m512 score[4], highest = _mm512_set1_ps(row.top), total = _mm512_loadu_ps(row.total);
    for (int i = 0; i < 4; i++) {
        const __mmask16 mask = __mmask16(seen >> 16 * i);
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(scores + 16 * i), _mm512_set1_ps(scale));
        score[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, scaled);
        highest = _mm512_max_ps(highest, score[i]);
    }
    const float top = _mm512_reduce_max_ps(highest);
    if (top > row.top) {
        const __m512 shrink = _mm512_set1_ps(std::exp2(row.top - top));
        total = _mm512_mul_ps(total, shrink);
        for (int64_t d = 0; d < head_dim; d += 16)
            _mm512_store_ps(sum + d, _mm512_mul_ps(_mm512_load_ps(sum + d), shrink));
        row.top = top;
    }
    for (int i = 0; i < 4; i++) {
        const __mmask16 mask = __mmask16(seen >> 16 * i);
        const __m512 p = _mm512_maskz_mov_ps(mask, power_of_two(_mm512_sub_ps(score[i], _mm512_set1_ps(top))));
        total = _mm512_add_ps(total, p);
        narrow(weights + 16 * i, p);
    }
    _mm512_storeu_ps(row.total, total);
}

// R rows of ascending positions against the 64 keys from position `start` on.
template <int R>
static void attend(Row* rows, float* sum, const bf16* keys, const bf16* values, int64_t start, int64_t window,
                   int64_t head_dim, float scale) {
    const int64_t last = std::min<int64_t>(rows[R - 1].position + 1 - start, KEYS);  // keys that any of them sees
    alignas(64) float scores[R][KEYS];
    for (int64_t first = 0; first < last; first += 32) {
        __m512 low[R], high[R];
        for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_ps();
        for (int64_t pair = 0; pair < head_dim / 2; pair++) {
            const bf16* key = keys + (pair * KEYS + first) * 2;
            const __m512bh left = pairs(key), right = pairs(key + 32);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512bh query = broadcast(rows[r].query + pair * 2);
                low[r] = _mm512_dpbf16_ps(low[r], query, left);
                high[r] = _mm512_dpbf16_ps(high[r], query, right);
            }
        }
        for (int r = 0; r < R; r++) {
            _mm512_store_ps(scores[r] + first, low[r]);
            _mm512_store_ps(scores[r] + first + 16, high[r]);
        }
    }
    alignas(64) bf16 weights[R][KEYS];
    for (int r = 0; r < R; r++)
        soften(rows[r], scores[r], start, window, head_dim, scale, sum + r * head_dim, weights[r]);
    for (int64_t d = 0; d < head_dim; d += 32) {
        __m512 low[R], high[R];
        for (int r = 0; r < R; r++) {
            low[r] = _mm512_load_ps(sum + r * head_dim + d);
            high[r] = _mm512_load_ps(sum + r * head_dim + d + 16);
        }
        for (int64_t pair = 0; pair < (last + 1) / 2; pair++) {
            const bf16* value = values + (pair * head_dim + d) * 2;
            const __m512bh left = pairs(value), right = pairs(value + 32);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512bh weight = broadcast(weights[r] + pair * 2);
                low[r] = _mm512_dpbf16_ps(low[r], weight, left);
                high[r] = _mm512_dpbf16_ps(high[r], weight, right);
            }
        }
        for (int r = 0; r < R; r++) {
            _mm512_store_ps(sum + r * head_dim + d, low[r]);
            _mm512_store_ps(sum + r * head_dim + d + 16, high[r]);
        }
    }
}

typedef void (*Attend)(Row*, float*, const bf16*, const bf16*, int64_t, int64_t, int64_t, float);
static const Attend ATTEND[STRIP + 1] = {nullptr,   attend<1>, attend<2>, attend<3>, attend<4>,
                                         attend<5>, attend<6>, attend<7>, attend<8>};

// sum / total into bf16, the dimensions back in their order.
static inline void finish(const Row& row, const float* sum, int64_t head_dim, bf16* out) {
    const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_loadu_ps(row.total)));
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t d = 0; d < head_dim; d += 32) {
        const __m512 low = _mm512_div_ps(_mm512_load_ps(sum + d), total);
        const __m512 high = _mm512_div_ps(_mm512_load_ps(sum + d + 16), total);
        narrow(out + d, _mm512_permutex2var_ps(low, first, high));
        narrow(out + d + 16, _mm512_permutex2var_ps(low, second, high));
    }
}

// Queries of one sequence: rows `row` to `row + count` of the batch are its positions from `start` on; its block table
// begins at block_ids[blocks].
struct Span {
    int64_t row, count, start, blocks;
};

struct Tile {
    Span span;
    int64_t first, count;
};

// Tiles of all spans, those that see the most keys first, so that no thread is left with one at the end. There are
// enough of them for every thread, unless there are too few positions.
static std::vector<Tile> tiles_of(const Span* spans, int64_t num_spans, int64_t kv_heads, int64_t largest) {
    int64_t positions = 0;
    for (int64_t i = 0; i < num_spans; i++) positions += spans[i].count;
    while (largest > 1 && positions * kv_heads < 4 * largest * omp_get_max_threads()) largest /= 2;
    std::vector<Tile> tiles;
    for (int64_t i = 0; i < num_spans; i++)
        for (int64_t end = spans[i].count; end > 0; end -= largest) {
            const int64_t first = std::max<int64_t>(0, end - largest);
            tiles.push_back({spans[i], first, end - first});
        }
    std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
        return a.span.start + a.first + a.count > b.span.start + b.first + b.count;
    });
    return tiles;
}

// query: rows of [heads][head_dim], `query_stride` numbers apart; out[tokens][heads][head_dim].
// slabs[block][layer][kv_head][2][page_size][head_dim]. Only the latest `window` positions are seen, where window > 0.
// page_size is a multiple of 16, head_dim of 32 and at most 256, heads / kv_heads at most 16.
extern "C" void attention(const bf16* query, int64_t query_stride, const Span* spans, int64_t num_spans,
                          const int32_t* block_ids, int64_t window, int64_t heads, int64_t kv_heads, int64_t head_dim,
                          int64_t page_size, const bf16* slabs, int64_t layer, int64_t num_layers, bf16* out) {
    const int64_t group = heads / kv_heads, head_stride = 2 * page_size * head_dim;
    const int64_t block_stride = num_layers * kv_heads * head_stride;
    const float scale = 1.44269504088896341f / std::sqrt(float(head_dim));
    const std::vector<Tile> tiles =
        tiles_of(spans, num_spans, kv_heads, std::max<int64_t>(1, TILE_NUMBERS / head_dim / group));
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < int64_t(tiles.size()) * kv_heads; task++) {
        const Tile& tile = tiles[task / kv_heads];
        const int64_t kv_head = task % kv_heads, num_rows = tile.count * group;
        const int64_t begin = tile.span.start + tile.first, last = begin + tile.count - 1;
        const int64_t first_row = tile.span.row + tile.first, written = tile.span.start + tile.span.count;
        const int32_t* blocks = block_ids + tile.span.blocks;
        const bf16* of_head = slabs + (layer * kv_heads + kv_head) * head_stride;
        alignas(64) float sum[TILE_NUMBERS];
        alignas(64) bf16 keys[KEYS * 256], values[KEYS * 256];
        Row rows[TILE_NUMBERS / 32];
        memset(sum, 0, num_rows * head_dim * sizeof(float));
        for (int64_t r = 0; r < num_rows; r++)
            rows[r] = {query + (first_row + r / group) * query_stride + (kv_head * group + r % group) * head_dim,
                       begin + r / group, -INFINITY, {}};
        const auto at_position = [&](int64_t position) {
            return of_head + blocks[position / page_size] * block_stride + position % page_size * head_dim;
        };
        const int64_t oldest = window > 0 ? std::max<int64_t>(0, begin - window + 1) : 0;
        for (int64_t start = oldest / KEYS * KEYS; start <= last; start += KEYS) {
            for (int64_t at = start; at <= std::min(last, start + KEYS - 1); at += 16)
                arrange(at_position(at), at + KEYS <= last ? at_position(at + KEYS) : nullptr, head_dim, page_size,
                        written - at, int(at - start), keys, values);
            for (int64_t r = 0; r < num_rows; r += STRIP) {
                const int64_t count = std::min<int64_t>(STRIP, num_rows - r);
                if (rows[r + count - 1].position >= start)
                    ATTEND[count](rows + r, sum + r * head_dim, keys, values, start, window, head_dim, scale);
            }
        }
        for (int64_t r = 0; r < num_rows; r++)
            finish(rows[r], sum + r * head_dim, head_dim,
                   out + ((first_row + r / group) * heads + kv_head * group + r % group) * head_dim);
    }
}
