// Sums of products with weights in fp32 and bf16, sparse or dense, once for all vector units.
//
// Few rows: a tile of 2 blocks of weight rows by up to 8 rows of x; of a sparse weight each group's four activations are
// repeated over the lanes and a permutation picks, lane by lane, the kept ones. Many rows of a sparse weight: x turned
// over, so that one weight multiplies a vector of rows, and its place chooses which vector. Every output is summed column
// by column, so that it does not depend on the rows beside it.
#pragma once
#include "layout.h"
#include "unit.h"

namespace nms {

// What a tile asks of memory while it computes: `lines` of 64 bytes a chunk, from `at` on. Into the second-level cache;
// into the first it would take the slots that loads need.
struct Ahead {
    const uint8_t* at;
    int64_t lines;
};

template <class V>
struct LinearFloat {
    using F = typename V::Float;
    using I = typename V::Int;
    using L = Layout<V>;
    static constexpr int64_t lanes = V::lanes;
    static constexpr int R = 2;  // vectors of rows of a block

    // The values of two slots, those of a group or of two.
    template <Format format>
    static NMS_INLINE void load_pair(const uint8_t* chunk, int pair, F& first, F& second) {
        if constexpr (format == sparse_fp32 || format == fp32_1of4) {
            first = V::load(reinterpret_cast<const float*>(chunk + L::vector * (1 + 2 * pair)));
            second = V::load(reinterpret_cast<const float*>(chunk + L::vector * (2 + 2 * pair)));
        } else {
            split_pair(V::load_int(chunk + L::vector * (1 + pair)), first, second);
        }
    }

    // One block of the weight by B rows of x; sums is [B][block_rows].
    template <Format format, int B>
    static NMS_NOINLINE void tile(const uint8_t* w, int64_t chunks, const float* x, int64_t x_stride, Ahead ahead,
                                  float* sums) {
        F sum[R][B];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) sum[r][b] = V::set(0.0f);
        const int64_t bytes = L::part_bytes(format), columns = L::chunk_columns(format);
        for (int64_t k = 0; k < chunks; k++) {
            const uint8_t* chunk = w + k * R * bytes;
            const float* xk = x + columns * k;
            for (int64_t i = 0; i < ahead.lines; i++, ahead.at += 64) V::fetch(ahead.at);
            if constexpr (kept_of_4(format) > 0)
                sparse_chunk<format, B>(chunk, xk, x_stride, sum);
            else
                dense_chunk<format, B>(chunk, xk, x_stride, sum);
        }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) V::store(sums + (b * R + r) * lanes, sum[r][b]);
    }

    template <Format format, int B>
    static NMS_INLINE void sparse_chunk(const uint8_t* chunk, const float* xk, int64_t x_stride, F (&sum)[R][B]) {
        constexpr int kept = kept_of_4(format);
        const int64_t bytes = L::part_bytes(format);
        I places[R];
        NMS_UNROLL for (int r = 0; r < R; r++) places[r] = V::load_int(chunk + r * bytes);
        NMS_UNROLL for (int pair = 0; pair < 4 * kept; pair++) {
            F value[R][2];
            NMS_UNROLL for (int r = 0; r < R; r++)
                load_pair<format>(chunk + r * bytes, pair, value[r][0], value[r][1]);
            NMS_UNROLL for (int i = 0; i < 2; i++) {
                const int group = kept == 2 ? pair : 2 * pair + i;
                I place[R];
                NMS_UNROLL for (int r = 0; r < R; r++) place[r] = V::shift_right(places[r], 4 * pair + 2 * i);
                NMS_UNROLL for (int b = 0; b < B; b++) {
                    const F four = V::repeat4(xk + b * x_stride + 4 * group);
                    NMS_UNROLL for (int r = 0; r < R; r++)
                        sum[r][b] = V::fma(V::pick4(four, place[r]), value[r][i], sum[r][b]);
                }
            }
        }
    }

    template <Format format, int B>
    static NMS_INLINE void dense_chunk(const uint8_t* chunk, const float* xk, int64_t x_stride, F (&sum)[R][B]) {
        constexpr int together = format == dense_bf16 ? 2 : 1;
        const int64_t bytes = L::part_bytes(format);
        NMS_UNROLL for (int v = 0; v < 16; v++) {
            F value[R][together];
            NMS_UNROLL for (int r = 0; r < R; r++) {
                const uint8_t* from = chunk + r * bytes + v * L::vector;
                if constexpr (format == dense_bf16)
                    split_pair(V::load_int(from), value[r][0], value[r][1]);
                else
                    value[r][0] = V::load(reinterpret_cast<const float*>(from));
            }
            NMS_UNROLL for (int b = 0; b < B; b++)
                NMS_UNROLL for (int j = 0; j < together; j++) {
                    const F one = V::set(xk[b * x_stride + v * together + j]);
                    NMS_UNROLL for (int r = 0; r < R; r++) sum[r][b] = V::fma(one, value[r][j], sum[r][b]);
                }
        }
    }

    static NMS_INLINE void split_pair(I pair, F& first, F& second) {
        first = V::as_float(V::shift_left(pair, 16));
        second = V::as_float(V::both(pair, V::set_int(static_cast<int32_t>(0xffff0000))));
    }

    // ---- many rows of x ---------------------------------------------------------------------------------------------

    static constexpr int64_t many = 64;         // rows of x that are turned over together
    static constexpr int64_t weight_rows = 32;  // of a work item

    // Sums of `rows` weight rows over one chunk of so many slots. x is [32][many].
    template <int slots, int rows>
    static NMS_INLINE void many_rows_step(const float* x, const float* values, const int32_t* offsets, float* sums) {
        constexpr int N = many / lanes;
        F sum[rows][N];
        NMS_UNROLL for (int r = 0; r < rows; r++)
            NMS_UNROLL for (int i = 0; i < N; i++) sum[r][i] = V::load(sums + (r * N + i) * lanes);
        NMS_UNROLL for (int s = 0; s < slots; s++) {
            NMS_UNROLL for (int r = 0; r < rows; r++) {
                const float* at = x + offsets[s * lanes + r];
                const F value = V::set(values[s * lanes + r]);
                NMS_UNROLL for (int i = 0; i < N; i++) sum[r][i] = V::fma(value, V::load(at + i * lanes), sum[r][i]);
            }
        }
        NMS_UNROLL for (int r = 0; r < rows; r++)
            NMS_UNROLL for (int i = 0; i < N; i++) V::store(sums + (r * N + i) * lanes, sum[r][i]);
    }

    // `weight_rows` weight rows, from vector `first` on, by `many` rows of x that is turned over already,
    // [chunks * 32][many]; sums is [many][weight_rows].
    template <Format format>
    static NMS_NOINLINE void many_rows(const uint8_t* packed, int64_t out, int64_t in, const float* turned, int64_t first,
                                       float* result) {
        constexpr int64_t vectors = weight_rows / lanes;
        constexpr int at_once = lanes == 16 ? 2 : 1, kept = kept_of_4(format), slots = 8 * kept;
        const int64_t chunks = L::chunks(format, in);
        const int64_t last = smaller(first + vectors, blocks_of(out, lanes));
        alignas(64) float sums[weight_rows * many];
        alignas(64) int32_t offsets[slots * lanes];
        alignas(64) float values[slots * lanes];
        std::memset(sums, 0, sizeof sums);
        for (int64_t k = 0; k < chunks; k++) {
            const float* x = turned + k * 32 * many;
            for (int64_t v = first; v < last; v++) {
                const uint8_t* chunk = packed + L::row_at(format, v * lanes, in) + k * R * L::part_bytes(format);
                const I places = V::load_int(chunk);
                NMS_UNROLL for (int s = 0; s < slots; s++) {
                    I at = V::both(V::shift_right(places, 2 * s), V::set_int(3));
                    at = V::sum(at, V::set_int(4 * (s / kept)));
                    V::store_int(offsets + s * lanes, V::shift_left(at, 6));  // a column is a tile of 64
                }
                const float* from = values;
                if constexpr (format == sparse_fp32 || format == fp32_1of4) {
                    from = reinterpret_cast<const float*>(chunk + L::vector);
                } else {
                    NMS_UNROLL for (int pair = 0; pair < slots / 2; pair++) {
                        F first, second;
                        load_pair<format>(chunk, pair, first, second);
                        V::store(values + 2 * pair * lanes, first);
                        V::store(values + (2 * pair + 1) * lanes, second);
                    }
                }
                float* into = sums + (v - first) * lanes * many;
                for (int64_t r = 0; r < lanes; r += at_once)
                    many_rows_step<slots, at_once>(x, from + r, offsets + r, into + r * many);
            }
        }
        for (int64_t r = 0; r < weight_rows; r += 8)
            for (int64_t i = 0; i < many; i += 8)
                V::transpose8(sums + r * many + i, many, result + i * weight_rows + r, weight_rows);
    }

    // Turns rows of x over: [rows][width] to [width][many], zeros for the rows that are missing.
    static void turn(const float* x, int64_t x_stride, int64_t rows, int64_t begin, int64_t end, float* turned) {
        for (int64_t i = 0; i < many; i += 8)
            if (i + 8 <= rows)
                for (int64_t k = begin; k < end; k += 8)
                    V::transpose8(x + i * x_stride + k, x_stride, turned + k * many + i, many);
            else
                for (int64_t j = i; j < i + 8; j++)
                    for (int64_t k = begin; k < end; k++) turned[k * many + j] = j < rows ? x[j * x_stride + k] : 0.0f;
    }

};

}  // namespace nms
