// The C interface: which vector unit runs, whose threads, and checks that cost nothing.
#include <cstdlib>

#include "common.h"
#include "layout.h"

#define NMS_EXPORT extern "C" __attribute__((visibility("default")))

namespace nms {

namespace {

using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
ParallelFor parallel_for = nullptr;

struct Scratch {
    uint8_t* memory = nullptr;
    int64_t bytes = 0;
    ~Scratch() { std::free(memory); }
};

bool available(const Unit& unit) {
    if (&unit == &scalar_unit) return true;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (&unit == &avx2_unit) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    return &unit == &avx512_unit ? avx512 : avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return false;
}

const Unit* const units[] = {
#if defined(__x86_64__)
    &avx512_bf16_unit, &avx512_unit, &avx2_unit,
#endif
    &scalar_unit};

const Unit* fastest() {
    for (const Unit* unit : units)
        if (available(*unit)) return unit;
    return &scalar_unit;
}

const Unit* unit = fastest();

Header header(int32_t format, int64_t out, int64_t in) {
    return {{'N', 'M', 'S', 'W'}, layout_order, unit->lanes, format, out, in, {}};
}

bool fits(const uint8_t* packed, int32_t format, int64_t out, int64_t in) {
    const Header expected = header(format, out, in);
    return std::memcmp(packed, &expected, sizeof expected) == 0;
}

}  // namespace

void run_parallel(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    if (items <= 0) return;
    if (parallel_for && items > grain) {
        if (parallel_for(0, items, grain, body, context)) std::abort();  // results would be half written
    } else
        body(0, items, context);
}

uint8_t* scratch(int64_t bytes) {
    static thread_local Scratch own;
    if (bytes > own.bytes) {
        std::free(own.memory);
        own.bytes = 0;
        own.memory = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(padded(bytes, 4096))));
        if (!own.memory) std::abort();
        own.bytes = padded(bytes, 4096);
    }
    return own.memory;
}

}  // namespace nms

using namespace nms;

NMS_EXPORT int32_t nms_abi() { return 4; }

NMS_EXPORT void nms_set_parallel_for(void* function) { parallel_for = reinterpret_cast<ParallelFor>(function); }

NMS_EXPORT const char* nms_unit() { return unit->name; }

// Chooses the unit of this name; 0 if this machine has it not. Weights packed for one unit are of no use to another.
NMS_EXPORT int32_t nms_select_unit(const char* name) {
    for (const Unit* known : units)
        if (std::strcmp(known->name, name) == 0 && available(*known)) {
            unit = known;
            return 1;
        }
    return 0;
}

NMS_EXPORT int64_t nms_packed_bytes(int32_t format, int64_t out, int64_t in) {
    return sizeof(Header) + unit->packed_bytes(static_cast<Format>(format), out, in);
}

NMS_EXPORT void nms_repack(int32_t format, int64_t out, int64_t in, const void* values, const uint8_t* codes,
                           const float* scales, uint8_t* packed) {
    const Header head = header(format, out, in);
    std::memcpy(packed, &head, sizeof head);
    unit->repack(static_cast<Format>(format), out, in, values, codes, scales, packed + sizeof head);
}

// This and `nms_multiply` return 0, and do nothing, where `packed` is not this unit's weight of the format and shape. It
// has the bytes of `nms_packed_bytes`.
NMS_EXPORT int32_t nms_restore(int32_t format, int64_t out, int64_t in, const uint8_t* packed, void* dense,
                               float* scales) {
    if (!fits(packed, format, out, in)) return 0;
    unit->restore(static_cast<Format>(format), out, in, packed + sizeof(Header), dense, scales);
    return 1;
}

NMS_EXPORT int32_t nms_multiply(int32_t format, int64_t rows, int64_t out, int64_t in, const void* x, int64_t x_stride,
                                const uint8_t* packed, const void* bias, void* y, int32_t number) {
    if (!fits(packed, format, out, in)) return 0;
    const Product product{rows, out, in, x, x_stride, packed + sizeof(Header), bias, y, static_cast<Number>(number)};
    if (unit->multiply_pairs && format == sparse_bf16 && number == bf16)
        unit->multiply_pairs(product);
    else
        unit->multiply(static_cast<Format>(format), product);
    return 1;
}

// Renews `mask`, a bit a weight; returns how many of its bits changed, or -1 if a weight is NaN.
NMS_EXPORT int64_t nms_rank(const float* weight, uint8_t* mask, int64_t groups, int32_t n, int32_t m) {
    int64_t flips = 0;
    int32_t nan = 0;
    unit->rank(weight, mask, groups, n, m, &flips, &nan);
    return nan ? -1 : flips;
}

NMS_EXPORT void nms_decay(const float* weight, const uint8_t* mask, float* gradient, float decay, int64_t count) {
    unit->decay(weight, mask, gradient, decay, count);
}

NMS_EXPORT void nms_apply(const float* weight, const uint8_t* mask, float* masked, float scale, int64_t count) {
    unit->apply(weight, mask, masked, scale, count);
}

NMS_EXPORT void nms_soften(const float* weight, const uint8_t* mask, float* soft, int64_t groups, int32_t m) {
    unit->soften(weight, mask, soft, groups, m);
}
