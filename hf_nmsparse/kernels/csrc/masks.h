// N:M masks of fp32 weights and the decay of what they prune, one pass each. Plain loops that compilers vectorise.
#pragma once
#include "common.h"

namespace nms {

template <class V>
struct Masks {
    static constexpr int64_t together = 64;  // groups that are ranked side by side

    // Magnitudes of finite numbers and infinities order as their bits do; those of NaN lie above.
    static NMS_INLINE int32_t magnitude(const float* weight) {
        int32_t bits;
        std::memcpy(&bits, weight, 4);
        return bits & 0x7fffffff;
    }

    // Of equal magnitudes the lower index wins. `mask` holds the mask of before and gets the new one; returns how many
    // entries differ. `nan` becomes 1 where a weight is NaN.
    static NMS_INLINE int64_t rank_two_of_four(const float* w, uint8_t* mask, int64_t groups, int32_t* nan) {
        uint32_t changed = 0;
        int32_t largest = 0;
        for (int64_t g = 0; g < groups; g++) {
            const int32_t a = magnitude(w + 4 * g), b = magnitude(w + 4 * g + 1), c = magnitude(w + 4 * g + 2),
                          d = magnitude(w + 4 * g + 3);
            const uint8_t ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
            const uint8_t keep_a = (ab & ac) | (ad & (ab | ac));  // wins two of its three comparisons
            const uint8_t lost_b = ab ^ 1, lost_c = ac ^ 1, less_c = bc ^ 1;
            const uint8_t keep_b = (lost_b & bc) | (bd & (lost_b | bc));
            const uint8_t keep_c = (lost_c & less_c) | (cd & (lost_c | less_c));
            const uint8_t keep_d = keep_a ^ keep_b ^ keep_c;
            uint8_t* m = mask + 4 * g;
            changed += (m[0] ^ keep_a) + (m[1] ^ keep_b) + (m[2] ^ keep_c) + (m[3] ^ keep_d);
            m[0] = keep_a;
            m[1] = keep_b;
            m[2] = keep_c;
            m[3] = keep_d;
            const int32_t ab_most = a > b ? a : b, cd_most = c > d ? c : d;
            const int32_t most = ab_most > cd_most ? ab_most : cd_most;
            largest = most > largest ? most : largest;
        }
        if (largest > 0x7f800000) *nan = 1;
        return changed;
    }

    static NMS_INLINE int64_t rank_any(const float* w, uint8_t* mask, int64_t groups, int n, int m, int32_t* nan) {
        int32_t magnitudes[32][together];
        int32_t losses[32][together];
        int32_t largest = 0;
        for (int64_t g = 0; g < groups; g++)
            for (int i = 0; i < m; i++) {
                magnitudes[i][g] = magnitude(w + g * m + i);
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
        for (int64_t g = 0; g < groups; g++)
            for (int i = 0; i < m; i++) {
                const uint8_t keep = losses[i][g] < n;
                changed += mask[g * m + i] ^ keep;
                mask[g * m + i] = keep;
            }
        if (largest > 0x7f800000) *nan = 1;
        return changed;
    }

    static void rank(const float* weight, uint8_t* mask, int64_t groups, int n, int m, int64_t* flips, int32_t* nan) {
        const int64_t spans = blocks_of(groups, together);
        int64_t all = 0;
        int32_t bad = 0;
        parallel(spans, larger(1, 32768 / (together * m)), [&](int64_t begin, int64_t end) {
            int64_t changed = 0;
            int32_t nan_here = 0;
            for (int64_t span = begin; span < end; span++) {
                const int64_t first = span * together, count = smaller(together, groups - first);
                const float* w = weight + first * m;
                if (n == 2 && m == 4)
                    changed += rank_two_of_four(w, mask + first * m, count, &nan_here);
                else
                    changed += rank_any(w, mask + first * m, count, n, m, &nan_here);
            }
            __atomic_fetch_add(&all, changed, __ATOMIC_RELAXED);
            if (nan_here) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        });
        *flips = all;
        *nan = bad;
    }

    static constexpr int64_t span = 4096;

    static void decay(const float* weight, const uint8_t* mask, float* gradient, float decay, int64_t count) {
        parallel(blocks_of(count, span), 8, [=](int64_t begin, int64_t end) {
            const int64_t first = begin * span;
            decay_span(weight + first, mask + first, gradient + first, decay, smaller(end * span, count) - first);
        });
    }
    static NMS_NOINLINE void decay_span(const float* __restrict weight, const uint8_t* __restrict mask,
                                        float* __restrict gradient, float decay, int64_t count) {
        for (int64_t i = 0; i < count; i++) gradient[i] += mask[i] ? 0.0f : decay * weight[i];
    }

    // The weight where the mask keeps it, +0.0 elsewhere.
    static void apply(const float* weight, const uint8_t* mask, float* masked, int64_t count) {
        parallel(blocks_of(count, span), 8, [=](int64_t begin, int64_t end) {
            const int64_t first = begin * span;
            apply_span(weight + first, mask + first, masked + first, smaller(end * span, count) - first);
        });
    }
    static NMS_NOINLINE void apply_span(const float* __restrict weight, const uint8_t* __restrict mask,
                                        float* __restrict masked, int64_t count) {
        for (int64_t i = 0; i < count; i++) masked[i] = mask[i] ? weight[i] : 0.0f;
    }
};

}  // namespace nms
