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

enum Number : int32_t { fp32 = 0, bf16 = 1 };
enum Format : int32_t { sparse_fp32 = 0, sparse_bf16 = 1, sparse_int8 = 2, dense_int8 = 3 };

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

// To the nearest, ties to even; NaN stays NaN.
static NMS_INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

// One product y = x @ W.T + bias.
struct Product {
    int64_t rows, out, in;
    const void* x;  // [rows, in] of `number`, a row every x_stride numbers
    int64_t x_stride;
    const uint8_t* packed;
    const void* bias;  // [out] of `number`, or null
    void* y;           // [rows, out] of `number`, contiguous
    Number number;
};

// What a packed weight begins with: whose order it has and whose shape. The size keeps the weight behind it where vectors
// like it.
struct Header {
    char magic[4];
    int32_t order;  // of `layout.h`, counted up whenever it changes
    int32_t lanes;
    int32_t format;
    int64_t out, in;
    uint8_t unused[32];
};
static_assert(sizeof(Header) == 64, "a weight begins at a multiple of 64 bytes");

// What one vector unit offers; `lanes` decides the layout of packed weights, which these functions see without header.
struct Unit {
    const char* name;
    int32_t lanes;
    int64_t (*packed_bytes)(Format format, int64_t out, int64_t in);
    void (*repack)(Format format, int64_t out, int64_t in, const void* values, const uint8_t* codes,
                   const float* scales, uint8_t* packed);
    void (*restore)(Format format, int64_t out, int64_t in, const uint8_t* packed, void* dense, float* scales);
    void (*multiply)(Format format, const Product& product);
    void (*multiply_pairs)(const Product& product);  // sparse bf16 times bf16; null where `multiply` does it
    void (*rank)(const float* weight, uint8_t* mask, int64_t groups, int n, int m, int64_t* flips, int32_t* nan);
    void (*decay)(const float* weight, const uint8_t* mask, float* gradient, float decay, int64_t count);
    void (*apply)(const float* weight, const uint8_t* mask, float* masked, float scale, int64_t count);
    void (*soften)(const float* weight, const uint8_t* mask, float* soft, int64_t groups, int m);
};

extern const Unit scalar_unit;
#if defined(__x86_64__)
extern const Unit avx2_unit;
extern const Unit avx512_unit;
extern const Unit avx512_bf16_unit;
void multiply_pairs_avx512(const Product& product);
#endif

// Runs body(begin, end, context) over [0, items) in the caller's thread pool, at least `grain` items at a time.
void run_parallel(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class Body>
static NMS_INLINE void parallel(int64_t items, int64_t grain, const Body& body) {
    run_parallel(
        items, grain,
        [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<Body*>(&body));
}

// Memory of the calling thread that lives from call to call; the next call takes it over.
uint8_t* scratch(int64_t bytes);

}  // namespace nms
