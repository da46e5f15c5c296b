#include "pairs.h"
#include "simd_avx512.h"

namespace nms {

namespace {

struct Avx512Bf16 : Avx512 {
    // For each pair of places of two bits the bytes of the two numbers, each counted from the bytes of its group.
    static NMS_INLINE Int pair_places(uint32_t first_group, uint32_t second_group) {
        alignas(64) uint32_t table[16];
        for (uint32_t pair = 0; pair < 16; pair++) {
            const uint32_t first = first_group + 2 * (pair & 3), second = second_group + 2 * (pair >> 2);
            table[pair] = first | (first + 1) << 8 | second << 16 | (second + 1) << 24;
        }
        return load_int(table);
    }
    static NMS_INLINE Int look_up16(Int index, Int table) { return _mm512_permutexvar_epi32(index, table); }
    static NMS_INLINE Float dot_bf16(Float sum_of, Int a, Int b) {
        return _mm512_dpbf16_ps(sum_of, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
};

}  // namespace

void multiply_pairs_avx512(Format format, const Product& product) { Pairs<Avx512Bf16>::multiply(format, product); }

}  // namespace nms
