// Sixteen lanes of AVX-512 (F, BW, DQ, VL) with VNNI.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "common.h"
#include "simd_avx2.h"

namespace nms {

struct Avx512 {
    static constexpr int lanes = 16;
    static constexpr int few_rows_tile = 8;
    static constexpr int int8_rows_tile = 8;
    static constexpr float int8_least = 0.0f, int8_most = 255.0f;  // vpdpbusd sums in 32 bits

    using Float = __m512;
    using Int = __m512i;

    static NMS_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
    static NMS_INLINE Float set(float value) { return _mm512_set1_ps(value); }
    static NMS_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
    static NMS_INLINE Float load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
    static NMS_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
    static NMS_INLINE void store(float* p, Float a, int count) { _mm512_mask_storeu_ps(p, first(count), a); }
    static NMS_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static NMS_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static NMS_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static NMS_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
    static NMS_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    static NMS_INLINE float lowest(Float a) { return _mm512_reduce_min_ps(a); }
    static NMS_INLINE float highest(Float a) { return _mm512_reduce_max_ps(a); }
    static NMS_INLINE float total(Float a) { return _mm512_reduce_add_ps(a); }
    // Lane i is the total of vector i.
    static NMS_INLINE Float totals(const Float* v) {
        Float four[4];
        NMS_UNROLL for (int i = 0; i < 4; i++) {
            const Float* w = v + 4 * i;
            const Float a = add(_mm512_unpacklo_ps(w[0], w[1]), _mm512_unpackhi_ps(w[0], w[1]));
            const Float b = add(_mm512_unpacklo_ps(w[2], w[3]), _mm512_unpackhi_ps(w[2], w[3]));
            four[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
        }
        const Float a = add(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
        const Float b = add(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static NMS_INLINE Float load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static NMS_INLINE void store_half(uint16_t* p, Float a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static NMS_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static NMS_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
    static NMS_INLINE uint32_t above(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static NMS_INLINE Float repeat4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
    static NMS_INLINE Float pick4(Float a, Int which) { return _mm512_permutevar_ps(a, which); }

    static NMS_INLINE Int zero() { return _mm512_setzero_si512(); }
    static NMS_INLINE Int load_int(const void* p) { return _mm512_loadu_si512(p); }
    static NMS_INLINE void store_int(void* p, Int a) { _mm512_storeu_si512(p, a); }
    static NMS_INLINE Int set_int(int32_t value) { return _mm512_set1_epi32(value); }
    static NMS_INLINE Int shift_right(Int a, int bits) { return _mm512_srli_epi32(a, static_cast<unsigned>(bits)); }
    static NMS_INLINE Int shift_left(Int a, int bits) { return _mm512_slli_epi32(a, static_cast<unsigned>(bits)); }
    static NMS_INLINE Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
    static NMS_INLINE Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static NMS_INLINE Float as_float(Int a) { return _mm512_castsi512_ps(a); }
    static NMS_INLINE Int as_int(Float a) { return _mm512_castps_si512(a); }
    static NMS_INLINE Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
    static NMS_INLINE Int round(Float a) { return _mm512_cvtps_epi32(a); }
    static NMS_INLINE void store_low_bytes(uint8_t* p, Int a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
    }

    static NMS_INLINE Int permute(Int a, Int places) { return _mm512_permutexvar_epi32(places, a); }
    static NMS_INLINE uint32_t less(Int a, Int b) { return _mm512_cmplt_epi32_mask(a, b); }
    static NMS_INLINE Int count_less(Int count, Int a, Int b) {
        return _mm512_mask_add_epi32(count, _mm512_cmplt_epi32_mask(a, b), count, _mm512_set1_epi32(1));
    }
    static NMS_INLINE Float keep(uint32_t bits, Float a) {
        return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a);
    }
    static NMS_INLINE Float either(Float a, Float b) { return _mm512_or_ps(a, b); }

    static NMS_INLINE Int repeat_dword(const void* p) {
        int32_t value;
        std::memcpy(&value, p, 4);
        return _mm512_set1_epi32(value);
    }
    static NMS_INLINE Int repeat16(const void* p) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static NMS_INLINE Int places(Int fields, int field, int half) {
        Int shifted = _mm512_srli_epi16(fields, static_cast<unsigned>(2 * field));
        const Int base = _mm512_set1_epi32(half ? 0x0c0c0808 : 0x04040000);
        return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(3), base, 0xea);  // (a & b) | c
    }
    static NMS_INLINE Int pick_bytes(Int a, Int which) { return _mm512_shuffle_epi8(a, which); }
    static NMS_INLINE Int dot(Int sum_of, Int u8, Int s8) { return _mm512_dpbusd_epi32(sum_of, u8, s8); }

    static NMS_INLINE void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
        transpose8_avx2(from, from_stride, to, to_stride);
    }
    static NMS_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};

}  // namespace nms
