// Eight lanes of plain C++: correct on every machine, and what the vector units are tested against.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#include "common.h"

namespace nms {

struct Scalar {
    static constexpr int lanes = 8;
    static constexpr int few_rows_tile = 2;
    static constexpr int int8_rows_tile = 2;
    // Activations take seven bits: on machines without VNNI a pair of u8 x s8 products is summed in 16 bits, and
    // 2 * 127 * 127 fits them. The scalar unit computes the same numbers.
    static constexpr float int8_least = 0.0f, int8_most = 127.0f;

    struct Float {
        float lane[lanes];
    };
    struct Int {
        uint8_t byte[lanes * 4];
    };

    static NMS_INLINE Float set(float value) {
        Float r;
        for (float& lane : r.lane) lane = value;
        return r;
    }
    static NMS_INLINE Float load(const float* p) {
        Float r;
        std::memcpy(r.lane, p, sizeof r.lane);
        return r;
    }
    static NMS_INLINE Float load(const float* p, int count) {
        Float r = set(0.0f);
        std::memcpy(r.lane, p, sizeof(float) * count);
        return r;
    }
    static NMS_INLINE void store(float* p, Float a) { std::memcpy(p, a.lane, sizeof a.lane); }
    static NMS_INLINE void store(float* p, Float a, int count) { std::memcpy(p, a.lane, sizeof(float) * count); }
    static NMS_INLINE Float add(Float a, Float b) {
        for (int i = 0; i < lanes; i++) a.lane[i] += b.lane[i];
        return a;
    }
    static NMS_INLINE Float mul(Float a, Float b) {
        for (int i = 0; i < lanes; i++) a.lane[i] *= b.lane[i];
        return a;
    }
    static NMS_INLINE Float fma(Float a, Float b, Float c) {
        for (int i = 0; i < lanes; i++) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static NMS_INLINE Float min(Float a, Float b) {
        for (int i = 0; i < lanes; i++) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
        return a;
    }
    static NMS_INLINE Float max(Float a, Float b) {
        for (int i = 0; i < lanes; i++) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
        return a;
    }
    static NMS_INLINE float lowest(Float a) {
        float r = a.lane[0];
        for (float lane : a.lane) r = lane < r ? lane : r;
        return r;
    }
    static NMS_INLINE float highest(Float a) {
        float r = a.lane[0];
        for (float lane : a.lane) r = lane > r ? lane : r;
        return r;
    }
    static NMS_INLINE float total(Float a) {
        float r = 0.0f;
        for (float lane : a.lane) r += lane;
        return r;
    }
    // Lane i is the total of vector i.
    static NMS_INLINE Float totals(const Float* v) {
        Float r;
        for (int i = 0; i < lanes; i++) r.lane[i] = total(v[i]);
        return r;
    }
    static NMS_INLINE Float load_half(const uint16_t* p) {
        Float r;
        for (int i = 0; i < lanes; i++) r.lane[i] = half_to_float(p[i]);
        return r;
    }
    static NMS_INLINE void store_half(uint16_t* p, Float a) {
        for (int i = 0; i < lanes; i++) p[i] = float_to_half(a.lane[i]);
    }
    static NMS_INLINE Float sub(Float a, Float b) {
        for (int i = 0; i < lanes; i++) a.lane[i] -= b.lane[i];
        return a;
    }
    static NMS_INLINE Float div(Float a, Float b) {
        for (int i = 0; i < lanes; i++) a.lane[i] /= b.lane[i];
        return a;
    }
    static NMS_INLINE uint32_t above(Float a, Float b) {
        uint32_t bits = 0;
        for (int i = 0; i < lanes; i++) bits |= static_cast<uint32_t>(a.lane[i] > b.lane[i]) << i;
        return bits;
    }
    static NMS_INLINE Float repeat4(const float* p) {
        Float r;
        for (int i = 0; i < lanes; i++) r.lane[i] = p[i & 3];
        return r;
    }
    static NMS_INLINE Float pick4(Float a, Int which) {
        Float r;
        for (int i = 0; i < lanes; i++) r.lane[i] = a.lane[(i & ~3) | (which.byte[4 * i] & 3)];
        return r;
    }

    static NMS_INLINE Int zero() { return Int{}; }
    static NMS_INLINE Int load_int(const void* p) {
        Int r;
        std::memcpy(r.byte, p, sizeof r.byte);
        return r;
    }
    static NMS_INLINE void store_int(void* p, Int a) { std::memcpy(p, a.byte, sizeof a.byte); }
    static NMS_INLINE Int set_int(int32_t value) {
        Int r;
        for (int i = 0; i < lanes; i++) std::memcpy(r.byte + 4 * i, &value, 4);
        return r;
    }
    template <class F>
    static NMS_INLINE Int each(Int a, F f) {
        for (int i = 0; i < lanes; i++) {
            uint32_t lane;
            std::memcpy(&lane, a.byte + 4 * i, 4);
            lane = f(lane);
            std::memcpy(a.byte + 4 * i, &lane, 4);
        }
        return a;
    }
    static NMS_INLINE Int shift_right(Int a, int bits) {
        return each(a, [bits](uint32_t lane) { return lane >> bits; });
    }
    static NMS_INLINE Int shift_left(Int a, int bits) {
        return each(a, [bits](uint32_t lane) { return lane << bits; });
    }
    static NMS_INLINE Int both(Int a, Int b) {
        for (int i = 0; i < lanes * 4; i++) a.byte[i] &= b.byte[i];
        return a;
    }
    static NMS_INLINE Int sum(Int a, Int b) {
        uint32_t x[lanes], y[lanes];
        std::memcpy(x, a.byte, sizeof x);
        std::memcpy(y, b.byte, sizeof y);
        for (int i = 0; i < lanes; i++) x[i] += y[i];
        return load_int(x);
    }
    static NMS_INLINE Float as_float(Int a) {
        Float r;
        std::memcpy(r.lane, a.byte, sizeof r.lane);
        return r;
    }
    static NMS_INLINE Int as_int(Float a) { return load_int(a.lane); }
    static NMS_INLINE Float to_float(Int a) {
        int32_t x[lanes];
        std::memcpy(x, a.byte, sizeof x);
        Float r;
        for (int i = 0; i < lanes; i++) r.lane[i] = static_cast<float>(x[i]);
        return r;
    }
    static NMS_INLINE Int round(Float a) {
        int32_t x[lanes];
        for (int i = 0; i < lanes; i++) x[i] = static_cast<int32_t>(nearbyintf(a.lane[i]));
        return load_int(x);
    }
    static NMS_INLINE void store_low_bytes(uint8_t* p, Int a) {
        for (int i = 0; i < lanes; i++) p[i] = a.byte[4 * i];
    }

    // Lane i of the result is the lane of `a` that lane i of `places` names.
    static NMS_INLINE Int permute(Int a, Int places) {
        Int r;
        for (int i = 0; i < lanes; i++) std::memcpy(r.byte + 4 * i, a.byte + 4 * (places.byte[4 * i] & 7), 4);
        return r;
    }
    // A bit for every lane, the first in the lowest.
    static NMS_INLINE uint32_t less(Int a, Int b) {
        int32_t x[lanes], y[lanes];
        std::memcpy(x, a.byte, sizeof x);
        std::memcpy(y, b.byte, sizeof y);
        uint32_t bits = 0;
        for (int i = 0; i < lanes; i++) bits |= static_cast<uint32_t>(x[i] < y[i]) << i;
        return bits;
    }
    static NMS_INLINE Int count_less(Int count, Int a, Int b) {
        int32_t sums[lanes], x[lanes], y[lanes];
        std::memcpy(sums, count.byte, sizeof sums);
        std::memcpy(x, a.byte, sizeof x);
        std::memcpy(y, b.byte, sizeof y);
        for (int i = 0; i < lanes; i++) sums[i] += x[i] < y[i];
        return load_int(sums);
    }
    // The lanes whose bit is set, +0.0 in the others.
    static NMS_INLINE Float keep(uint32_t bits, Float a) {
        for (int i = 0; i < lanes; i++) a.lane[i] = bits >> i & 1 ? a.lane[i] : 0.0f;
        return a;
    }
    // The bits of both, for numbers of which one is +0.0.
    static NMS_INLINE Float either(Float a, Float b) {
        Int x = as_int(a), y = as_int(b);
        for (int i = 0; i < lanes * 4; i++) x.byte[i] |= y.byte[i];
        return as_float(x);
    }

    static NMS_INLINE Int repeat_dword(const void* p) {
        Int r;
        for (int i = 0; i < lanes; i++) std::memcpy(r.byte + 4 * i, p, 4);
        return r;
    }
    static NMS_INLINE Int repeat16(const void* p) {
        Int r;
        std::memcpy(r.byte, p, 16);
        std::memcpy(r.byte + 16, p, 16);
        return r;
    }
    // Places of the bytes that a field of two bits picks from the two groups of a half of 16 activations.
    static NMS_INLINE Int places(Int fields, int field, int half) {
        for (int i = 0; i < lanes * 4; i++)
            fields.byte[i] = static_cast<uint8_t>((fields.byte[i] >> (2 * field) & 3) | (half * 8 + (i & 2) * 2));
        return fields;
    }
    static NMS_INLINE Int pick_bytes(Int a, Int which) {
        Int r;
        for (int i = 0; i < lanes * 4; i++) r.byte[i] = a.byte[(i & ~15) | (which.byte[i] & 15)];
        return r;
    }
    static NMS_INLINE Int dot(Int sum_of, Int u8, Int s8) {
        int32_t x[lanes];
        std::memcpy(x, sum_of.byte, sizeof x);
        for (int i = 0; i < lanes; i++)
            for (int j = 0; j < 4; j++) x[i] += u8.byte[4 * i + j] * static_cast<int8_t>(s8.byte[4 * i + j]);
        return load_int(x);
    }

    static NMS_INLINE void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < 8; j++) to[j * to_stride + i] = from[i * from_stride + j];
    }
    static NMS_INLINE void fetch(const void*) {}
};

}  // namespace nms
