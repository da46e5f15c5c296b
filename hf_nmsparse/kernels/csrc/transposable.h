// Masks of fp32 weights that are 2:4 along rows and along columns, in one pass; bits as in masks.h.
//
// Blocks of 4x4 are independent of each other, and each keeps the largest sum of magnitudes that one of 90 patterns has.
// Two rows keep one of 36 pairs of pairs, and how often these meet in each column, in one of 19 ways, says which pairs
// of pairs may lie below them. So 36 sums above, each with the best of its way below, stand for all 90.
#pragma once
#include "common.h"

namespace nms {

// The compiler's own vectors, with operators: fp64 is needed here alone. GCC forgets a size that depends on a parameter.
template <int lanes>
struct VectorsOf;
template <>
struct VectorsOf<4> {
    typedef float Floats __attribute__((vector_size(16)));
    typedef double Doubles __attribute__((vector_size(32)));
    typedef int64_t Bits __attribute__((vector_size(32)));
};
template <>
struct VectorsOf<8> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef double Doubles __attribute__((vector_size(64)));
    typedef int64_t Bits __attribute__((vector_size(64)));
};

template <class V>
struct Transposable {
    static constexpr int together = V::lanes / 2;  // blocks that are searched side by side
    static constexpr int chunk = 16;               // blocks that are loaded side by side: 64 weights of each row
    static constexpr int32_t infinity = 0x7f800000, largest_finite = 0x7f7fffff;

    using Vectors = VectorsOf<together>;
    using Floats = typename Vectors::Floats;
    using Doubles = typename Vectors::Doubles;
    using Bits = typename Vectors::Bits;
    static_assert(sizeof(Doubles) == 8 * together);

    // What a row may keep, lower places first.
    static constexpr int pairs = 6;
    static constexpr int first_of[pairs] = {0, 0, 0, 1, 1, 2}, second_of[pairs] = {1, 2, 3, 2, 3, 3};
    static constexpr int64_t bits_of[pairs] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};

    struct Ways {
        int count = 0;
        int above[pairs][pairs] = {}, below[pairs][pairs] = {};  // of two rows above others, and of two below others
    };
    static constexpr Ways find_ways() {
        // How often a column is kept, two bits a column; two other rows keep it as often as is left of two.
        constexpr int spread[pairs] = {0x05, 0x11, 0x41, 0x14, 0x44, 0x50}, all = 0xaa;
        Ways found;
        int known[pairs * pairs] = {};
        for (int i = 0; i < pairs; i++)
            for (int j = 0; j < pairs; j++) {
                int way = 0;
                while (way < found.count && known[way] != spread[i] + spread[j]) way++;
                if (way == found.count) known[found.count++] = spread[i] + spread[j];
                found.above[i][j] = way;
            }
        for (int i = 0; i < pairs; i++)
            for (int j = 0; j < pairs; j++)
                while (known[found.below[i][j]] != all - spread[i] - spread[j]) found.below[i][j]++;
        return found;
    }
    static constexpr Ways ways = find_ways();
    static_assert(ways.count == 19);

    // The patterns of blocks side by side, a row every four bits, from their magnitudes place by place. Sums are those
    // of a row, of two rows, then of all four, so that torch rounds them alike; of equal ones the first stays.
    static NMS_NOINLINE void search(const Doubles* magnitude, Bits* kept) {
        Doubles row[4][pairs], rest[ways.count], best = Doubles{} - 1.0;
        Bits below[ways.count] = {}, chosen = {};
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < pairs; i++) row[r][i] = magnitude[4 * r + first_of[i]] + magnitude[4 * r + second_of[i]];
        for (Doubles& sum : rest) sum = Doubles{} - 1.0;
        NMS_UNROLL
        for (int i = 0; i < pairs; i++)
            NMS_UNROLL
            for (int j = 0; j < pairs; j++) {
                const int way = ways.below[i][j];
                const Doubles sum = row[2][i] + row[3][j];
                const auto better = sum > rest[way];
                rest[way] = better ? sum : rest[way];
                below[way] = better ? Bits{} + (bits_of[i] << 8 | bits_of[j] << 12) : below[way];
            }
        NMS_UNROLL
        for (int i = 0; i < pairs; i++)
            NMS_UNROLL
            for (int j = 0; j < pairs; j++) {
                const int way = ways.above[i][j];
                const Doubles sum = row[0][i] + row[1][j] + rest[way];
                const auto better = sum > best;
                best = better ? sum : best;
                chosen = better ? below[way] | (bits_of[i] | bits_of[j] << 4) : chosen;
            }
        *kept = chosen;
    }

    // Writes a row of blocks, four bits each, over the bits of before, from bit 4 * `four` on, which is the middle of a
    // byte where `four` is odd; returns how many bits changed.
    static NMS_INLINE int64_t renew_fours(uint8_t* mask, int64_t four, uint64_t bits, int blocks) {
        uint64_t before = 0;
        if (four % 2 == 0 && blocks == chunk) {
            std::memcpy(&before, mask + four / 2, 8);
            std::memcpy(mask + four / 2, &bits, 8);
            return __builtin_popcountll(before ^ bits);
        }
        int64_t changed = 0;
        for (int b = 0; b < blocks; b++, four++) {
            const int at = static_cast<int>(four % 2 * 4), old = mask[four / 2];
            const int renewed = (old & ~(15 << at)) | static_cast<int>(bits >> 4 * b & 15) << at;
            changed += __builtin_popcount(static_cast<unsigned>(old ^ renewed));
            mask[four / 2] = static_cast<uint8_t>(renewed);
        }
        return changed;
    }

    // Four rows of the weight, which begin with a byte of the mask. Returns how many bits changed.
    static NMS_NOINLINE int64_t rank_strip(const float* weight, uint8_t* mask, int64_t columns, int32_t* nan) {
        int64_t changed = 0;
        int32_t largest = 0;
        for (int64_t first = 0; first < columns; first += 4 * chunk) {
            const int here = static_cast<int>(smaller(4 * chunk, columns - first));
            float turned[4][8][8];  // of a row: the four columns of blocks 0, 2, 4, then those of blocks 1, 3, 5
            for (int r = 0; r < 4; r++) {
                int32_t digits[4 * chunk] = {};
                float finite[4 * chunk];
                if (here == 4 * chunk)
                    std::memcpy(digits, weight + r * columns + first, sizeof digits);
                else
                    std::memcpy(digits, weight + r * columns + first, sizeof(float) * static_cast<size_t>(here));
                for (int32_t& own : digits) {
                    own &= 0x7fffffff;
                    largest = own > largest ? own : largest;
                    own = own < largest_finite ? own : largest_finite;  // infinity is as good as the largest number
                }
                std::memcpy(finite, digits, sizeof finite);
                V::transpose8(finite, 8, turned[r][0], 8);
            }
            int64_t kept[chunk];  // of blocks 0, 2, 4, then of blocks 1, 3, 5
            for (int b = 0; b < chunk; b += together) {
                Doubles magnitude[16];
                for (int r = 0; r < 4; r++)
                    for (int c = 0; c < 4; c++) {
                        Floats single;
                        std::memcpy(&single, &turned[r][b / 8 * 4 + c][b % 8], sizeof single);
                        magnitude[4 * r + c] = __builtin_convertvector(single, Doubles);
                    }
                Bits found;
                search(magnitude, &found);
                std::memcpy(kept + b, &found, sizeof found);
            }
            for (int r = 0; r < 4; r++) {
                uint8_t bytes[8];
                for (int i = 0; i < 8; i++)
                    bytes[i] = static_cast<uint8_t>((kept[i] >> 4 * r & 15) | (kept[8 + i] >> 4 * r & 15) << 4);
                uint64_t bits;
                std::memcpy(&bits, bytes, 8);
                changed += renew_fours(mask, (r * columns + first) / 4, bits, here / 4);
            }
        }
        if (largest > infinity) *nan = 1;
        return changed;
    }

    static void rank(const float* weight, uint8_t* mask, int64_t rows, int64_t columns, int64_t* flips, int32_t* nan) {
        int64_t all = 0;
        int32_t bad = 0;
        parallel(rows / 4, larger(1, 4096 / larger(1, columns)), [&](int64_t begin, int64_t end) {
            int64_t changed = 0;
            int32_t nan_here = 0;
            for (int64_t strip = begin; strip < end; strip++)
                changed += rank_strip(weight + 4 * strip * columns, mask + strip * columns / 2, columns, &nan_here);
            __atomic_fetch_add(&all, changed, __ATOMIC_RELAXED);
            if (nan_here) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        });
        *flips = all;
        *nan = bad;
    }
};

}  // namespace nms
