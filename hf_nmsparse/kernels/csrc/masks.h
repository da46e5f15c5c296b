// N:M masks of fp32 weights, one pass each. A mask holds a bit a weight, the first of eight in the lowest bit of a byte;
// zeros fill the last byte.
#pragma once
#include "common.h"

namespace nms {

template <class V>
struct Masks {
    using Float = typename V::Float;
    using Int = typename V::Int;

    static constexpr int64_t together = 64;  // groups that are ranked in one go: their bits are whole bytes
    static constexpr int widest = 32;        // of all groups
    static constexpr int32_t infinity = 0x7f800000;

    // Calls work(i, here) for the vectors of [begin, end), the last of which may not be full.
    template <class Work>
    static NMS_INLINE void for_vectors(int64_t begin, int64_t end, const Work& work) {
        int64_t i = begin;
        for (; i + V::lanes <= end; i += V::lanes) work(i, V::lanes);
        if (i < end) work(i, static_cast<int>(end - i));
    }
    static NMS_INLINE Float load(const float* p, int here) { return here == V::lanes ? V::load(p) : V::load(p, here); }
    static NMS_INLINE void store(float* p, Float a, int here) {
        here == V::lanes ? V::store(p, a) : V::store(p, a, here);
    }

    static NMS_INLINE uint32_t load_bits(const uint8_t* mask, int count) {
        uint32_t bits = 0;
        std::memcpy(&bits, mask, static_cast<size_t>((count + 7) / 8));
        return bits;
    }

    // Over the bits of before; returns how many differ.
    static NMS_INLINE int64_t renew_bits(uint8_t* mask, uint32_t bits, int count) {
        const int changed = __builtin_popcount(bits ^ load_bits(mask, count));
        std::memcpy(mask, &bits, static_cast<size_t>((count + 7) / 8));
        return changed;
    }

    // The two functions that follow write the masks of `count` weights, of which a weight stays where fewer than n of
    // its group beat it: those of larger magnitude, and of equal magnitude those before it. They return how many bits
    // changed. Magnitudes of numbers order as their bits do, and those of NaN, which set `nan`, lie above.

    // Groups that fill a vector together. Every lane meets the others of its group, one after another.
    template <int m>
    static NMS_INLINE int64_t rank_lanes(const float* weight, uint8_t* mask, int64_t count, int n, int32_t* nan) {
        Int places[m], handicaps[m];
        for (int rival = 1; rival < m; rival++) {
            int32_t place[V::lanes], handicap[V::lanes];
            for (int lane = 0; lane < V::lanes; lane++) {
                place[lane] = lane / m * m + (lane + rival) % m;
                handicap[lane] = place[lane] < lane ? -1 : 0;  // a tie goes to the one before
            }
            places[rival] = V::load_int(place);
            handicaps[rival] = V::load_int(handicap);
        }
        const Int enough = V::set_int(n), limit = V::set_int(infinity), digits = V::set_int(0x7fffffff);
        int64_t changed = 0;
        uint32_t broken = 0;
        for_vectors(0, count, [&](int64_t i, int here) NMS_ALWAYS {
            const Int own = V::both(V::as_int(load(weight + i, here)), digits);
            Int lost = V::zero();
            NMS_UNROLL
            for (int rival = 1; rival < m; rival++)
                lost = V::count_less(lost, V::sum(own, handicaps[rival]), V::permute(own, places[rival]));
            broken |= V::less(limit, own);
            const uint32_t there = static_cast<uint32_t>((uint64_t{1} << here) - 1);
            changed += renew_bits(mask + i / 8, V::less(lost, enough) & there, here);
        });
        if (broken) *nan = 1;
        return changed;
    }

    // Groups of any width, side by side. Of every two members one loses.
    static NMS_INLINE int64_t rank_any(const float* weight, uint8_t* mask, int64_t count, int n, int m, int32_t* nan) {
        int32_t magnitudes[widest][together] = {}, losses[widest][together];
        int32_t largest = 0;
        for (int64_t g = 0; g < count / m; g++)
            for (int i = 0; i < m; i++) {
                int32_t bits;
                std::memcpy(&bits, weight + g * m + i, 4);
                magnitudes[i][g] = bits & 0x7fffffff;
                largest = magnitudes[i][g] > largest ? magnitudes[i][g] : largest;
            }
        for (int i = 0; i < m; i++)
            for (int64_t g = 0; g < together; g++) losses[i][g] = m - 1 - i;
        for (int i = 0; i < m; i++)
            for (int j = i + 1; j < m; j++)
                for (int64_t g = 0; g < together; g++) {
                    const int32_t first_wins = magnitudes[i][g] >= magnitudes[j][g];
                    losses[j][g] += first_wins;
                    losses[i][g] -= first_wins;
                }
        int64_t changed = 0;
        uint32_t bits = 0;
        int filled = 0;
        for (int64_t g = 0; g < count / m; g++)
            for (int i = 0; i < m; i++) {
                bits |= static_cast<uint32_t>(losses[i][g] < n) << filled;
                if (++filled < 8) continue;
                changed += renew_bits(mask++, bits, 8);
                bits = 0;
                filled = 0;
            }
        if (filled) changed += renew_bits(mask, bits, filled);
        if (largest > infinity) *nan = 1;
        return changed;
    }

    static NMS_NOINLINE int64_t rank_span(const float* weight, uint8_t* mask, int64_t count, int n, int m,
                                          int32_t* nan) {
        if (m == 2) return rank_lanes<2>(weight, mask, count, n, nan);
        if (m == 4) return rank_lanes<4>(weight, mask, count, n, nan);
        if (m == 8) return rank_lanes<8>(weight, mask, count, n, nan);
        if constexpr (V::lanes == 16)
            if (m == 16) return rank_lanes<16>(weight, mask, count, n, nan);
        return rank_any(weight, mask, count, n, m, nan);
    }

    static void rank(const float* weight, uint8_t* mask, int64_t groups, int n, int m, int64_t* flips, int32_t* nan) {
        const int64_t size = together * m, count = groups * m;
        int64_t all = 0;
        int32_t bad = 0;
        parallel(blocks_of(count, size), larger(1, 32768 / size), [&](int64_t begin, int64_t end) {
            int64_t changed = 0;
            int32_t nan_here = 0;
            for (int64_t first = begin * size; first < smaller(end * size, count); first += size)
                changed += rank_span(weight + first, mask + first / 8, smaller(size, count - first), n, m, &nan_here);
            __atomic_fetch_add(&all, changed, __ATOMIC_RELAXED);
            if (nan_here) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        });
        *flips = all;
        *nan = bad;
    }

    static constexpr int64_t span = 4096;

    // gradient += decay * weight where the mask prunes.
    static void decay(const float* weight, const uint8_t* mask, float* gradient, float decay, int64_t count) {
        parallel(blocks_of(count, span), 8, [=](int64_t begin, int64_t end) {
            for_vectors(begin * span, smaller(end * span, count), [=](int64_t i, int here) NMS_ALWAYS {
                const uint32_t bits = load_bits(mask + i / 8, here);
                const Float term = V::keep(~bits, V::mul(V::set(decay), load(weight + i, here)));
                store(gradient + i, V::add(load(gradient + i, here), term), here);
            });
        });
    }

    // The weight where the mask keeps it, `scale` times the weight elsewhere; where `scale` is 0, that is +0.0.
    static void apply(const float* weight, const uint8_t* mask, float* masked, float scale, int64_t count) {
        parallel(blocks_of(count, span), 8, [=](int64_t begin, int64_t end) {
            const int64_t last = smaller(end * span, count);
            if (scale == 0)
                for_vectors(begin * span, last, [=](int64_t i, int here) NMS_ALWAYS {
                    const uint32_t bits = load_bits(mask + i / 8, here);
                    store(masked + i, V::keep(bits, load(weight + i, here)), here);
                });
            else
                for_vectors(begin * span, last, [=](int64_t i, int here) NMS_ALWAYS {
                    const uint32_t bits = load_bits(mask + i / 8, here);
                    const Float whole = load(weight + i, here), scaled = V::mul(V::set(scale), whole);
                    store(masked + i, V::either(V::keep(bits, whole), V::keep(~bits, scaled)), here);
                });
        });
    }

    // The two functions that follow write the weights that the mask keeps, nearer to zero by the largest magnitude that
    // it prunes in their group, and +0.0 elsewhere.

    // Groups that fill a vector together.
    template <int m>
    static NMS_INLINE void soften_lanes(const float* weight, const uint8_t* mask, float* soft, int64_t count) {
        constexpr int steps = m == 2 ? 1 : m == 4 ? 2 : m == 8 ? 3 : 4;
        Int places[steps];  // after the steps every lane has met all of its group
        for (int step = 0; step < steps; step++) {
            int32_t place[V::lanes];
            for (int lane = 0; lane < V::lanes; lane++) place[lane] = lane ^ (1 << step);
            places[step] = V::load_int(place);
        }
        const Int digits = V::set_int(0x7fffffff), sign = V::set_int(INT32_MIN);
        for_vectors(0, count, [&](int64_t i, int here) NMS_ALWAYS {
            const uint32_t bits = load_bits(mask + i / 8, here);
            const Float whole = load(weight + i, here);
            Float threshold = V::as_float(V::both(V::as_int(V::keep(~bits, whole)), digits));
            NMS_UNROLL
            for (int step = 0; step < steps; step++)
                threshold = V::max(threshold, V::as_float(V::permute(V::as_int(threshold), places[step])));
            const Float towards = V::either(threshold, V::as_float(V::both(V::as_int(whole), sign)));
            store(soft + i, V::keep(bits, V::fma(V::set(-1.0f), towards, whole)), here);
        });
    }

    // Groups of any width.
    static NMS_INLINE void soften_any(const float* weight, const uint8_t* mask, float* soft, int64_t count, int m) {
        for (int64_t first = 0; first < count; first += m) {
            float threshold = 0.0f;
            for (int64_t i = first; i < first + m; i++) {
                const float pruned = mask[i / 8] >> i % 8 & 1 ? 0.0f : __builtin_fabsf(weight[i]);
                threshold = pruned > threshold ? pruned : threshold;
            }
            for (int64_t i = first; i < first + m; i++)
                soft[i] = mask[i / 8] >> i % 8 & 1 ? weight[i] - __builtin_copysignf(threshold, weight[i]) : 0.0f;
        }
    }

    static NMS_NOINLINE void soften_span(const float* weight, const uint8_t* mask, float* soft, int64_t count, int m) {
        if (m == 2) return soften_lanes<2>(weight, mask, soft, count);
        if (m == 4) return soften_lanes<4>(weight, mask, soft, count);
        if (m == 8) return soften_lanes<8>(weight, mask, soft, count);
        if constexpr (V::lanes == 16)
            if (m == 16) return soften_lanes<16>(weight, mask, soft, count);
        return soften_any(weight, mask, soft, count, m);
    }

    static void soften(const float* weight, const uint8_t* mask, float* soft, int64_t groups, int m) {
        const int64_t size = together * m, count = groups * m;
        parallel(blocks_of(count, size), larger(1, 32768 / size), [=](int64_t begin, int64_t end) {
            for (int64_t first = begin * size; first < smaller(end * size, count); first += size)
                soften_span(weight + first, mask + first / 8, soft + first, smaller(size, count - first), m);
        });
    }
};

}  // namespace nms
