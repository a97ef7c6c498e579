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

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

// M rows of x times one packed block: out[M][32] = x . block + bias + residual.
template <int M>
static void multiply(const bf16* x, int64_t k, const bf16* block, const bf16* bias, const bf16* residual, bf16* out,
                     int64_t n) {
    __m512 low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < k / 2; pair++) {
        const __m512bh first = pairs(block + pair * 64), second = pairs(block + pair * 64 + 32);
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
static const Multiply MULTIPLY[ROWS + 1] = {
    nullptr,     multiply<1>, multiply<2>, multiply<3>, multiply<4>,  multiply<5>,  multiply<6>,
    multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>};

// out[m][n] = x[m][k] . weight[n][k]^T + bias[n] + residual[m][n]; bias and residual may be null.
extern "C" void linear(const bf16* x, int64_t m, int64_t k, const bf16* packed, int64_t n, const bf16* bias,
                       const bf16* residual, bf16* out) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n / COLUMNS; block++) {
        const int64_t column = block * COLUMNS;
        for (int64_t row = 0; row < m; row += ROWS)
            MULTIPLY[std::min<int64_t>(ROWS, m - row)](x + row * k, k, packed + block * k * COLUMNS,
                                                       bias ? bias + column : nullptr,
                                                       residual ? residual + row * n + column : nullptr,
                                                       out + row * n + column, n);
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

// Attention of one query a sequence over paged keys and values, with online softmax (Milakov and Gimelshein, 2018).
//
// query: rows of [heads][head_dim], `query_stride` numbers apart; sequence i uses row rows[i] of query and out.
// slabs[block][layer][kv_head][2][page_size][head_dim]; block_ids[i][max_blocks]; lengths[i] positions, the newest is
// the query's own. Only the latest `window` positions are seen, where window > 0. page_size and head_dim are multiples
// of 16 and 32; head_dim is at most 256, heads / kv_heads at most 16.
static void attend(const bf16* query, const bf16* keys, int64_t block_stride, const int32_t* blocks, int64_t first,
                   int64_t length, int64_t group, int64_t head_dim, int64_t page_size, bf16* out) {
    alignas(64) float sum[16 * 256], weight[16][16];
    float top[16], total[16];
    memset(sum, 0, group * head_dim * sizeof(float));
    std::fill_n(top, group, -INFINITY);
    std::fill_n(total, group, 0.0f);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(float(head_dim)));
    for (int64_t start = first / 16 * 16; start < length; start += 16) {
        const bf16* key = keys + blocks[start / page_size] * block_stride + start % page_size * head_dim;
        const bf16* value = key + page_size * head_dim;
        const int from = int(std::max<int64_t>(first - start, 0)), to = int(std::min<int64_t>(16, length - start));
        const __mmask16 seen = __mmask16(((1u << to) - 1) & ~((1u << from) - 1));
        for (int64_t g = 0; g < group; g++) {
            alignas(64) float score[16];
            for (int i = from; i < to; i++) {
                __m512 dot = _mm512_setzero_ps();
                for (int64_t d = 0; d < head_dim; d += 32)
                    dot = _mm512_dpbf16_ps(dot, pairs(query + g * head_dim + d), pairs(key + i * head_dim + d));
                score[i] = _mm512_reduce_add_ps(dot);
            }
            const __m512 scores = _mm512_mul_ps(_mm512_load_ps(score), scale);
            const float highest = std::max(top[g], _mm512_mask_reduce_max_ps(seen, scores));
            const __m512 p = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(scores, _mm512_set1_ps(highest))));
            const float shrink = highest > top[g] ? std::exp(top[g] - highest) : 1.0f;
            total[g] = total[g] * shrink + _mm512_reduce_add_ps(p);
            _mm512_store_ps(weight[g], p);
            if (shrink != 1.0f)
                for (int64_t d = 0; d < head_dim; d++) sum[g * head_dim + d] *= shrink;
            top[g] = highest;
        }
        for (int i = from; i < to; i++)
            for (int64_t d = 0; d < head_dim; d += 16) {
                const __m512 v = widen(value + i * head_dim + d);
                for (int64_t g = 0; g < group; g++) {
                    float* at = sum + g * head_dim + d;
                    _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_set1_ps(weight[g][i]), v, _mm512_load_ps(at)));
                }
            }
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < head_dim; d += 16)
            narrow(out + g * head_dim + d,
                   _mm512_div_ps(_mm512_load_ps(sum + g * head_dim + d), _mm512_set1_ps(total[g])));
}

extern "C" void decode_attention(const bf16* query, int64_t query_stride, int64_t sequences, const int64_t* rows,
                                 const int32_t* block_ids, int64_t max_blocks, const int64_t* lengths, int64_t window,
                                 int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t page_size,
                                 const bf16* slabs, int64_t layer, int64_t num_layers, bf16* out) {
    const int64_t group = heads / kv_heads, head_stride = 2 * page_size * head_dim;
    const int64_t block_stride = num_layers * kv_heads * head_stride;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < sequences * kv_heads; task++) {
        const int64_t i = task / kv_heads, kv_head = task % kv_heads, first_head = kv_head * group * head_dim;
        attend(query + rows[i] * query_stride + first_head, slabs + (layer * kv_heads + kv_head) * head_stride,
               block_stride, block_ids + i * max_blocks, window > 0 ? std::max<int64_t>(0, lengths[i] - window) : 0,
               lengths[i], group, head_dim, page_size, out + rows[i] * heads * head_dim + first_head);
    }
}

// Attention of many queries of one sequence over its paged keys and values, after FlashAttention-2 (Dao, 2023): a tile of
// queries (rows: the query heads of a kv head at successive positions) walks the pages, 16 keys at a time. These are
// brought into the order of vdpbf16ps once for the whole tile:
//
//     keys[head_dim / 2][16][2]       so that a broadcast pair of a query meets 16 keys
//     values[8][head_dim][2]          so that a broadcast pair of probabilities meets 16 dimensions
static const int TILE = 64;  // rows of a tile, rounded up to whole positions
static const int STRIP = 8;  // rows that share a load

static void arrange(const bf16* key, const bf16* value, int64_t head_dim, int written, bf16* keys, bf16* values) {
    for (int i = 0; i < 16; i++)
        for (int64_t pair = 0; pair < head_dim / 2; pair++)
            memcpy(keys + (pair * 16 + i) * 2, key + i * head_dim + pair * 2, 4);
    for (int pair = 0; pair < 8; pair++)
        for (int64_t d = 0; d < head_dim; d += 16) {
            // Slots not written yet hold anything; times a probability of 0 it must be 0.
            const bf16* at = value + pair * 2 * head_dim + d;
            __m512i both = _mm512_setzero_si512();
            if (2 * pair < written) both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
            if (2 * pair + 1 < written)
                both = _mm512_or_si512(
                    both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + head_dim))), 16));
            _mm512_storeu_si512(values + (pair * head_dim + d) * 2, both);
        }
}

static inline __m512bh broadcast(const bf16* two) {
    int32_t bits;
    memcpy(&bits, two, 4);
    return (__m512bh)_mm512_set1_epi32(bits);
}

struct Row {
    const bf16* query;
    int64_t position;
    float top, total;
};

// One strip of rows against 16 keys that begin at position `start`.
static void attend_strip(Row* rows, float* sum, const bf16* keys, const bf16* values, int64_t start, int64_t window,
                         int64_t head_dim) {
    __m512 scores[STRIP];
    for (int r = 0; r < STRIP; r++) scores[r] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < head_dim / 2; pair++) {
        const __m512bh key = pairs(keys + pair * 32);
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++)
            scores[r] = _mm512_dpbf16_ps(scores[r], broadcast(rows[r].query + pair * 2), key);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(float(head_dim)));
    alignas(64) bf16 weights[STRIP][16];
    for (int r = 0; r < STRIP; r++) {
        const int64_t oldest = window > 0 ? rows[r].position - window + 1 : 0;
        const int from = int(std::clamp<int64_t>(oldest - start, 0, 16));
        const int to = int(std::clamp<int64_t>(rows[r].position + 1 - start, 0, 16));
        const __mmask16 seen = from < to ? __mmask16(((1u << to) - 1) & ~((1u << from) - 1)) : 0;
        if (!seen) {
            memset(weights[r], 0, sizeof weights[r]);
            continue;
        }
        const __m512 scaled = _mm512_mul_ps(scores[r], scale);
        const float highest = std::max(rows[r].top, _mm512_mask_reduce_max_ps(seen, scaled));
        const __m512 p = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(scaled, _mm512_set1_ps(highest))));
        const float shrink = highest > rows[r].top ? std::exp(rows[r].top - highest) : 1.0f;
        rows[r].total = rows[r].total * shrink + _mm512_reduce_add_ps(p);
        rows[r].top = highest;
        narrow(weights[r], p);
        if (shrink != 1.0f)
            for (int64_t d = 0; d < head_dim; d += 16) {
                float* at = sum + r * head_dim + d;
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(shrink)));
            }
    }
    for (int64_t d = 0; d < head_dim; d += 32) {
        __m512 low[STRIP], high[STRIP];
        for (int r = 0; r < STRIP; r++) {
            low[r] = _mm512_loadu_ps(sum + r * head_dim + d);
            high[r] = _mm512_loadu_ps(sum + r * head_dim + d + 16);
        }
        for (int pair = 0; pair < 8; pair++) {
            const bf16* value = values + (pair * head_dim + d) * 2;
            const __m512bh first = pairs(value), second = pairs(value + 32);
#pragma GCC unroll 8
            for (int r = 0; r < STRIP; r++) {
                const __m512bh weight = broadcast(weights[r] + pair * 2);
                low[r] = _mm512_dpbf16_ps(low[r], weight, first);
                high[r] = _mm512_dpbf16_ps(high[r], weight, second);
            }
        }
        for (int r = 0; r < STRIP; r++) {
            _mm512_storeu_ps(sum + r * head_dim + d, low[r]);
            _mm512_storeu_ps(sum + r * head_dim + d + 16, high[r]);
        }
    }
}

// Rows first_row to first_row + count of query [tokens][...] (query_stride numbers apart) and of out
// [tokens][heads][head_dim] are the positions start to start + count of one sequence.
extern "C" void prefill_attention(const bf16* query, int64_t query_stride, int64_t first_row, int64_t count,
                                  int64_t start, const int32_t* blocks, int64_t window, int64_t heads,
                                  int64_t kv_heads, int64_t head_dim, int64_t page_size, const bf16* slabs,
                                  int64_t layer, int64_t num_layers, bf16* out) {
    const int64_t group = heads / kv_heads, head_stride = 2 * page_size * head_dim;
    const int64_t block_stride = num_layers * kv_heads * head_stride;
    const int64_t tile = (TILE + group - 1) / group, num_tiles = (count + tile - 1) / tile;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < num_tiles * kv_heads; task++) {
        // The last tiles see the most keys: they come first, so that no thread is left with one at the end.
        const int64_t begin = (num_tiles - 1 - task / kv_heads) * tile, kv_head = task % kv_heads;
        const int64_t end = std::min(begin + tile, count), num_rows = (end - begin) * group;
        const int64_t padded = (num_rows + STRIP - 1) / STRIP * STRIP;
        alignas(64) float sum[(TILE + 16 + STRIP) * 256];
        alignas(64) bf16 keys[16 * 256], values[16 * 256];
        Row rows[TILE + 16 + STRIP];
        memset(sum, 0, padded * head_dim * sizeof(float));
        for (int64_t r = 0; r < padded; r++) {
            const int64_t token = begin + std::min(r, num_rows - 1) / group, head = kv_head * group + r % group;
            rows[r] = {query + (first_row + token) * query_stride + head * head_dim, start + token, -INFINITY, 0.0f};
        }
        const int64_t last = start + end - 1, oldest = window > 0 ? std::max<int64_t>(0, start + begin - window + 1) : 0;
        for (int64_t at = oldest / 16 * 16; at <= last; at += 16) {
            const bf16* key = slabs + blocks[at / page_size] * block_stride +
                              (layer * kv_heads + kv_head) * head_stride + at % page_size * head_dim;
            arrange(key, key + page_size * head_dim, head_dim, int(std::min<int64_t>(16, start + count - at)), keys, values);
            for (int64_t r = 0; r < padded; r += STRIP)
                if (rows[r + STRIP - 1].position >= at)
                    attend_strip(rows + r, sum + r * head_dim, keys, values, at, window, head_dim);
        }
        for (int64_t r = 0; r < num_rows; r++) {
            const int64_t token = begin + r / group, head = kv_head * group + r % group;
            const __m512 total = _mm512_set1_ps(rows[r].total);
            for (int64_t d = 0; d < head_dim; d += 16)
                narrow(out + ((first_row + token) * heads + head) * head_dim + d,
                       _mm512_div_ps(_mm512_loadu_ps(sum + r * head_dim + d), total));
        }
    }
}
