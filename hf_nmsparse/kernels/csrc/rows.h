// What happens to rows between products: exponentials, activations, norms, embeddings, and what is done to the sums of a
// product while they are at hand. Once for all vector units.
#pragma once
#include <math.h>

#include "unit.h"

namespace nms {

template <class V>
struct Maths {
    using F = typename V::Float;
    using I = typename V::Int;
    static constexpr int64_t lanes = V::lanes;

    // To about 2 units in the last place, as Cephes does it: x = n ln 2 + r, a polynomial in r, and n into the exponent.
    static NMS_INLINE F exp(F x) {
        x = V::min(V::max(x, V::set(-87.0f)), V::set(88.0f));
        const I n = V::round(V::mul(x, V::set(1.44269504f)));
        const F whole = V::to_float(n);
        F r = V::fma(whole, V::set(-0.693359375f), x);
        r = V::fma(whole, V::set(2.12194440e-4f), r);
        F p = V::set(1.9875691500e-4f);
        p = V::fma(p, r, V::set(1.3981999507e-3f));
        p = V::fma(p, r, V::set(8.3334519073e-3f));
        p = V::fma(p, r, V::set(4.1665795894e-2f));
        p = V::fma(p, r, V::set(1.6666665459e-1f));
        p = V::fma(p, r, V::set(5.0000001201e-1f));
        p = V::fma(p, V::mul(r, r), V::add(r, V::set(1.0f)));
        return V::mul(p, V::as_float(V::shift_left(V::sum(n, V::set_int(127)), 23)));
    }

    // To the nearest bf16, ties to even.
    static NMS_INLINE F to_bf16(F x) {
        const I bits = V::as_int(x);
        const I odd = V::both(V::shift_right(bits, 16), V::set_int(1));
        const I up = V::sum(V::sum(bits, V::set_int(0x7fff)), odd);
        return V::as_float(V::both(up, V::set_int(static_cast<int32_t>(0xffff0000))));
    }
    static NMS_INLINE F as(bool bf16, F x) { return bf16 ? to_bf16(x) : x; }

    static NMS_INLINE F negative(F x) { return V::sub(V::set(0.0f), x); }

    static NMS_INLINE F sigmoid(F x) { return V::div(V::set(1.0f), V::add(V::set(1.0f), exp(negative(x)))); }

    // The error function by Abramowitz and Stegun 7.1.26, to 1.5e-7.
    static NMS_INLINE F gelu_by_erf(F x) {
        const F none = V::set(0.0f), one = V::set(1.0f);
        const F z = V::mul(V::max(x, negative(x)), V::set(0.70710678f));
        const F t = V::div(one, V::fma(z, V::set(0.3275911f), one));
        F p = V::set(1.061405429f);
        p = V::fma(p, t, V::set(-1.453152027f));
        p = V::fma(p, t, V::set(1.421413741f));
        p = V::fma(p, t, V::set(-0.284496736f));
        p = V::fma(p, t, V::set(0.254829592f));
        const F outside = V::mul(V::mul(p, t), exp(negative(V::mul(z, z))));
        const F below = V::mul(V::set(0.5f), outside);  // the normal distribution up to -|x|
        return V::fma(V::max(x, none), V::sub(one, below), V::mul(V::min(x, none), below));
    }
    static NMS_INLINE F gelu_by_tanh(F x) {
        const F cube = V::mul(V::mul(x, x), x);
        return V::mul(x, sigmoid(V::mul(V::set(1.5957691216f), V::fma(cube, V::set(0.044715f), x))));
    }
    static NMS_INLINE F activate(Activation activation, F x) {
        switch (activation) {
            case relu: return V::max(x, V::set(0.0f));
            case gelu: return gelu_by_erf(x);
            case gelu_tanh: return gelu_by_tanh(x);
            case silu: return V::mul(x, sigmoid(x));
            case activations: break;
        }
        return x;
    }
};

// What is done to the sums of a tile.
template <class V>
struct Finishing {
    using F = typename V::Float;
    using M = Maths<V>;
    static constexpr int64_t lanes = V::lanes, block_rows = 2 * lanes;

    // sums is [count][block_rows], of rows from `row` on and columns from `column` on.
    static NMS_INLINE void finish(const Projection& p, int64_t row, int count, int64_t column, const float* sums) {
        p.bf16 ? finish_in<true>(p, row, count, column, sums) : finish_in<false>(p, row, count, column, sums);
    }
    template <bool bf16>
    static NMS_INLINE void finish_in(const Projection& p, int64_t row, int count, int64_t column, const float* sums) {
        switch (p.finish) {
            case store_sums: return finish_as<store_sums, bf16>(p, row, count, column, sums);
            case add_residual: return finish_as<add_residual, bf16>(p, row, count, column, sums);
            case store_active: return finish_as<store_active, bf16>(p, row, count, column, sums);
            case gate: return finish_as<gate, bf16>(p, row, count, column, sums);
            case keep_best: return finish_as<keep_best, bf16>(p, row, count, column, sums);
            case keep_best_only: return finish_as<keep_best_only, bf16>(p, row, count, column, sums);
        }
    }
    template <Finish kind, bool bf16>
    static NMS_NOINLINE void finish_as(const Projection& p, int64_t row, int count, int64_t column, const float* sums) {
        F bias[2] = {V::set(0.0f), V::set(0.0f)};
        if (p.bias)
            for (int r = 0; r < 2; r++) bias[r] = V::load(p.bias + column + r * lanes);
        for (int b = 0; b < count; b++, sums += block_rows) {
            F sum[2];
            for (int r = 0; r < 2; r++) {
                F own = V::load(sums + r * lanes);
                if (bf16 && p.bias_apart) own = M::to_bf16(own);
                sum[r] = M::as(bf16, V::add(own, bias[r]));
            }
            if constexpr (kind == keep_best || kind == keep_best_only) {
                best_of<kind>(p, p.best[row + b], column, sum);
            } else {
                float* y = p.y + (row + b) * p.y_stride + column;
                NMS_UNROLL for (int r = 0; r < 2; r++, y += lanes) {
                    F value = sum[r];
                    if constexpr (kind == add_residual) value = M::as(bf16, V::add(V::load(y), value));
                    if constexpr (kind == store_active || kind == gate)
                        value = M::as(bf16, M::activate(p.activation, value));
                    if constexpr (kind == gate) value = M::as(bf16, V::mul(V::load(y), value));
                    V::store(y, value);
                }
            }
        }
    }

    static void choose(const Projection& p, const float* logits, const int32_t* places, Best* best) {
        for (int64_t column = 0; column < p.out; column += block_rows) {
            float all[block_rows] = {};
            for (int64_t i = 0; i < smaller(block_rows, p.out - column); i++) all[i] = logits[places[column + i]];
            F sum[2] = {V::load(all), V::load(all + lanes)};
            p.finish == keep_best ? best_of<keep_best>(p, *best, column, sum)
                                  : best_of<keep_best_only>(p, *best, column, sum);
        }
    }

    template <Finish kind>
    static NMS_INLINE void best_of(const Projection& p, Best& best, int64_t column, F (&sum)[2]) {
        if (column + block_rows > p.out)  // rows that fill the last block
            for (int r = 0; r < 2; r++) {
                const int64_t real = larger(0, smaller(lanes, p.out - column - r * lanes));
                float all[lanes];
                V::store(all, sum[r]);
                for (int64_t i = real; i < lanes; i++) all[i] = -1e30f;
                sum[r] = V::load(all);
            }
        const F least = V::set(best.least);
        for (int r = 0; r < 2; r++)
            if (const uint32_t hits = V::above(sum[r], least)) take(p, best, column + r * lanes, sum[r], hits);
        if constexpr (kind == keep_best_only) return;
        const F top = V::max(sum[0], sum[1]);
        if (V::above(top, V::set(best.reference + 30.0f))) {
            const float now = V::highest(top);
            const F rest = V::mul(V::load(best.sum), M::exp(V::set(best.reference - now)));
            V::store(best.sum, rest);
            best.reference = now;
        }
        const F reference = V::set(best.reference);
        const F both = V::add(M::exp(V::sub(sum[0], reference)), M::exp(V::sub(sum[1], reference)));
        V::store(best.sum, V::add(V::load(best.sum), both));
    }
    static NMS_NOINLINE void take(const Projection& p, Best& best, int64_t column, F values, uint32_t hits) {
        float all[lanes];
        V::store(all, values);
        for (int64_t i = 0; i < lanes && column + i < p.out; i++) {
            if (!(hits >> i & 1) || !(all[i] > best.least)) continue;
            const int32_t token = p.columns ? p.columns[column + i] : static_cast<int32_t>(column + i);
            if (best.banned && best.banned[token >> 5] >> (token & 31) & 1) continue;
            // Of equal ones the lower token comes first, in whatever order the rows of the weight are.
            const auto beats = [&](int other) {
                return best.logit[other] < all[i] || (best.logit[other] == all[i] && token < best.token[other]);
            };
            if (best.count == best.keep && !beats(best.keep - 1)) continue;
            int at = best.count < best.keep ? best.count++ : best.keep - 1;
            for (; at > 0 && beats(at - 1); at--) {
                best.logit[at] = best.logit[at - 1];
                best.token[at] = best.token[at - 1];
            }
            best.logit[at] = all[i];
            best.token[at] = token;
            if (best.count < best.keep) continue;
            const float last = best.logit[best.keep - 1];
            best.least = p.columns ? nextafterf(last, -INFINITY) : last;
        }
    }
};

template <class V>
struct RowsOf {
    using F = typename V::Float;
    using M = Maths<V>;
    static constexpr int64_t lanes = V::lanes;

    static NMS_INLINE F load_some(const float* p, int64_t count) {
        return count >= lanes ? V::load(p) : V::load(p, static_cast<int>(count));
    }
    static NMS_INLINE void store_some(float* p, F value, int64_t count) {
        if (count >= lanes)
            V::store(p, value);
        else
            V::store(p, value, static_cast<int>(count));
    }

    // x may be y.
    static void normalise(const Norm& n, const float* x, float* y) {
        F sum = V::set(0.0f), squares = V::set(0.0f);
        float mean = 0.0f;
        const float size = static_cast<float>(n.width);
        if (n.bias) {
            for (int64_t i = 0; i < n.width; i += lanes) sum = V::add(sum, load_some(x + i, n.width - i));
            mean = V::total(sum) / size;
        }
        for (int64_t i = 0; i < n.width; i += lanes) {
            F off = V::sub(load_some(x + i, n.width - i), V::set(mean));
            if (n.width - i < lanes) off = V::keep((1u << (n.width - i)) - 1, off);
            squares = V::fma(off, off, squares);
        }
        const F inverse = V::set(1.0f / sqrtf(V::total(squares) / size + n.epsilon));
        for (int64_t i = 0; i < n.width; i += lanes) {
            const int64_t rest = n.width - i;
            F value = V::mul(V::sub(load_some(x + i, rest), V::set(mean)), inverse);
            if (n.bias)
                value = V::fma(value, load_some(n.gain + i, rest), load_some(n.bias + i, rest));
            else
                value = V::mul(M::as(n.bf16, value), load_some(n.gain + i, rest));
            store_some(y + i, M::as(n.bf16, value), rest);
        }
    }

    // `row` may be x.
    static void embed(const void* row, Number number, float scale, const float* position, int64_t width, bool bf16,
                      float* x) {
        if (number == fp32 && row != x) std::memcpy(x, row, 4 * width);
        for (int64_t i = 0; i < width && number != fp32; i++)
            x[i] = number == int8 ? static_cast<float>(static_cast<const int8_t*>(row)[i])
                   : number == Number::bf16 ? bf16_to_float(static_cast<const uint16_t*>(row)[i])
                                    : half_to_float(static_cast<const uint16_t*>(row)[i]);
        for (int64_t i = 0; i < width; i += lanes) {
            F value = M::as(bf16, V::mul(load_some(x + i, width - i), V::set(scale)));
            if (position) value = M::as(bf16, V::add(value, load_some(position + i, width - i)));
            store_some(x + i, value, width - i);
        }
    }

    static void narrow(const float* x, int64_t count, uint16_t* to) {
        const F most = V::set(65504.0f), least = V::set(-65504.0f);
        for (int64_t i = 0; i < count; i += lanes) {
            const F value = V::max(V::min(load_some(x + i, count - i), most), least);
            if (count - i >= lanes) {
                V::store_half(to + i, value);
                continue;
            }
            uint16_t all[lanes];
            V::store_half(all, value);
            std::memcpy(to + i, all, static_cast<size_t>(2 * (count - i)));
        }
    }
    static NMS_INLINE F load_some(const uint16_t* p, int64_t count) {
        if (count >= lanes) return V::load_half(p);
        uint16_t all[lanes] = {};
        std::memcpy(all, p, static_cast<size_t>(2 * count));
        return V::load_half(all);
    }
    static NMS_INLINE F load(const float* p) { return V::load(p); }
    static NMS_INLINE F load(const uint16_t* p) { return V::load_half(p); }

    // log(sum(exp(logits)))
    static float log_sum(const float* logits, int64_t count) {
        F top = V::set(-3e38f);
        for (int64_t i = 0; i + lanes <= count; i += lanes) top = V::max(top, V::load(logits + i));
        float most = V::highest(top);
        for (int64_t i = count / lanes * lanes; i < count; i++) most = logits[i] > most ? logits[i] : most;
        const F reference = V::set(most);
        F sum = V::set(0.0f);
        for (int64_t i = 0; i + lanes <= count; i += lanes)
            sum = V::add(sum, M::exp(V::sub(V::load(logits + i), reference)));
        float total = V::total(sum);
        for (int64_t i = count / lanes * lanes; i < count; i++) total += expf(logits[i] - most);
        return most + logf(total);
    }
};

}  // namespace nms
