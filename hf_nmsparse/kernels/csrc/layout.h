// The order of packed weights in memory. Rows of the weight come in blocks of two vectors, a row to a lane, and columns
// in chunks, so that a product reads its weight from the first byte to the last; a chunk holds the part of the first
// vector of rows, then that of the second. Rows and columns beyond the weight's are zero. A part is
//
//   sparse fp32, chunks of 32 columns: `lanes` dwords of places, 2 bits each, group by group, slot by slot; then for
//       each of 8 groups and 2 slots `lanes` values.
//   sparse bf16: the same places; then for each group `lanes` dwords, slot 0 in the low half.
//   fp32 and bf16 of 4: as the sparse ones with one slot a group; two neighbouring groups share the dwords of bf16.
//   sparse int8, chunks of 64 columns: two vectors of places and eight of values. A dword of value vector v holds slot
//       0 and 1 of group 2v, then of group 2v + 1. Bits 2f and 2f + 1 of byte b of place vector h are the place of byte
//       b of value vector 4h + f.
//   int8 of 16, chunks of 64 columns: vectors of places, then twice as many of values, 8 or 4 bytes of each lane for a run
//       of 16 columns, the kept ones in order, zeros behind them. Bits 4f to 4f + 3 of byte b of place vector h are the
//       place within the run of byte b of value vector 2h + f.
//   dense int8, chunks of 16 columns: four vectors, a dword holds four neighbouring columns.
//   dense fp32, chunks of 16 columns: for each column `lanes` values.
//   dense bf16, chunks of 32 columns: for each pair of columns `lanes` dwords, the first in the low half.
//
// Behind the blocks of the int8 formats: the scale of each row, fp32, and the sum of its values, int32, both padded to
// whole blocks.
#pragma once
#include "common.h"

namespace nms {

template <class V>
struct Layout {
    static constexpr int64_t lanes = V::lanes;
    static constexpr int64_t vector = lanes * 4;      // bytes
    static constexpr int64_t block_rows = lanes * 2;

    static NMS_INLINE int64_t chunk_columns(Format format) {
        return format == sparse_int8 || kept_of_16(format) ? 64 : format == dense_int8 || format == dense_fp32 ? 16 : 32;
    }
    static NMS_INLINE int64_t value_bytes(Format format) {
        constexpr int64_t bytes[formats] = {4, 2, 1, 1, 4, 2, 1, 1, 4, 2};
        return bytes[format];
    }
    static NMS_INLINE int64_t part_bytes(Format format) {
        constexpr int64_t vectors[formats] = {17, 9, 10, 4, 16, 16, 12, 6, 9, 5};
        return vector * vectors[format];
    }
    static NMS_INLINE int64_t chunks(Format format, int64_t in) { return blocks_of(in, chunk_columns(format)); }
    static NMS_INLINE int64_t block_bytes(Format format, int64_t in) {
        return chunks(format, in) * 2 * part_bytes(format);
    }
    static NMS_INLINE int64_t blocks_bytes(Format format, int64_t out, int64_t in) {
        return blocks_of(out, block_rows) * block_bytes(format, in);
    }
    static int64_t packed_bytes(Format format, int64_t out, int64_t in) {
        return blocks_bytes(format, out, in) + (is_int8(format) ? 8 * padded(out, block_rows) : 0);
    }
    static NMS_INLINE int64_t scales_at(Format format, int64_t out, int64_t in) {
        return blocks_bytes(format, out, in);
    }
    static NMS_INLINE int64_t sums_at(Format format, int64_t out, int64_t in) {
        return blocks_bytes(format, out, in) + 4 * padded(out, block_rows);
    }
    // From the start of the weight to the first part of a row.
    static NMS_INLINE int64_t row_at(Format format, int64_t row, int64_t in) {
        return row / block_rows * block_bytes(format, in) + row / lanes % 2 * part_bytes(format);
    }

    // Where in a part the value of a slot lies: of floats, whose slots are counted through the part, and of int8.
    static NMS_INLINE int64_t float_value_at(Format format, int64_t slot, int64_t lane) {
        return value_bytes(format) == 4 ? vector * (1 + slot) + 4 * lane
                                        : vector * (1 + slot / 2) + 4 * lane + 2 * (slot & 1);
    }
    static NMS_INLINE int64_t int8_byte(int64_t group, int slot, int64_t lane) {
        return 4 * lane + 2 * (group & 1) + slot;
    }

    static void repack(Format format, int64_t out, int64_t in, const void* values, const uint8_t* codes,
                       const float* scales, uint8_t* packed) {
        const int64_t bytes = block_bytes(format, in), many = larger(1, 65536 / larger(1, block_rows * in));
        parallel(blocks_of(out, block_rows), many, [=](int64_t begin, int64_t end) {
            std::memset(packed + begin * bytes, 0, (end - begin) * bytes);
            for (int64_t row = begin * block_rows; row < smaller(end * block_rows, out); row++) {
                uint8_t* parts = packed + row_at(format, row, in);
                if (is_2_of_4(format))
                    repack_row(format, in, values, codes, row, parts);
                else
                    repack_whole_row(format, static_cast<const uint8_t*>(values) + row * in * value_bytes(format), in,
                                     row % lanes, parts);
            }
        });
        if (!is_int8(format)) return;
        const int64_t width = is_2_of_4(format) ? in / 2 : in;
        uint8_t* to = packed + scales_at(format, out, in);
        std::memset(to, 0, 8 * padded(out, block_rows));
        std::memcpy(to, scales, 4 * out);
        for (int64_t row = 0; row < out; row++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < width; i++) sum += static_cast<const int8_t*>(values)[row * width + i];
            std::memcpy(packed + sums_at(format, out, in) + 4 * row, &sum, 4);
        }
    }

    // Rows of a weight as a weight of their own. In every format a vector of a part holds a dword for each of its rows.
    static void gather(Format format, int64_t out, int64_t in, const uint8_t* packed, const int32_t* rows, int64_t count,
                       uint8_t* gathered) {
        const int64_t part = part_bytes(format), parts = chunks(format, in), bytes = block_bytes(format, in);
        if (count % block_rows) std::memset(gathered + count / block_rows * bytes, 0, bytes);
        for (int64_t i = 0; i < count; i++) {
            const uint8_t* from = packed + row_at(format, rows[i], in) + 4 * (rows[i] % lanes);
            uint8_t* to = gathered + row_at(format, i, in) + 4 * (i % lanes);
            for (int64_t p = 0; p < parts; p++, from += 2 * part, to += 2 * part)
                for (int64_t at = 0; at < part; at += vector) std::memcpy(to + at, from + at, 4);
        }
        if (!is_int8(format)) return;
        std::memset(gathered + scales_at(format, count, in), 0, 8 * padded(count, block_rows));
        for (int64_t i = 0; i < count; i++) {
            std::memcpy(gathered + scales_at(format, count, in) + 4 * i, packed + scales_at(format, out, in) + 4 * rows[i], 4);
            std::memcpy(gathered + sums_at(format, count, in) + 4 * i, packed + sums_at(format, out, in) + 4 * rows[i], 4);
        }
    }

    // The places of the two kept of four, by the code of the file.
    static NMS_INLINE uint32_t place(uint32_t code, int slot) {
        constexpr uint8_t first[8] = {0, 0, 0, 1, 1, 2, 0, 0}, second[8] = {1, 2, 3, 2, 3, 3, 1, 1};
        return slot ? second[code] : first[code];
    }
    static NMS_INLINE uint32_t code_of(const uint8_t* codes, int64_t group) {
        const int64_t bit = 3 * group, shift = bit & 7;
        uint32_t bytes = codes[bit >> 3];
        if (shift > 5) bytes |= static_cast<uint32_t>(codes[(bit >> 3) + 1]) << 8;
        return bytes >> shift & 7;
    }

    static void repack_row(Format format, int64_t in, const void* values, const uint8_t* codes, int64_t row,
                           uint8_t* parts) {
        const int64_t groups = in / 4, lane = row % lanes, columns = chunk_columns(format) / 4;
        const uint8_t* row_codes = codes + row * blocks_of(groups * 3, 8);
        for (int64_t g = 0; g < groups; g++) {
            uint8_t* chunk = parts + g / columns * 2 * part_bytes(format);
            const int64_t group = g % columns, from = (row * groups + g) * 2;
            const uint32_t code = code_of(row_codes, g);
            for (int slot = 0; slot < 2; slot++) {
                if (format == sparse_int8) {
                    const int64_t byte = int8_byte(group, slot, lane), v = group / 2;
                    chunk[vector * (2 + v) + byte] = static_cast<const uint8_t*>(values)[from + slot];
                    chunk[vector * (v / 4) + byte] |= static_cast<uint8_t>(place(code, slot) << (2 * (v & 3)));
                    continue;
                }
                put_float(format, static_cast<const uint8_t*>(values) + (from + slot) * value_bytes(format),
                          place(code, slot), 2 * group + slot, lane, chunk);
            }
        }
    }
    static NMS_INLINE void put_float(Format format, const uint8_t* value, uint32_t place, int64_t slot, int64_t lane,
                                     uint8_t* chunk) {
        uint32_t places;
        std::memcpy(&places, chunk + 4 * lane, 4);
        places |= place << (2 * slot);
        std::memcpy(chunk + 4 * lane, &places, 4);
        std::memcpy(chunk + float_value_at(format, slot, lane), value, value_bytes(format));
    }
    // Of all columns of a row, with zeros where nothing is kept.
    static void repack_whole_row(Format format, const uint8_t* values, int64_t in, int64_t lane, uint8_t* parts) {
        if (kept_of_16(format)) return repack_row_of_16(format, values, in, lane, parts);
        if (kept_of_4(format)) return repack_row_of_4(format, values, in, lane, parts);
        repack_dense_row(format, values, in, lane, parts);
    }
    // Groups of four have no more than one value.
    static void repack_row_of_4(Format format, const uint8_t* values, int64_t in, int64_t lane, uint8_t* parts) {
        constexpr uint8_t nothing[4] = {};
        const int64_t size = value_bytes(format), columns = chunk_columns(format);
        for (int64_t i = 0; i < in; i++)
            if (std::memcmp(values + i * size, nothing, size))  // -0.0 is kept
                put_float(format, values + i * size, i & 3, i % columns / 4, lane,
                          parts + i / columns * 2 * part_bytes(format));
    }

    // Where in a part the value of a slot of a run of 16 lies, and its place: byte, and shift within it.
    struct Spot {
        int64_t value, place;
        int shift;
    };
    static NMS_INLINE Spot spot(Format format, int64_t run, int slot, int64_t lane) {
        const int64_t each = kept_of_16(format) / 4, v = run % 4 * each + slot / 4, byte = 4 * lane + slot % 4;
        return {vector * (2 * each + v) + byte, vector * (v / 2) + byte, 4 * static_cast<int>(v & 1)};
    }
    // Runs of 16 have no more values than the format keeps.
    static void repack_row_of_16(Format format, const uint8_t* values, int64_t in, int64_t lane, uint8_t* parts) {
        for (int64_t run = 0; run < blocks_of(in, 16); run++) {
            uint8_t* chunk = parts + run / 4 * 2 * part_bytes(format);
            int slot = 0;
            for (int64_t i = 16 * run; i < smaller(16 * run + 16, in) && slot < kept_of_16(format); i++) {
                if (!values[i]) continue;
                const Spot at = spot(format, run, slot++, lane);
                chunk[at.value] = values[i];
                chunk[at.place] |= static_cast<uint8_t>((i & 15) << at.shift);
            }
        }
    }
    static void restore_row_of_16(Format format, int64_t in, const uint8_t* parts, int64_t lane, uint8_t* row) {
        std::memset(row, 0, in);
        for (int64_t run = 0; run < blocks_of(in, 16); run++) {
            const uint8_t* chunk = parts + run / 4 * 2 * part_bytes(format);
            for (int slot = 0; slot < kept_of_16(format); slot++) {
                const Spot at = spot(format, run, slot, lane);
                const int64_t column = 16 * run + (chunk[at.place] >> at.shift & 15);
                if (chunk[at.value] && column < in) row[column] = chunk[at.value];
            }
        }
    }

    static void repack_dense_row(Format format, const uint8_t* values, int64_t in, int64_t lane, uint8_t* parts) {
        const int64_t size = value_bytes(format);
        for (int64_t i = 0; i < in; i++) std::memcpy(parts + dense_at(format, i, lane), values + i * size, size);
    }
    // A dword holds 4, 2 or 1 neighbouring columns, a vector those of `lanes` rows.
    static NMS_INLINE int64_t dense_at(Format format, int64_t column, int64_t lane) {
        const int64_t size = value_bytes(format), together = 4 / size, columns = chunk_columns(format);
        return column / columns * 2 * part_bytes(format) + column % columns / together * vector + 4 * lane +
               column % together * size;
    }

    // The dense weight [out, in], in fp32, bf16 or int8 as the format holds values, and the scales of int8.
    static void restore(Format format, int64_t out, int64_t in, const uint8_t* packed, void* dense, float* scales) {
        const int64_t size = value_bytes(format);
        parallel(out, larger(1, 65536 / larger(1, in)), [=](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++)
                restore_row(format, in, packed + row_at(format, row, in), row % lanes,
                            static_cast<uint8_t*>(dense) + row * in * size);
        });
        if (scales) std::memcpy(scales, packed + scales_at(format, out, in), 4 * out);
    }

    static void restore_row(Format format, int64_t in, const uint8_t* parts, int64_t lane, uint8_t* row) {
        const int64_t size = value_bytes(format);
        if (kept_of_16(format)) return restore_row_of_16(format, in, parts, lane, row);
        const int kept = kept_of_4(format);
        if (!kept) {
            for (int64_t i = 0; i < in; i++) std::memcpy(row + i * size, parts + dense_at(format, i, lane), size);
            return;
        }
        const int64_t columns = chunk_columns(format) / 4;
        std::memset(row, 0, in * size);
        for (int64_t g = 0; g < blocks_of(in, 4); g++) {
            const uint8_t* chunk = parts + g / columns * 2 * part_bytes(format);
            const int64_t group = g % columns;
            for (int slot = 0; slot < kept; slot++) {
                if (format == sparse_int8) {
                    const int64_t byte = int8_byte(group, slot, lane), v = group / 2;
                    const int64_t at = chunk[vector * (v / 4) + byte] >> (2 * (v & 3)) & 3;
                    row[4 * g + at] = chunk[vector * (2 + v) + byte];
                    continue;
                }
                uint32_t places;
                std::memcpy(&places, chunk + 4 * lane, 4);
                const int64_t index = kept * group + slot, at = places >> (2 * index) & 3;
                if (4 * g + at < in)
                    std::memcpy(row + (4 * g + at) * size, chunk + float_value_at(format, index, lane), size);
            }
        }
    }
};

}  // namespace nms
