// Eight lanes of AArch64: two vectors of NEON, with dot products of bytes where the machine has them.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "common.h"

namespace nms {

struct Neon {
    static constexpr int lanes = 8;
    static constexpr int few_rows_tile = 4;
    static constexpr int int8_rows_tile = 4;
    // Activations are signed, as sdot has both factors signed. Without sdot two products are summed in 16 bits, and
    // 2 * 127 * 128 fits them; with it the numbers are the same.
    static constexpr float int8_least = -127.0f, int8_most = 127.0f;

    struct Float {
        float32x4_t low, high;
    };
    struct Int {
        uint32x4_t low, high;
    };
    struct Bytes {
        uint8x16_t low, high;
    };

    static NMS_INLINE Float set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static NMS_INLINE Float load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static NMS_INLINE Float load(const float* p, int count) {
        float all[lanes] = {};
        std::memcpy(all, p, sizeof(float) * static_cast<size_t>(count));
        return load(all);
    }
    static NMS_INLINE void store(float* p, Float a) {
        vst1q_f32(p, a.low);
        vst1q_f32(p + 4, a.high);
    }
    static NMS_INLINE void store(float* p, Float a, int count) {
        float all[lanes];
        store(all, a);
        std::memcpy(p, all, sizeof(float) * static_cast<size_t>(count));
    }
    static NMS_INLINE Float add(Float a, Float b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
    static NMS_INLINE Float sub(Float a, Float b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
    static NMS_INLINE Float mul(Float a, Float b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
    static NMS_INLINE Float div(Float a, Float b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
    static NMS_INLINE Float fma(Float a, Float b, Float c) {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }
    // As on the other units the second number is taken where one is NaN, which fmin and fmax would keep.
    static NMS_INLINE Float min(Float a, Float b) {
        return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
    }
    static NMS_INLINE Float max(Float a, Float b) {
        return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
    }
    static NMS_INLINE float lowest(Float a) { return vminnmvq_f32(vminnmq_f32(a.low, a.high)); }
    static NMS_INLINE float highest(Float a) { return vmaxnmvq_f32(vmaxnmq_f32(a.low, a.high)); }
    static NMS_INLINE float total(Float a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
    // Lane i is the total of vector i.
    static NMS_INLINE Float totals(const Float* v) {
        float32x4_t pair[4];
        NMS_UNROLL for (int i = 0; i < 4; i++)
            pair[i] = vpaddq_f32(vaddq_f32(v[2 * i].low, v[2 * i].high), vaddq_f32(v[2 * i + 1].low, v[2 * i + 1].high));
        return {vpaddq_f32(pair[0], pair[1]), vpaddq_f32(pair[2], pair[3])};
    }
    static NMS_INLINE Float load_half(const uint16_t* p) {
        const float16x8_t all = vreinterpretq_f16_u16(vld1q_u16(p));
        return {vcvt_f32_f16(vget_low_f16(all)), vcvt_high_f32_f16(all)};
    }
    static NMS_INLINE void store_half(uint16_t* p, Float a) {
        vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.low), a.high)));
    }
    static NMS_INLINE uint32_t above(Float a, Float b) {
        return bits_of({vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)});
    }
    static NMS_INLINE Float repeat4(const float* p) {
        const float32x4_t four = vld1q_f32(p);
        return {four, four};
    }
    static NMS_INLINE Float pick4(Float a, Int which) {
        const Bytes at = bytes_of(both(which, set_int(3)));
        return {vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a.low), at.low)),
                vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a.high), at.high))};
    }

    static NMS_INLINE Int zero() { return set_int(0); }
    static NMS_INLINE Int load_int(const void* p) {
        const uint8_t* from = static_cast<const uint8_t*>(p);
        return {vreinterpretq_u32_u8(vld1q_u8(from)), vreinterpretq_u32_u8(vld1q_u8(from + 16))};
    }
    static NMS_INLINE void store_int(void* p, Int a) {
        uint8_t* to = static_cast<uint8_t*>(p);
        vst1q_u8(to, vreinterpretq_u8_u32(a.low));
        vst1q_u8(to + 16, vreinterpretq_u8_u32(a.high));
    }
    static NMS_INLINE Int set_int(int32_t value) {
        const uint32x4_t all = vdupq_n_u32(static_cast<uint32_t>(value));
        return {all, all};
    }
    static NMS_INLINE Int shift_right(Int a, int bits) { return {a.low >> bits, a.high >> bits}; }
    static NMS_INLINE Int shift_left(Int a, int bits) { return {a.low << bits, a.high << bits}; }
    static NMS_INLINE Int both(Int a, Int b) { return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)}; }
    static NMS_INLINE Int sum(Int a, Int b) { return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)}; }
    static NMS_INLINE Float as_float(Int a) { return {vreinterpretq_f32_u32(a.low), vreinterpretq_f32_u32(a.high)}; }
    static NMS_INLINE Int as_int(Float a) { return {vreinterpretq_u32_f32(a.low), vreinterpretq_u32_f32(a.high)}; }
    static NMS_INLINE Float to_float(Int a) {
        return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.low)), vcvtq_f32_s32(vreinterpretq_s32_u32(a.high))};
    }
    static NMS_INLINE Int round(Float a) {
        return {vreinterpretq_u32_s32(vcvtnq_s32_f32(a.low)), vreinterpretq_u32_s32(vcvtnq_s32_f32(a.high))};
    }
    static NMS_INLINE void store_low_bytes(uint8_t* p, Int a) {
        vst1_u8(p, vmovn_u16(vcombine_u16(vmovn_u32(a.low), vmovn_u32(a.high))));
    }

    static NMS_INLINE Int permute(Int a, Int places) {
        const Bytes at = bytes_of(places);
        const uint8x16x2_t all = {{vreinterpretq_u8_u32(a.low), vreinterpretq_u8_u32(a.high)}};
        return {vreinterpretq_u32_u8(vqtbl2q_u8(all, at.low)), vreinterpretq_u32_u8(vqtbl2q_u8(all, at.high))};
    }
    static NMS_INLINE uint32_t less(Int a, Int b) { return bits_of(is_less(a, b)); }
    static NMS_INLINE Int count_less(Int count, Int a, Int b) {
        const Int less = is_less(a, b);  // -1 where it is
        return {vsubq_u32(count.low, less.low), vsubq_u32(count.high, less.high)};
    }
    static NMS_INLINE Float keep(uint32_t bits, Float a) {
        const uint32x4_t all = vdupq_n_u32(bits);
        const Int own = bit_of_lane();
        return as_float(both(as_int(a), {vtstq_u32(all, own.low), vtstq_u32(all, own.high)}));
    }
    static NMS_INLINE Float either(Float a, Float b) {
        const Int x = as_int(a), y = as_int(b);
        return as_float({vorrq_u32(x.low, y.low), vorrq_u32(x.high, y.high)});
    }

    static NMS_INLINE Int repeat_dword(const void* p) {
        int32_t value;
        std::memcpy(&value, p, 4);
        return set_int(value);
    }
    static NMS_INLINE Int repeat16(const void* p) {
        const uint32x4_t sixteen = vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
        return {sixteen, sixteen};
    }
    static NMS_INLINE Int places(Int fields, int field, int half) {
        const uint8x16_t three = vdupq_n_u8(3);
        const uint8x16_t low = vandq_u8(vreinterpretq_u8_u32(fields.low) >> (2 * field), three);
        const uint8x16_t high = vandq_u8(vreinterpretq_u8_u32(fields.high) >> (2 * field), three);
        const uint32x4_t base = vdupq_n_u32(half ? 0x0c0c0808 : 0x04040000);
        return {vorrq_u32(vreinterpretq_u32_u8(low), base), vorrq_u32(vreinterpretq_u32_u8(high), base)};
    }
    static NMS_INLINE Int pick_bytes(Int a, Int which) {
        return {vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(a.low), vreinterpretq_u8_u32(which.low))),
                vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(a.high), vreinterpretq_u8_u32(which.high)))};
    }
    static NMS_INLINE Int dot(Int sum_of, Int x, Int w) {
        return {dot4(sum_of.low, x.low, w.low), dot4(sum_of.high, x.high, w.high)};
    }

    static NMS_INLINE void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
        NMS_UNROLL for (int i = 0; i < 8; i += 4)
            NMS_UNROLL for (int j = 0; j < 8; j += 4)
                transpose4(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
    static NMS_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

private:
    static NMS_INLINE Int bit_of_lane() {
        constexpr uint32_t bits[lanes] = {1, 2, 4, 8, 16, 32, 64, 128};
        return {vld1q_u32(bits), vld1q_u32(bits + 4)};
    }
    // A bit for every lane of which all are set.
    static NMS_INLINE uint32_t bits_of(Int mask) {
        const Int bits = both(mask, bit_of_lane());
        return vaddvq_u32(vorrq_u32(bits.low, bits.high));
    }
    static NMS_INLINE Int is_less(Int a, Int b) {
        return {vcltq_s32(vreinterpretq_s32_u32(a.low), vreinterpretq_s32_u32(b.low)),
                vcltq_s32(vreinterpretq_s32_u32(a.high), vreinterpretq_s32_u32(b.high))};
    }
    // The places of the bytes of dwords at these places.
    static NMS_INLINE Bytes bytes_of(Int dwords) {
        const uint32x4_t first = vdupq_n_u32(0x03020100), four = vdupq_n_u32(0x04040404);
        return {vreinterpretq_u8_u32(vmlaq_u32(first, dwords.low, four)),
                vreinterpretq_u8_u32(vmlaq_u32(first, dwords.high, four))};
    }
    static NMS_INLINE uint32x4_t dot4(uint32x4_t sum_of, uint32x4_t x, uint32x4_t w) {
        const int8x16_t a = vreinterpretq_s8_u32(x), b = vreinterpretq_s8_u32(w);
        const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
        return vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(sum_of), pairs));
    }
    static NMS_INLINE void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
        float64x2_t pair[4];  // of rows 0 and 1, then 2 and 3; columns 0 and 2, then 1 and 3
        NMS_UNROLL for (int i = 0; i < 4; i += 2) {
            const float32x4_t one = vld1q_f32(from + i * from_stride), two = vld1q_f32(from + (i + 1) * from_stride);
            pair[i] = vreinterpretq_f64_f32(vtrn1q_f32(one, two));
            pair[i + 1] = vreinterpretq_f64_f32(vtrn2q_f32(one, two));
        }
        NMS_UNROLL for (int i = 0; i < 2; i++) {
            vst1q_f32(to + i * to_stride, vreinterpretq_f32_f64(vtrn1q_f64(pair[i], pair[i + 2])));
            vst1q_f32(to + (i + 2) * to_stride, vreinterpretq_f32_f64(vtrn2q_f64(pair[i], pair[i + 2])));
        }
    }
};

#if defined(__ARM_FEATURE_DOTPROD)
struct NeonDot : Neon {
    static NMS_INLINE Int dot(Int sum_of, Int x, Int w) {
        return {dot4(sum_of.low, x.low, w.low), dot4(sum_of.high, x.high, w.high)};
    }

private:
    static NMS_INLINE uint32x4_t dot4(uint32x4_t sum_of, uint32x4_t x, uint32x4_t w) {
        return vreinterpretq_u32_s32(
            vdotq_s32(vreinterpretq_s32_u32(sum_of), vreinterpretq_s8_u32(x), vreinterpretq_s8_u32(w)));
    }
};
#endif

}  // namespace nms
