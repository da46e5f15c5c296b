// y = x @ W.T + bias for x and W in bf16, on units that multiply pairs of bf16: the kept values of two slots, of one group or
// of two, and the activations that they meet are one pair in each lane.
#pragma once
#include "layout.h"
#include "linear.h"

namespace nms {

template <class V>
struct Pairs {
    using F = typename V::Float;
    using I = typename V::Int;
    using L = Layout<V>;
    using Output = typename Linear<V>::Output;
    static constexpr int64_t lanes = V::lanes;

    static constexpr int R = 2;  // vectors of rows of a block

    template <Format format, int B>
    static NMS_NOINLINE void pair_tile(const uint8_t* w, int64_t chunks, const uint16_t* x, int64_t x_stride,
                                       const Output& o, int64_t row, int64_t column) {
        constexpr int split = R * B < 4 ? 2 : 1;
        F sum[R][B][split];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++)
                for (int s = 0; s < split; s++) sum[r][b][s] = V::set(0.0f);
        // Eight columns, which a vector repeats, are two groups: each has a pair, or one slot of a pair.
        constexpr int kept = kept_of_4(format);
        const I even = V::pair_places(0, kept == 2 ? 0 : 8), odd = V::pair_places(8, 8);
        const int64_t bytes = L::part_bytes(format);
        for (int64_t k = 0; k < chunks; k++) {
            const uint8_t* chunk = w + k * R * bytes;
            const uint16_t* xk = x + 32 * k;
            for (int64_t line = 0; line < R * bytes; line += 64) V::fetch(chunk + 4096 + line);
            I places[R];
            NMS_UNROLL for (int r = 0; r < R; r++) places[r] = V::load_int(chunk + r * bytes);
            NMS_UNROLL for (int pair = 0; pair < 4 * kept; pair++) {
                I place[R], value[R];
                NMS_UNROLL for (int r = 0; r < R; r++) {
                    place[r] = V::look_up16(V::shift_right(places[r], 4 * pair), kept == 2 && pair & 1 ? odd : even);
                    value[r] = V::load_int(chunk + r * bytes + (1 + pair) * L::vector);
                }
                NMS_UNROLL for (int b = 0; b < B; b++) {
                    const I eight = V::repeat16(xk + b * x_stride + pair / kept * 8);
                    NMS_UNROLL for (int r = 0; r < R; r++) {
                        F& into = sum[r][b][split == 2 ? pair & 1 : 0];
                        into = V::dot_bf16(into, V::pick_bytes(eight, place[r]), value[r]);
                    }
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) {
                F total = sum[r][b][0];
                if constexpr (split == 2) total = V::add(total, sum[r][b][1]);
                Linear<V>::emit(o, row + b, column + r * lanes, total);
            }
    }

    template <Format format, int B>
    static NMS_INLINE void pair_tiles(int count, const uint8_t* w, int64_t chunks, const uint16_t* x, int64_t x_stride,
                                      const Output& o, int64_t row, int64_t column) {
        if constexpr (B > 0) {
            if (count == B)
                pair_tile<format, B>(w, chunks, x, x_stride, o, row, column);
            else
                pair_tiles<format, B - 1>(count, w, chunks, x, x_stride, o, row, column);
        }
    }

    static void multiply(Format format, const Product& p) {
        return format == bf16_1of4 ? multiply_as<bf16_1of4>(p) : multiply_as<sparse_bf16>(p);
    }
    template <Format format>
    static void multiply_as(const Product& p) {
        constexpr int tile = V::few_rows_tile;
        const int64_t width = padded(p.in, 32), most = smaller(Linear<V>::batch, p.rows);
        const bool in_place = width == p.in;
        const int64_t bias_bytes = 4 * padded(p.out, 16);
        uint8_t* memory = scratch(bias_bytes + (in_place ? 0 : 2 * most * width));
        if (!memory) return;
        const Output o = Linear<V>::output(p, reinterpret_cast<float*>(memory));
        uint16_t* copy = reinterpret_cast<uint16_t*>(memory + bias_bytes);
        const int64_t block_bytes = L::block_bytes(format, p.in), chunks = L::chunks(format, p.in);
        for (int64_t first = 0; first < p.rows; first += most) {
            const int64_t rows = smaller(most, p.rows - first);
            const uint16_t* x = static_cast<const uint16_t*>(Linear<V>::row_of(p, first));
            if (!in_place) {
                for (int64_t i = 0; i < rows; i++) {
                    std::memcpy(copy + i * width, Linear<V>::row_of(p, first + i), 2 * p.in);
                    std::memset(copy + i * width + p.in, 0, 2 * (width - p.in));
                }
                x = copy;
            }
            const int64_t x_stride = in_place ? p.x_stride : width;
            const int64_t blocks = blocks_of(p.out, L::block_rows);
            parallel(blocks, Linear<V>::grain(lanes * p.in, rows), [&](int64_t begin, int64_t end) {
                for (int64_t block = begin; block < end; block++)
                    for (int64_t b = 0; b < rows; b += tile)
                        pair_tiles<format, tile>(static_cast<int>(smaller(tile, rows - b)), p.packed + block * block_bytes,
                                         chunks, x + b * x_stride, x_stride, o, first + b, block * L::block_rows);
            });
        }
    }
};

}  // namespace nms
