// Eight lanes of AVX2 with FMA.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "common.h"

namespace nms {

// Eight rows of eight floats turned over; the wider unit uses it as well.
static NMS_INLINE void transpose8_avx2(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m256 row[8], pair[8];
    for (int i = 0; i < 8; i++) row[i] = _mm256_loadu_ps(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
    }
}

struct Avx2 {
    static constexpr int lanes = 8;
    static constexpr int few_rows_tile = 4;
    static constexpr int int8_rows_tile = 4;
    // So that maddubs, which sums two products in 16 bits, cannot saturate.
    static constexpr float int8_least = 0.0f, int8_most = 127.0f;

    using Float = __m256;
    using Int = __m256i;

    static NMS_INLINE Int first(int count) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static NMS_INLINE Float set(float value) { return _mm256_set1_ps(value); }
    static NMS_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
    static NMS_INLINE Float load(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
    static NMS_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
    static NMS_INLINE void store(float* p, Float a, int count) { _mm256_maskstore_ps(p, first(count), a); }
    static NMS_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static NMS_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static NMS_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static NMS_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
    static NMS_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
    static NMS_INLINE float lowest(Float a) {
        __m128 r = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        r = _mm_min_ps(r, _mm_movehl_ps(r, r));
        return _mm_cvtss_f32(_mm_min_ss(r, _mm_shuffle_ps(r, r, 1)));
    }
    static NMS_INLINE float highest(Float a) {
        __m128 r = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        r = _mm_max_ps(r, _mm_movehl_ps(r, r));
        return _mm_cvtss_f32(_mm_max_ss(r, _mm_shuffle_ps(r, r, 1)));
    }
    static NMS_INLINE float total(Float a) {
        __m128 r = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        r = _mm_add_ps(r, _mm_movehl_ps(r, r));
        return _mm_cvtss_f32(_mm_add_ss(r, _mm_shuffle_ps(r, r, 1)));
    }
    // Lane i is the total of vector i.
    static NMS_INLINE Float totals(const Float* v) {
        Float half[2];
        NMS_UNROLL for (int i = 0; i < 2; i++) {
            const Float* w = v + 4 * i;
            half[i] = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
        }
        return add(_mm256_permute2f128_ps(half[0], half[1], 0x20), _mm256_permute2f128_ps(half[0], half[1], 0x31));
    }
    static NMS_INLINE Float load_half(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static NMS_INLINE void store_half(uint16_t* p, Float a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static NMS_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static NMS_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
    static NMS_INLINE uint32_t above(Float a, Float b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
    }
    static NMS_INLINE Float repeat4(const float* p) {
        return _mm256_castsi256_ps(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static NMS_INLINE Float pick4(Float a, Int which) { return _mm256_permutevar_ps(a, which); }

    static NMS_INLINE Int zero() { return _mm256_setzero_si256(); }
    static NMS_INLINE Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
    static NMS_INLINE void store_int(void* p, Int a) { _mm256_storeu_si256(static_cast<Int*>(p), a); }
    static NMS_INLINE Int set_int(int32_t value) { return _mm256_set1_epi32(value); }
    static NMS_INLINE Int shift_right(Int a, int bits) { return _mm256_srli_epi32(a, bits); }
    static NMS_INLINE Int shift_left(Int a, int bits) { return _mm256_slli_epi32(a, bits); }
    static NMS_INLINE Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
    static NMS_INLINE Int sum(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static NMS_INLINE Float as_float(Int a) { return _mm256_castsi256_ps(a); }
    static NMS_INLINE Int as_int(Float a) { return _mm256_castps_si256(a); }
    static NMS_INLINE Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
    static NMS_INLINE Int round(Float a) { return _mm256_cvtps_epi32(a); }
    static NMS_INLINE void store_low_bytes(uint8_t* p, Int a) {
        Int words = _mm256_packus_epi16(_mm256_packus_epi32(a, a), zero());
        uint32_t low = static_cast<uint32_t>(_mm256_cvtsi256_si32(words));
        uint32_t high = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(words, 1)));
        std::memcpy(p, &low, 4);
        std::memcpy(p + 4, &high, 4);
    }

    static NMS_INLINE Int permute(Int a, Int places) { return _mm256_permutevar8x32_epi32(a, places); }
    static NMS_INLINE uint32_t less(Int a, Int b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a))));
    }
    static NMS_INLINE Int count_less(Int count, Int a, Int b) {
        return _mm256_sub_epi32(count, _mm256_cmpgt_epi32(b, a));
    }
    static NMS_INLINE Float keep(uint32_t bits, Float a) {
        const Int own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const Int set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits)), own);
        return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, own)));
    }
    static NMS_INLINE Float either(Float a, Float b) { return _mm256_or_ps(a, b); }

    static NMS_INLINE Int repeat_dword(const void* p) {
        int32_t value;
        std::memcpy(&value, p, 4);
        return _mm256_set1_epi32(value);
    }
    static NMS_INLINE Int repeat16(const void* p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static NMS_INLINE Int places(Int fields, int field, int half) {
        Int picked = _mm256_and_si256(_mm256_srli_epi16(fields, 2 * field), _mm256_set1_epi8(3));
        return _mm256_or_si256(picked, _mm256_set1_epi32(half ? 0x0c0c0808 : 0x04040000));
    }
    static NMS_INLINE Int pick_bytes(Int a, Int which) { return _mm256_shuffle_epi8(a, which); }
    static NMS_INLINE Int dot(Int sum_of, Int u8, Int s8) {
        Int pairs = _mm256_maddubs_epi16(u8, s8);
        return _mm256_add_epi32(sum_of, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }

    static NMS_INLINE void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
        transpose8_avx2(from, from_stride, to, to_stride);
    }
    static NMS_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};

}  // namespace nms
