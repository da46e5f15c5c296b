// Which vector unit runs, whose threads, and memory that lives from call to call.
#include "runtime.h"

#include <cstdlib>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace nms {

namespace {

using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
ParallelFor parallel_for = nullptr;

thread_local const char* last_failure = nullptr;

struct Scratch {
    uint8_t* memory = nullptr;
    int64_t bytes = 0;
    ~Scratch() { std::free(memory); }
};

#if defined(__aarch64__)
// Whether the system says that the machine has sdot; one that is not asked is taken to be without.
bool has_dot_products() {
#if defined(__linux__)
    constexpr unsigned long asimddp = 1ul << 20;  // HWCAP_ASIMDDP, which old headers lack
    return getauxval(AT_HWCAP) & asimddp;
#elif defined(__APPLE__)
    int32_t has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

bool available(const Unit& unit) {
    if (&unit == &scalar_unit) return true;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (&unit == &avx2_unit) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    return &unit == &avx512_unit ? avx512 : avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    return &unit == &neon_unit || has_dot_products();  // NEON is part of AArch64
#else
    return false;
#endif
}

const Unit* const units[] = {
#if defined(__x86_64__)
    &avx512_bf16_unit, &avx512_unit, &avx2_unit,
#elif defined(__aarch64__)
    &neon_dotprod_unit, &neon_unit,
#endif
    &scalar_unit};

const Unit* fastest() {
    for (const Unit* unit : units)
        if (available(*unit)) return unit;
    return &scalar_unit;
}

const Unit* unit = fastest();

}  // namespace

const Unit& unit_in_use() { return *unit; }

bool select_unit(const char* name) {
    for (const Unit* known : units)
        if (std::strcmp(known->name, name) == 0 && available(*known)) {
            unit = known;
            return true;
        }
    return false;
}

Header header(Format format, int64_t out, int64_t in) {
    return {{'N', 'M', 'S', 'W'}, layout_order, unit->lanes, format, out, in, {}};
}

bool fits(const uint8_t* packed, Format format, int64_t out, int64_t in) {
    const Header expected = header(format, out, in);
    return std::memcmp(packed, &expected, sizeof expected) == 0;
}

void set_parallel_for(void* function) { parallel_for = reinterpret_cast<ParallelFor>(function); }

const char* failure() { return last_failure; }
void clear_failure() { last_failure = nullptr; }

void run_parallel(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    if (items <= 0) return;
    if (parallel_for && items > grain) {
        if (parallel_for(0, items, grain, body, context)) last_failure = "torch's threads failed";
    } else
        body(0, items, context);
}

uint8_t* scratch(int64_t bytes) {
    static thread_local Scratch own;
    if (bytes > own.bytes) {
        std::free(own.memory);
        own.bytes = 0;
        own.memory = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(padded(bytes, 4096))));
        if (!own.memory) {
            last_failure = "out of memory";
            return nullptr;
        }
        own.bytes = padded(bytes, 4096);
    }
    return own.memory;
}

}  // namespace nms
