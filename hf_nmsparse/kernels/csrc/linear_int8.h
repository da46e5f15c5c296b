// Sums of products with int8 weights, sparse or dense, once for all vector units. Sums of integers are exact, so that an
// output does not depend on the rows beside it, nor on the unit but for its levels.
#pragma once
#include "layout.h"
#include "linear_float.h"
#include "unit.h"

namespace nms {

template <class V>
struct LinearInt8 {
    using F = typename V::Float;
    using I = typename V::Int;
    using L = Layout<V>;
    static constexpr int64_t lanes = V::lanes;
    static constexpr int R = 2;  // vectors of rows of a block

    // One row of x as bytes, whose sign is the unit's affair: x is about scale * (byte - zero), and zero itself is exact. A row with a number
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
        constexpr float levels = V::int8_most - V::int8_least;
        const float step = V::highest(high) / levels - V::lowest(low) / levels;
        const float inverse = step > 0.0f && finite == 0.0f ? 1.0f / step : 0.0f;
        const bool usable = inverse > 0.0f && inverse <= 3e38f;
        const float bottom = usable ? -V::lowest(low) * inverse : 0.0f;
        *zero = static_cast<int32_t>(bottom + 0.5f) + static_cast<int32_t>(V::int8_least);
        *scale = (usable ? step : 0.0f) + finite;
        const F times = V::set(usable ? inverse : 0.0f), shift = V::set(static_cast<float>(*zero));
        const F least = V::set(V::int8_least), most = V::set(V::int8_most);
        for (k = 0; k < in; k += lanes) {
            const F v = k + lanes <= in ? V::load(x + k) : V::load(x + k, static_cast<int>(in - k));
            const F level = V::fma(v, times, shift);
            V::store_low_bytes(bytes + k, V::round(V::min(V::max(level, least), most)));
        }
        std::memset(bytes + padded(in, lanes), 0, width - padded(in, lanes));
    }

    // What turns sums of bytes into numbers.
    struct Scales {
        const float* scale;  // of rows of x
        const int32_t* zero;
        const float* weight_scale;  // [out], padded to whole blocks
        const int32_t* weight_sum;
    };
    static NMS_INLINE Scales scales(Format format, const uint8_t* packed, int64_t out, int64_t in, const float* scale,
                                    const int32_t* zero) {
        return {scale, zero, reinterpret_cast<const float*>(packed + L::scales_at(format, out, in)),
                reinterpret_cast<const int32_t*>(packed + L::sums_at(format, out, in))};
    }

    // One block of the weight by B rows of x, from row `first` on; sums is [B][block_rows].
    template <Format format, int B>
    static NMS_NOINLINE void tile(const uint8_t* w, int64_t chunks, const uint8_t* x, int64_t x_stride, const Scales& q,
                                  int64_t first, int64_t column, Ahead ahead, float* sums) {
        constexpr int split = R * B < 4 ? 2 : 1;  // enough sums in flight to hide the latency of one
        I sum[R][B][split];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++)
                for (int s = 0; s < split; s++) sum[r][b][s] = V::zero();
        const int64_t bytes = L::part_bytes(format), columns = L::chunk_columns(format);
        for (int64_t k = 0; k < chunks; k++) {
            const uint8_t* chunk = w + k * R * bytes;
            const uint8_t* xk = x + k * columns;
            for (int64_t i = 0; i < ahead.lines; i++, ahead.at += 64) V::fetch(ahead.at);
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
                            const I sixteen = V::repeat16(xk + b * x_stride + (2 * h + f / 2) * 16);
                            NMS_UNROLL for (int r = 0; r < R; r++) {
                                I& into = sum[r][b][split == 2 ? f & 1 : 0];
                                into = V::dot(into, V::pick_bytes(sixteen, place[r]), value[r]);
                            }
                        }
                    }
                }
            } else if constexpr (kept_of_16(format) > 0) {
                constexpr int each = kept_of_16(format) / 4;  // vectors of values of a run
                const I nibble = V::set_int(0x0f0f0f0f);
                NMS_UNROLL for (int h = 0; h < 2 * each; h++) {
                    I fields[R];
                    NMS_UNROLL for (int r = 0; r < R; r++) fields[r] = V::load_int(chunk + r * bytes + h * L::vector);
                    NMS_UNROLL for (int f = 0; f < 2; f++) {
                        I place[R], value[R];
                        NMS_UNROLL for (int r = 0; r < R; r++) {
                            place[r] = V::both(f ? V::shift_right(fields[r], 4) : fields[r], nibble);
                            value[r] = V::load_int(chunk + r * bytes + (2 * each + 2 * h + f) * L::vector);
                        }
                        NMS_UNROLL for (int b = 0; b < B; b++) {
                            const I sixteen = V::repeat16(xk + b * x_stride + (2 * h + f) / each * 16);
                            NMS_UNROLL for (int r = 0; r < R; r++) {
                                I& into = sum[r][b][split == 2 ? f : 0];
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
                        const I four = V::repeat_dword(xk + b * x_stride + 4 * v);
                        NMS_UNROLL for (int r = 0; r < R; r++) {
                            I& into = sum[r][b][split == 2 ? v & 1 : 0];
                            into = V::dot(into, four, value[r]);
                        }
                    }
                }
            }
        }
        NMS_UNROLL for (int r = 0; r < R; r++) {
            const F scale = V::load(q.weight_scale + column + r * lanes);
            const F values = V::to_float(V::load_int(q.weight_sum + column + r * lanes));
            NMS_UNROLL for (int b = 0; b < B; b++) {
                I total = sum[r][b][0];
                if constexpr (split == 2) total = V::sum(total, sum[r][b][1]);
                const F shifted = V::fma(values, V::set(-static_cast<float>(q.zero[first + b])), V::to_float(total));
                V::store(sums + (b * R + r) * lanes, V::mul(shifted, V::mul(scale, V::set(q.scale[first + b]))));
            }
        }
    }
};

}  // namespace nms
