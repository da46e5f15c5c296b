// The C interface to masks and products, with checks that cost nothing; engine/interface.cpp has that of the engine.
#include "runtime.h"

#define NMS_EXPORT extern "C" __attribute__((visibility("default")))

using namespace nms;

NMS_EXPORT int32_t nms_abi() { return 9; }

NMS_EXPORT void nms_set_parallel_for(void* function) { set_parallel_for(function); }

NMS_EXPORT const char* nms_unit() { return unit_in_use().name; }

// Chooses the unit of this name; 0 if this machine has it not. Weights packed for one unit are of no use to another.
NMS_EXPORT int32_t nms_select_unit(const char* name) { return select_unit(name); }

// What went wrong in the last call of this thread that failed.
NMS_EXPORT const char* nms_failure() { return failure() ? failure() : ""; }

NMS_EXPORT int64_t nms_packed_bytes(int32_t format, int64_t out, int64_t in) {
    return sizeof(Header) + unit_in_use().packed_bytes(static_cast<Format>(format), out, in);
}

// The functions from here on return 1, or -1 where they failed: `nms_failure` says why, and what they write is undefined.
namespace {

template <class Body>
int32_t guarded(const Body& body) {
    clear_failure();
    body();
    return failure() ? -1 : 1;
}

}  // namespace

NMS_EXPORT int32_t nms_repack(int32_t format, int64_t out, int64_t in, const void* values, const uint8_t* codes,
                              const float* scales, uint8_t* packed) {
    const Header head = header(static_cast<Format>(format), out, in);
    std::memcpy(packed, &head, sizeof head);
    return guarded([&] {
        unit_in_use().repack(static_cast<Format>(format), out, in, values, codes, scales, packed + sizeof head);
    });
}

// This and `nms_multiply` return 0, and do nothing, where `packed` is not this unit's weight of the format and shape. It
// has the bytes of `nms_packed_bytes`.
NMS_EXPORT int32_t nms_restore(int32_t format, int64_t out, int64_t in, const uint8_t* packed, void* dense,
                               float* scales) {
    const Format known = static_cast<Format>(format);
    if (!fits(packed, known, out, in)) return 0;
    return guarded([&] { unit_in_use().restore(known, out, in, packed + sizeof(Header), dense, scales); });
}

NMS_EXPORT int32_t nms_multiply(int32_t format, int64_t rows, int64_t out, int64_t in, const void* x, int64_t x_stride,
                                const uint8_t* packed, const void* bias, void* y, int32_t number) {
    const Format known = static_cast<Format>(format);
    if (!fits(packed, known, out, in)) return 0;
    const Product product{rows, out, in, x, x_stride, packed + sizeof(Header), bias, y, static_cast<Number>(number)};
    const Unit& unit = unit_in_use();
    return guarded([&] {
        if (unit.multiply_pairs && (known == sparse_bf16 || known == bf16_1of4) && number == bf16)
            unit.multiply_pairs(known, product);
        else
            unit.multiply(known, product);
    });
}

// Renews `mask`, a bit a weight; returns how many of its bits changed, or -1 where it failed, -2 if a weight is NaN.
NMS_EXPORT int64_t nms_rank(const float* weight, uint8_t* mask, int64_t groups, int32_t n, int32_t m) {
    int64_t flips = 0;
    int32_t nan = 0;
    if (guarded([&] { unit_in_use().rank(weight, mask, groups, n, m, &flips, &nan); }) < 0) return -1;
    return nan ? -2 : flips;
}

// As `nms_rank`, of masks that are 2:4 along rows and columns, both of which are multiples of 4.
NMS_EXPORT int64_t nms_rank_transposable(const float* weight, uint8_t* mask, int64_t rows, int64_t columns) {
    int64_t flips = 0;
    int32_t nan = 0;
    if (guarded([&] { unit_in_use().rank_transposable(weight, mask, rows, columns, &flips, &nan); }) < 0) return -1;
    return nan ? -2 : flips;
}

NMS_EXPORT int32_t nms_decay(const float* weight, const uint8_t* mask, float* gradient, float decay, int64_t count) {
    return guarded([&] { unit_in_use().decay(weight, mask, gradient, decay, count); });
}

NMS_EXPORT int32_t nms_apply(const float* weight, const uint8_t* mask, float* masked, float scale, int64_t count) {
    return guarded([&] { unit_in_use().apply(weight, mask, masked, scale, count); });
}

NMS_EXPORT int32_t nms_soften(const float* weight, const uint8_t* mask, float* soft, int64_t groups, int32_t m) {
    return guarded([&] { unit_in_use().soften(weight, mask, soft, groups, m); });
}
