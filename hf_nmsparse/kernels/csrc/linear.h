// y = x @ W.T + bias for packed W, once for all vector units.
//
// Few rows: a tile of 2 blocks of weight rows by up to 8 rows of x; each group's four activations are repeated over the
// lanes and a permutation picks, lane by lane, the kept ones. Many rows: x turned over, so that one weight multiplies a
// vector of rows, and its place chooses which vector. Every output is summed in one order, whatever the threads do.
#pragma once
#include "common.h"
#include "layout.h"

namespace nms {

template <class V>
struct Linear {
    using F = typename V::Float;
    using I = typename V::Int;
    using L = Layout<V>;
    static constexpr int64_t lanes = V::lanes;

    struct Output {
        void* y;  // [rows, out]
        int64_t out;
        Number number;
        const float* bias;  // [out], or null
    };

    // Writes `lanes` outputs of one row from column `column` on, those that exist.
    static NMS_INLINE void emit(const Output& o, int64_t row, int64_t column, F value) {
        const int count = static_cast<int>(smaller(lanes, o.out - column));
        if (count <= 0) return;  // a row that fills its block
        if (o.bias)
            value = V::add(value, count == lanes ? V::load(o.bias + column) : V::load(o.bias + column, count));
        if (o.number == fp32) {
            float* to = static_cast<float*>(o.y) + row * o.out + column;
            if (count == lanes)
                V::store(to, value);
            else
                V::store(to, value, count);
            return;
        }
        float all[lanes];
        V::store(all, value);
        uint16_t* to = static_cast<uint16_t*>(o.y) + row * o.out + column;
        for (int i = 0; i < count; i++) to[i] = float_to_bf16(all[i]);
    }

    // `count` numbers as fp32, then zeros up to `width`.
    static NMS_INLINE void widen(Number number, const void* from, int64_t count, float* to, int64_t width) {
        if (number == fp32)
            std::memcpy(to, from, 4 * count);
        else
            for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(static_cast<const uint16_t*>(from)[i]);
        std::memset(to + count, 0, 4 * (width - count));
    }
    static NMS_INLINE const void* row_of(const Product& p, int64_t row) {
        return static_cast<const uint8_t*>(p.x) + row * p.x_stride * (p.number == fp32 ? 4 : 2);
    }

    // How many of `unit` weights make work enough for a thread.
    static NMS_INLINE int64_t grain(int64_t unit, int64_t rows) { return larger(1, 131072 / larger(1, unit * rows)); }

    static constexpr int R = 2;  // vectors of rows of a block

    // Weights stream from memory once and in order. Asking for them a page ahead, into the second-level cache, hides the
    // memory's latency; into the first level it takes the slots that loads need.
    template <Format format>
    static NMS_INLINE void fetch_ahead(const uint8_t* chunk) {
        for (int64_t line = 0; line < R * L::part_bytes(format); line += 64) V::fetch(chunk + 4096 + line);
    }

    // ---- few rows, float values -------------------------------------------------------------------------------------

    template <Format format>
    static NMS_INLINE void load_pair(const uint8_t* chunk, int group, F& first, F& second) {
        if constexpr (format == sparse_fp32) {
            first = V::load(reinterpret_cast<const float*>(chunk + L::vector * (1 + 2 * group)));
            second = V::load(reinterpret_cast<const float*>(chunk + L::vector * (2 + 2 * group)));
        } else {
            const I pair = V::load_int(chunk + L::vector * (1 + group));
            first = V::as_float(V::shift_left(pair, 16));
            second = V::as_float(V::both(pair, V::set_int(static_cast<int32_t>(0xffff0000))));
        }
    }

    // One block of the weight by B rows of x.
    template <Format format, int B>
    static NMS_NOINLINE void float_tile(const uint8_t* w, int64_t chunks, const float* x, int64_t x_stride,
                                        const Output& o, int64_t row, int64_t column) {
        constexpr int split = R * B < 4 ? 2 : 1;  // enough sums in flight to hide the latency of one
        F sum[R][B][split];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++)
                for (int s = 0; s < split; s++) sum[r][b][s] = V::set(0.0f);
        const int64_t bytes = L::part_bytes(format);
        for (int64_t k = 0; k < chunks; k++) {
            const uint8_t* chunk = w + k * R * bytes;
            const float* xk = x + 32 * k;
            fetch_ahead<format>(chunk);
            I places[R];
            NMS_UNROLL for (int r = 0; r < R; r++) places[r] = V::load_int(chunk + r * bytes);
            NMS_UNROLL for (int group = 0; group < 8; group++) {
                F value[R][2];
                NMS_UNROLL for (int r = 0; r < R; r++)
                    load_pair<format>(chunk + r * bytes, group, value[r][0], value[r][1]);
                NMS_UNROLL for (int slot = 0; slot < 2; slot++) {
                    I place[R];
                    NMS_UNROLL for (int r = 0; r < R; r++) place[r] = V::shift_right(places[r], 4 * group + 2 * slot);
                    NMS_UNROLL for (int b = 0; b < B; b++) {
                        const F four = V::repeat4(xk + b * x_stride + 4 * group);
                        NMS_UNROLL for (int r = 0; r < R; r++) {
                            F& into = sum[r][b][split == 2 ? slot : 0];
                            into = V::fma(V::pick4(four, place[r]), value[r][slot], into);
                        }
                    }
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) {
                F total = sum[r][b][0];
                if constexpr (split == 2) total = V::add(total, sum[r][b][1]);
                emit(o, row + b, column + r * lanes, total);
            }
    }

    template <Format format, int B>
    static NMS_INLINE void float_tiles(int count, const uint8_t* w, int64_t chunks, const float* x, int64_t x_stride,
                                       const Output& o, int64_t row, int64_t column) {
        if constexpr (B > 0) {
            if (count == B)
                float_tile<format, B>(w, chunks, x, x_stride, o, row, column);
            else
                float_tiles<format, B - 1>(count, w, chunks, x, x_stride, o, row, column);
        }
    }

    template <Format format>
    static void few_rows(const Product& p, const float* x, int64_t x_stride, const Output& o, int64_t first_row,
                         int64_t rows) {
        constexpr int most = V::few_rows_tile;
        const int64_t block_bytes = L::block_bytes(format, p.in), chunks = L::chunks(format, p.in);
        parallel(blocks_of(p.out, L::block_rows), grain(lanes * p.in, rows), [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; block++)
                for (int64_t b = 0; b < rows; b += most)
                    float_tiles<format, most>(static_cast<int>(smaller(most, rows - b)), p.packed + block * block_bytes,
                                              chunks, x + b * x_stride, x_stride, o, first_row + b,
                                              block * L::block_rows);
        });
    }

    // ---- many rows, float values ------------------------------------------------------------------------------------

    static constexpr int64_t tile = 64;         // rows of x
    static constexpr int64_t enough = 56;       // rows that make a tile worth its time
    static constexpr int64_t weight_rows = 32;  // of a work item
    // Rows are worked on in batches, so that scratch memory does not grow with their number.
    static constexpr int64_t batch = 512;

    // Sums of `R` weight rows over one chunk. x is [32][tile].
    template <int R>
    static NMS_INLINE void many_rows_step(const float* x, const float* values, const int32_t* offsets, float* sums) {
        constexpr int N = tile / lanes;
        F sum[R][N];
        NMS_UNROLL for (int r = 0; r < R; r++)
            NMS_UNROLL for (int i = 0; i < N; i++) sum[r][i] = V::load(sums + (r * N + i) * lanes);
        NMS_UNROLL for (int s = 0; s < 16; s++) {
            NMS_UNROLL for (int r = 0; r < R; r++) {
                const float* at = x + offsets[s * lanes + r];
                const F value = V::set(values[s * lanes + r]);
                NMS_UNROLL for (int i = 0; i < N; i++) sum[r][i] = V::fma(value, V::load(at + i * lanes), sum[r][i]);
            }
        }
        NMS_UNROLL for (int r = 0; r < R; r++)
            NMS_UNROLL for (int i = 0; i < N; i++) V::store(sums + (r * N + i) * lanes, sum[r][i]);
    }

    // Rows [row, row + tile) of the product; x is turned over already, [chunks * 32][tile].
    template <Format format>
    static NMS_NOINLINE void many_rows_item(const Product& p, const float* turned, const Output& o, int64_t row,
                                            int64_t rows, int64_t first) {
        constexpr int64_t vectors = weight_rows / lanes;
        constexpr int at_once = lanes == 16 ? 2 : 1;
        const int64_t chunks = L::chunks(format, p.in);
        const int64_t last = smaller(first + vectors, blocks_of(p.out, lanes));
        alignas(64) float sums[weight_rows * tile];
        alignas(64) int32_t offsets[16 * lanes];
        alignas(64) float values[16 * lanes];
        std::memset(sums, 0, sizeof sums);
        for (int64_t k = 0; k < chunks; k++) {
            const float* x = turned + k * 32 * tile;
            for (int64_t v = first; v < last; v++) {
                const uint8_t* chunk = p.packed + L::row_at(format, v * lanes, p.in) + k * R * L::part_bytes(format);
                const I places = V::load_int(chunk);
                NMS_UNROLL for (int s = 0; s < 16; s++) {
                    I at = V::both(V::shift_right(places, 2 * s), V::set_int(3));
                    at = V::sum(at, V::set_int(4 * (s / 2)));
                    V::store_int(offsets + s * lanes, V::shift_left(at, 6));  // a column is a tile of 64
                }
                const float* from = values;
                if constexpr (format == sparse_fp32) {
                    from = reinterpret_cast<const float*>(chunk + L::vector);
                } else {
                    NMS_UNROLL for (int group = 0; group < 8; group++) {
                        F first, second;
                        load_pair<format>(chunk, group, first, second);
                        V::store(values + 2 * group * lanes, first);
                        V::store(values + (2 * group + 1) * lanes, second);
                    }
                }
                float* into = sums + (v - first) * lanes * tile;
                for (int64_t r = 0; r < lanes; r += at_once)
                    many_rows_step<at_once>(x, from + r, offsets + r, into + r * tile);
            }
        }
        alignas(64) float turned_back[tile * weight_rows];
        for (int64_t r = 0; r < weight_rows; r += 8)
            for (int64_t i = 0; i < tile; i += 8)
                V::transpose8(sums + r * tile + i, tile, turned_back + i * weight_rows + r, weight_rows);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t v = first; v < last; v++)
                emit(o, row + i, v * lanes, V::load(turned_back + i * weight_rows + (v - first) * lanes));
    }

    // Turns rows of x over: [rows][width] to [width][tile], zeros for the rows that are missing.
    static void turn(const float* x, int64_t x_stride, int64_t rows, int64_t begin, int64_t end, float* turned) {
        for (int64_t i = 0; i < tile; i += 8)
            if (i + 8 <= rows)
                for (int64_t k = begin; k < end; k += 8)
                    V::transpose8(x + i * x_stride + k, x_stride, turned + k * tile + i, tile);
            else
                for (int64_t j = i; j < i + 8; j++)
                    for (int64_t k = begin; k < end; k++) turned[k * tile + j] = j < rows ? x[j * x_stride + k] : 0.0f;
    }

    template <Format format>
    static void many_rows(const Product& p, const float* x, int64_t x_stride, float* turned, const Output& o,
                          int64_t first_row, int64_t rows) {
        const int64_t width = padded(p.in, 32), tiles = blocks_of(rows, tile);
        const int64_t items = blocks_of(p.out, weight_rows);
        parallel(tiles * (width / 32), larger(1, 32768 / (32 * tile)), [&](int64_t begin, int64_t end) {
            while (begin < end) {  // a run of chunks of one tile at a time
                const int64_t t = begin / (width / 32), from = begin % (width / 32);
                const int64_t to = smaller(width / 32, from + end - begin);
                turn(x + t * tile * x_stride, x_stride, smaller(tile, rows - t * tile), 32 * from, 32 * to,
                     turned + t * tile * width);
                begin += to - from;
            }
        });
        parallel(tiles * items, grain(weight_rows * p.in / 2, tile), [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int64_t t = item % tiles, first = item / tiles * (weight_rows / lanes);
                many_rows_item<format>(p, turned + t * tile * width, o, first_row + t * tile,
                                       smaller(tile, rows - t * tile), first);
            }
        });
    }

    template <Format format>
    static void multiply_float(const Product& p) {
        const int64_t width = padded(p.in, 32);
        const bool in_place = p.number == fp32 && width == p.in;
        const int64_t most = smaller(batch, p.rows);
        const int64_t x_bytes = in_place ? 0 : 4 * most * width, bias_bytes = 4 * padded(p.out, 16);
        const int64_t turned_bytes = most < enough ? 0 : 4 * padded(most, tile) * width;
        uint8_t* memory = scratch(bias_bytes + x_bytes + turned_bytes);
        const Output o = output(p, reinterpret_cast<float*>(memory));
        float* copy = reinterpret_cast<float*>(memory + bias_bytes);
        float* turned = reinterpret_cast<float*>(memory + bias_bytes + x_bytes);
        for (int64_t first = 0; first < p.rows; first += batch) {
            const int64_t rows = smaller(batch, p.rows - first);
            const float* x = static_cast<const float*>(row_of(p, first));
            int64_t x_stride = p.x_stride;
            if (!in_place) {
                for (int64_t i = 0; i < rows; i++) widen(p.number, row_of(p, first + i), p.in, copy + i * width, width);
                x = copy;
                x_stride = width;
            }
            // Whole tiles, and one that the rest nearly fills.
            const int64_t tiled = rows / tile * tile, rest = rows - tiled;
            const int64_t many = rest >= enough ? rows : tiled;
            if (many) many_rows<format>(p, x, x_stride, turned, o, first, many);
            if (many < rows)
                few_rows<format>(p, x + many * x_stride, x_stride, o, first + many, rows - many);
        }
    }

    static NMS_INLINE Output output(const Product& p, float* bias) {
        Output o{p.y, p.out, p.number, nullptr};
        if (p.bias && p.number == fp32) o.bias = static_cast<const float*>(p.bias);
        if (p.bias && p.number != fp32) {
            widen(p.number, p.bias, p.out, bias, p.out);
            o.bias = bias;
        }
        return o;
    }

    // ---- int8 values ------------------------------------------------------------------------------------------------

    // One row of x as unsigned bytes: x is about scale * (byte - zero), and zero itself is exact. A row with a number
    // that is not finite gets the scale NaN.
    static NMS_NOINLINE void quantise(const float* x, int64_t in, uint8_t* bytes, int64_t width, float* scale,
                                      int32_t* zero) {
        F low = V::set(0.0f), high = V::set(0.0f), check = V::set(0.0f);
        const F none = V::set(0.0f);
        int64_t k = 0;
        for (; k + lanes <= in; k += lanes) {
            const F v = V::load(x + k);
            low = V::min(v, low);
            high = V::max(v, high);
            check = V::fma(v, none, check);
        }
        if (k < in) {
            const F v = V::load(x + k, static_cast<int>(in - k));
            low = V::min(v, low);
            high = V::max(v, high);
            check = V::fma(v, none, check);
        }
        const float finite = V::total(check);
        const float step = V::highest(high) / V::int8_levels - V::lowest(low) / V::int8_levels;
        const float inverse = step > 0.0f && finite == 0.0f ? 1.0f / step : 0.0f;
        const bool usable = inverse > 0.0f && inverse <= 3e38f;
        const float bottom = usable ? -V::lowest(low) * inverse : 0.0f;
        *zero = static_cast<int32_t>(bottom + 0.5f);
        *scale = (usable ? step : 0.0f) + finite;
        const F times = V::set(usable ? inverse : 0.0f), shift = V::set(static_cast<float>(*zero));
        const F least = V::set(0.0f), most = V::set(V::int8_levels);
        for (k = 0; k < in; k += lanes) {
            const F v = k + lanes <= in ? V::load(x + k) : V::load(x + k, static_cast<int>(in - k));
            const F level = V::fma(v, times, shift);
            V::store_low_bytes(bytes + k, V::round(V::min(V::max(level, least), most)));
        }
        std::memset(bytes + padded(in, lanes), 0, width - padded(in, lanes));
    }

    struct Bytes {
        const uint8_t* x;  // [rows][stride]
        int64_t stride;
        const float* scale;
        const int32_t* zero;
        const float* weight_scale;  // [out], padded to whole blocks
        const int32_t* weight_sum;
    };

    template <int B, int split>
    static NMS_INLINE void emit_int8(const I (&sum)[R][B][split], const Bytes& q, const Output& o, int64_t first,
                                     int64_t row, int64_t column) {
        for (int r = 0; r < R; r++) {
            const F scale = V::load(q.weight_scale + column + r * lanes);
            const F values = V::to_float(V::load_int(q.weight_sum + column + r * lanes));
            for (int b = 0; b < B; b++) {
                I total = sum[r][b][0];
                if constexpr (split == 2) total = V::sum(total, sum[r][b][1]);
                const F shifted =
                    V::fma(values, V::set(-static_cast<float>(q.zero[first + b])), V::to_float(total));
                emit(o, row + b, column + r * lanes, V::mul(shifted, V::mul(scale, V::set(q.scale[first + b]))));
            }
        }
    }

    // One block of the weight by B rows of x, from row `first` of q on.
    template <Format format, int B>
    static NMS_NOINLINE void int8_tile(const uint8_t* w, int64_t chunks, const Bytes& q, const Output& o, int64_t first,
                                       int64_t row, int64_t column) {
        constexpr int split = R * B < 4 ? 2 : 1;
        I sum[R][B][split];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++)
                for (int s = 0; s < split; s++) sum[r][b][s] = V::zero();
        const uint8_t* x = q.x + first * q.stride;
        const int64_t bytes = L::part_bytes(format), columns = L::chunk_columns(format);
        for (int64_t k = 0; k < chunks; k++) {
            const uint8_t* chunk = w + k * R * bytes;
            const uint8_t* xk = x + k * columns;
            fetch_ahead<format>(chunk);
            if constexpr (format == sparse_int8) {
                NMS_UNROLL for (int h = 0; h < 2; h++) {
                    I fields[R];
                    NMS_UNROLL for (int r = 0; r < R; r++) fields[r] = V::load_int(chunk + r * bytes + h * L::vector);
                    NMS_UNROLL for (int f = 0; f < 4; f++) {
                        I place[R], value[R];
                        NMS_UNROLL for (int r = 0; r < R; r++) {
                            place[r] = V::places(fields[r], f, f & 1);
                            value[r] = V::load_int(chunk + r * bytes + (2 + 4 * h + f) * L::vector);
                        }
                        NMS_UNROLL for (int b = 0; b < B; b++) {
                            const I sixteen = V::repeat16(xk + b * q.stride + (2 * h + f / 2) * 16);
                            NMS_UNROLL for (int r = 0; r < R; r++) {
                                I& into = sum[r][b][split == 2 ? f & 1 : 0];
                                into = V::dot(into, V::pick_bytes(sixteen, place[r]), value[r]);
                            }
                        }
                    }
                }
            } else {
                NMS_UNROLL for (int v = 0; v < 4; v++) {
                    I value[R];
                    NMS_UNROLL for (int r = 0; r < R; r++) value[r] = V::load_int(chunk + r * bytes + v * L::vector);
                    NMS_UNROLL for (int b = 0; b < B; b++) {
                        const I four = V::repeat_dword(xk + b * q.stride + 4 * v);
                        NMS_UNROLL for (int r = 0; r < R; r++) {
                            I& into = sum[r][b][split == 2 ? v & 1 : 0];
                            into = V::dot(into, four, value[r]);
                        }
                    }
                }
            }
        }
        emit_int8<B, split>(sum, q, o, first, row, column);
    }

    template <Format format, int B>
    static NMS_INLINE void int8_tiles(int count, const uint8_t* w, int64_t chunks, const Bytes& q, const Output& o,
                                      int64_t first, int64_t row, int64_t column) {
        if constexpr (B > 0) {
            if (count == B)
                int8_tile<format, B>(w, chunks, q, o, first, row, column);
            else
                int8_tiles<format, B - 1>(count, w, chunks, q, o, first, row, column);
        }
    }

    template <Format format>
    static void multiply_int8(const Product& p) {
        const int64_t width = padded(p.in, 64), most = smaller(batch, p.rows), bias_bytes = 4 * padded(p.out, 16);
        const bool in_place = p.number == fp32;
        const int64_t levels_bytes = 4 * padded(most, 16), x_bytes = in_place ? 0 : 4 * most * width;
        uint8_t* memory = scratch(bias_bytes + 2 * levels_bytes + x_bytes + most * width + 64);
        const Output o = output(p, reinterpret_cast<float*>(memory));
        float* scale = reinterpret_cast<float*>(memory + bias_bytes);
        int32_t* zero = reinterpret_cast<int32_t*>(memory + bias_bytes + levels_bytes);
        float* copy = reinterpret_cast<float*>(memory + bias_bytes + 2 * levels_bytes);
        uint8_t* bytes = memory + bias_bytes + 2 * levels_bytes + x_bytes;
        const Bytes q{bytes,
                      width,
                      scale,
                      zero,
                      reinterpret_cast<const float*>(p.packed + L::scales_at(format, p.out, p.in)),
                      reinterpret_cast<const int32_t*>(p.packed + L::sums_at(format, p.out, p.in))};
        const int64_t block_bytes = L::block_bytes(format, p.in), chunks = L::chunks(format, p.in);
        for (int64_t row = 0; row < p.rows; row += batch) {
            const int64_t rows = smaller(batch, p.rows - row);
            parallel(rows, larger(1, 32768 / larger(1, p.in)), [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    const float* x = static_cast<const float*>(row_of(p, row + i));
                    if (!in_place) {
                        widen(p.number, row_of(p, row + i), p.in, copy + i * width, width);
                        x = copy + i * width;
                    }
                    quantise(x, p.in, bytes + i * width, width, scale + i, zero + i);
                }
            });
            const int64_t blocks = blocks_of(p.out, L::block_rows);
            parallel(blocks, grain(lanes * p.in / 2, rows), [&](int64_t begin, int64_t end) {
                constexpr int tile = V::int8_rows_tile;
                for (int64_t block = begin; block < end; block++)
                    for (int64_t b = 0; b < rows; b += tile)
                        int8_tiles<format, tile>(static_cast<int>(smaller(tile, rows - b)),
                                                 p.packed + block * block_bytes, chunks, q, o, b, row + b,
                                                 block * L::block_rows);
            });
        }
    }

    static void multiply(Format format, const Product& p) {
        switch (format) {
            case sparse_fp32: return multiply_float<sparse_fp32>(p);
            case sparse_bf16: return multiply_float<sparse_bf16>(p);
            case sparse_int8: return multiply_int8<sparse_int8>(p);
            case dense_int8: return multiply_int8<dense_int8>(p);
        }
    }
};

}  // namespace nms
