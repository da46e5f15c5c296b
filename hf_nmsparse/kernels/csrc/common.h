// What every file here shares. Helpers are always inlined: a copy of one that a wider unit's file compiled must never be
// the one that another file calls.
#pragma once
#include <cstdint>
#include <cstring>

#define NMS_INLINE inline __attribute__((always_inline))
#define NMS_ALWAYS __attribute__((always_inline))  // of lambdas
#define NMS_NOINLINE __attribute__((noinline))
#define NMS_UNROLL _Pragma("GCC unroll 16")

namespace nms {

enum Number : int32_t { fp32 = 0, bf16 = 1, int8 = 2, fp16 = 3 };
enum Format : int32_t {
    sparse_fp32 = 0,
    sparse_bf16 = 1,
    sparse_int8 = 2,
    dense_int8 = 3,
    dense_fp32 = 4,
    dense_bf16 = 5,
    int8_8of16 = 6,
    int8_4of16 = 7,
    fp32_1of4 = 8,
    bf16_1of4 = 9,
    formats = 10,
};

// The most values that a run of 16 columns keeps, or one of 4, of the formats that any pattern with so few of them fits;
// else 0.
static constexpr NMS_INLINE int kept_of_16(Format format) {
    return format == int8_8of16 ? 8 : format == int8_4of16 ? 4 : 0;
}
static constexpr NMS_INLINE int kept_of_4(Format format) {
    return format <= sparse_int8 ? 2 : format == fp32_1of4 || format == bf16_1of4 ? 1 : 0;
}
static constexpr NMS_INLINE bool is_int8(Format format) {
    return format == sparse_int8 || format == dense_int8 || kept_of_16(format);
}
static constexpr NMS_INLINE bool is_2_of_4(Format format) { return format <= sparse_int8; }

static NMS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static NMS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static NMS_INLINE int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
static NMS_INLINE int64_t padded(int64_t count, int64_t size) { return blocks_of(count, size) * size; }

static NMS_INLINE float bf16_to_float(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

static NMS_INLINE float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t wide = (rest << 13) + (112u << 23);                           // another bias of the exponent
    if (rest >= 0x7c00) wide += 112u << 23;                                // infinite, NaN
    float value;
    std::memcpy(&value, &wide, 4);
    if (rest < 0x0400) value = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
    std::memcpy(&wide, &value, 4);
    wide |= sign;
    std::memcpy(&value, &wide, 4);
    return value;
}

// To the nearest, ties to even, of numbers within the range of fp16.
static NMS_INLINE uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves units of 2^-24 in the lowest bits
        float shifted;
        std::memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        std::memcpy(&bits, &shifted, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

// To the nearest, ties to even; NaN stays NaN.
static NMS_INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

constexpr int32_t layout_order = 1;  // counted up whenever the order of `layout.h` changes

// What a packed weight begins with: whose order it has and whose shape. The size keeps the weight behind it where vectors
// like it.
struct Header {
    char magic[4];
    int32_t order;  // `layout_order`
    int32_t lanes;
    int32_t format;
    int64_t out, in;
    uint8_t unused[32];
};
static_assert(sizeof(Header) == 64, "a weight begins at a multiple of 64 bytes");

// Runs body(begin, end, context) over [0, items) in the caller's thread pool, at least `grain` items at a time.
void run_parallel(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class Body>
static NMS_INLINE void parallel(int64_t items, int64_t grain, const Body& body) {
    run_parallel(
        items, grain,
        [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<Body*>(&body));
}

// Memory of the calling thread that lives from call to call; the next call takes it over. Null, and a failure, if there is
// none.
uint8_t* scratch(int64_t bytes);

}  // namespace nms
