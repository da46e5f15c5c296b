// y = x @ W.T + bias for packed W: `multiply` for tensors of any width on the caller's threads, `project` for the
// engine's padded rows, with what it does to the sums, on the thread that calls.
#pragma once
#include "layout.h"
#include "linear_float.h"
#include "linear_int8.h"
#include "rows.h"
#include "unit.h"

namespace nms {

template <class V>
struct Linear {
    using F = typename V::Float;
    using I = typename V::Int;
    using L = Layout<V>;
    using Float = LinearFloat<V>;
    using Int8 = LinearInt8<V>;
    static constexpr int64_t lanes = V::lanes, block_rows = L::block_rows;

    template <Format format>
    static constexpr int most_rows() {
        return is_int8(format) ? V::int8_rows_tile : V::few_rows_tile;
    }

    // Calls sink(first, count, sums) with the sums of one block of the weight, for `rows` rows of x. Tiles are of even
    // sizes, 20 rows are 7 + 7 + 6. Each asks for its share of the next block, so that memory is busy all the time; a
    // tile that has all rows asks a page ahead.
    template <Format format, class X, class Sink>
    static NMS_INLINE void block_sums(const uint8_t* packed, int64_t block, int64_t in, const X& x, int64_t rows,
                                      const Sink& sink) {
        constexpr int most = most_rows<format>();
        alignas(64) float sums[most * block_rows];
        const int64_t bytes = L::block_bytes(format, in), chunks = L::chunks(format, in);
        const int64_t parts = blocks_of(rows, most), share = blocks_of(blocks_of(bytes / 64, parts), larger(1, chunks));
        const uint8_t* w = packed + block * bytes;
        for (int64_t part = 0, at = 0; part < parts; part++) {
            const int64_t next = rows * (part + 1) / parts;
            Ahead ahead{w + 4096, 2 * L::part_bytes(format) / 64};
            if (parts > 1) {
                const int64_t asked = part * chunks * share * 64;
                ahead = {w + bytes + asked, asked < bytes ? share : 0};
            }
            tiles<format, most>(static_cast<int>(next - at), w, chunks, x, at, block * block_rows, ahead, sums);
            sink(at, static_cast<int>(next - at), sums);
            at = next;
        }
    }

    struct FloatRows {
        const float* x;
        int64_t stride;
    };
    struct ByteRows {
        const uint8_t* x;
        int64_t stride;
        typename Int8::Scales scales;
    };
    template <Format format, int B, class X>
    static NMS_INLINE void tiles(int count, const uint8_t* w, int64_t chunks, const X& x, int64_t first, int64_t column,
                                 Ahead ahead, float* sums) {
        if constexpr (B > 0) {
            if (count != B)
                tiles<format, B - 1>(count, w, chunks, x, first, column, ahead, sums);
            else if constexpr (is_int8(format))
                Int8::template tile<format, B>(w, chunks, x.x + first * x.stride, x.stride, x.scales, first, column,
                                               ahead, sums);
            else
                Float::template tile<format, B>(w, chunks, x.x + first * x.stride, x.stride, ahead, sums);
        }
    }

    // ---- the engine's products --------------------------------------------------------------------------------------

    template <Format format>
    static void project_as(const Projection& p, const Rows& rows, int64_t count, int64_t first_block,
                           int64_t last_block) {
        constexpr int64_t batch = 256;  // rows that stay in cache while the weight streams by
        for (int64_t row = 0; row < count; row += batch) {
            const int64_t n = smaller(batch, count - row);
            for (int64_t block = first_block; block < last_block; block++) {
                const auto sink = [&](int64_t first, int many, float* sums) NMS_ALWAYS {
                    Finishing<V>::finish(p, row + first, many, block * block_rows, sums);
                };
                if constexpr (is_int8(format))
                    block_sums<format>(p.packed, block, p.in,
                                       ByteRows{rows.bytes + row * rows.byte_stride, rows.byte_stride,
                                                Int8::scales(format, p.packed, p.out, p.in, rows.scale + row,
                                                             rows.zero + row)},
                                       n, sink);
                else
                    block_sums<format>(p.packed, block, p.in, FloatRows{rows.x + row * rows.stride, rows.stride}, n,
                                       sink);
            }
        }
    }
    static void project(const Projection& p, const Rows& rows, int64_t count, int64_t first_block, int64_t last_block) {
        switch (p.format) {
            case sparse_fp32: return project_as<sparse_fp32>(p, rows, count, first_block, last_block);
            case sparse_bf16: return project_as<sparse_bf16>(p, rows, count, first_block, last_block);
            case sparse_int8: return project_as<sparse_int8>(p, rows, count, first_block, last_block);
            case dense_int8: return project_as<dense_int8>(p, rows, count, first_block, last_block);
            case dense_fp32: return project_as<dense_fp32>(p, rows, count, first_block, last_block);
            case dense_bf16: return project_as<dense_bf16>(p, rows, count, first_block, last_block);
            case int8_8of16: return project_as<int8_8of16>(p, rows, count, first_block, last_block);
            case int8_4of16: return project_as<int8_4of16>(p, rows, count, first_block, last_block);
            case fp32_1of4: return project_as<fp32_1of4>(p, rows, count, first_block, last_block);
            case bf16_1of4: return project_as<bf16_1of4>(p, rows, count, first_block, last_block);
            case formats: break;
        }
    }
    static void quantise(const Rows& rows, int64_t begin, int64_t end, int64_t width) {
        for (int64_t i = begin; i < end; i++)
            Int8::quantise(rows.x + i * rows.stride, width, rows.bytes + i * rows.byte_stride, padded(width, 64),
                           rows.scale + i, rows.zero + i);
    }

    // ---- tensors ----------------------------------------------------------------------------------------------------

    static constexpr int64_t enough = 56;  // rows that make a tile of many worth its time
    // Rows are worked on in batches, so that scratch memory does not grow with their number.
    static constexpr int64_t batch = 512;

    struct Output {
        void* y;  // [rows, out]
        int64_t out;
        Number number;
        const float* bias;  // [out], or null
    };
    static NMS_INLINE Output output(const Product& p, float* bias) {
        Output o{p.y, p.out, p.number, nullptr};
        if (p.bias && p.number == fp32) o.bias = static_cast<const float*>(p.bias);
        if (p.bias && p.number != fp32) {
            widen(p.number, p.bias, p.out, bias, p.out);
            o.bias = bias;
        }
        return o;
    }

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
    static NMS_NOINLINE void emit_rows(const Output& o, int64_t row, int64_t rows, int64_t column, int64_t width,
                                       const float* sums) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < width; c += lanes) emit(o, row + i, column + c, V::load(sums + i * width + c));
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

    template <Format format, class X>
    static void few_rows(const Product& p, const X& x, const Output& o, int64_t first_row, int64_t rows) {
        parallel(blocks_of(p.out, block_rows), grain(lanes * p.in, rows), [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; block++)
                block_sums<format>(p.packed, block, p.in, x, rows, [&](int64_t first, int many, float* sums) NMS_ALWAYS {
                    emit_rows(o, first_row + first, many, block * block_rows, block_rows, sums);
                });
        });
    }

    template <Format format>
    static void many_rows(const Product& p, const FloatRows& x, float* turned, const Output& o, int64_t first_row,
                          int64_t rows) {
        constexpr int64_t many = Float::many, weight_rows = Float::weight_rows;
        const int64_t width = padded(p.in, 32), tiles = blocks_of(rows, many);
        const int64_t items = blocks_of(p.out, weight_rows);
        parallel(tiles * (width / 32), larger(1, 32768 / (32 * many)), [&](int64_t begin, int64_t end) {
            while (begin < end) {  // a run of chunks of one tile at a time
                const int64_t t = begin / (width / 32), from = begin % (width / 32);
                const int64_t to = smaller(width / 32, from + end - begin);
                Float::turn(x.x + t * many * x.stride, x.stride, smaller(many, rows - t * many), 32 * from, 32 * to,
                            turned + t * many * width);
                begin += to - from;
            }
        });
        parallel(tiles * items, grain(weight_rows * p.in / 2, many), [&](int64_t begin, int64_t end) {
            alignas(64) float sums[many * weight_rows];
            for (int64_t item = begin; item < end; item++) {
                const int64_t t = item % tiles, first = item / tiles * (weight_rows / lanes);
                Float::template many_rows<format>(p.packed, p.out, p.in, turned + t * many * width, first, sums);
                emit_rows(o, first_row + t * many, smaller(many, rows - t * many), first * lanes, weight_rows, sums);
            }
        });
    }

    template <Format format>
    static void multiply_float(const Product& p) {
        const int64_t width = padded(p.in, 32), many = Float::many;
        const bool in_place = p.number == fp32 && width == p.in;
        const int64_t most = smaller(batch, p.rows);
        const int64_t x_bytes = in_place ? 0 : 4 * most * width, bias_bytes = 4 * padded(p.out, 16);
        const int64_t turned_bytes = most < enough || !kept_of_4(format) ? 0 : 4 * padded(most, many) * width;
        uint8_t* memory = scratch(bias_bytes + x_bytes + turned_bytes);
        if (!memory) return;
        const Output o = output(p, reinterpret_cast<float*>(memory));
        float* copy = reinterpret_cast<float*>(memory + bias_bytes);
        float* turned = reinterpret_cast<float*>(memory + bias_bytes + x_bytes);
        for (int64_t first = 0; first < p.rows; first += batch) {
            const int64_t rows = smaller(batch, p.rows - first);
            FloatRows x{static_cast<const float*>(row_of(p, first)), p.x_stride};
            if (!in_place) {
                for (int64_t i = 0; i < rows; i++) widen(p.number, row_of(p, first + i), p.in, copy + i * width, width);
                x = {copy, width};
            }
            int64_t turned_rows = 0;
            if constexpr (kept_of_4(format) > 0) {  // whole tiles, and one that the rest nearly fills
                const int64_t tiled = rows / many * many;
                turned_rows = rows - tiled >= enough ? rows : tiled;
                if (turned_rows) many_rows<format>(p, x, turned, o, first, turned_rows);
            }
            if (turned_rows < rows)
                few_rows<format>(p, FloatRows{x.x + turned_rows * x.stride, x.stride}, o, first + turned_rows,
                                 rows - turned_rows);
        }
    }

    template <Format format>
    static void multiply_int8(const Product& p) {
        const int64_t width = padded(p.in, 64), most = smaller(batch, p.rows), bias_bytes = 4 * padded(p.out, 16);
        const bool in_place = p.number == fp32;
        const int64_t levels_bytes = 4 * padded(most, 16), x_bytes = in_place ? 0 : 4 * most * width;
        uint8_t* memory = scratch(bias_bytes + 2 * levels_bytes + x_bytes + most * width + 64);
        if (!memory) return;
        const Output o = output(p, reinterpret_cast<float*>(memory));
        float* scale = reinterpret_cast<float*>(memory + bias_bytes);
        int32_t* zero = reinterpret_cast<int32_t*>(memory + bias_bytes + levels_bytes);
        float* copy = reinterpret_cast<float*>(memory + bias_bytes + 2 * levels_bytes);
        uint8_t* bytes = memory + bias_bytes + 2 * levels_bytes + x_bytes;
        const ByteRows x{bytes, width, Int8::scales(format, p.packed, p.out, p.in, scale, zero)};
        for (int64_t row = 0; row < p.rows; row += batch) {
            const int64_t rows = smaller(batch, p.rows - row);
            parallel(rows, larger(1, 32768 / larger(1, p.in)), [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    const float* from = static_cast<const float*>(row_of(p, row + i));
                    if (!in_place) {
                        widen(p.number, row_of(p, row + i), p.in, copy + i * width, width);
                        from = copy + i * width;
                    }
                    Int8::quantise(from, p.in, bytes + i * width, width, scale + i, zero + i);
                }
            });
            few_rows<format>(p, x, o, row, rows);
        }
    }

    static void multiply(Format format, const Product& p) {
        switch (format) {
            case sparse_fp32: return multiply_float<sparse_fp32>(p);
            case sparse_bf16: return multiply_float<sparse_bf16>(p);
            case sparse_int8: return multiply_int8<sparse_int8>(p);
            case dense_int8: return multiply_int8<dense_int8>(p);
            case dense_fp32: return multiply_float<dense_fp32>(p);
            case dense_bf16: return multiply_float<dense_bf16>(p);
            case int8_8of16: return multiply_int8<int8_8of16>(p);
            case int8_4of16: return multiply_int8<int8_4of16>(p);
            case fp32_1of4: return multiply_float<fp32_1of4>(p);
            case bf16_1of4: return multiply_float<bf16_1of4>(p);
            case formats: break;
        }
    }
};

}  // namespace nms
