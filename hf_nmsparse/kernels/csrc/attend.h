// Attention: softmax(scale * q k + bias) v, one query against keys in cells, and queries against keys that are turned over.
// Every query is computed on its own, so that the rows beside it do not matter.
#pragma once
#include "rows.h"
#include "unit.h"

namespace nms {

template <class V>
struct Attention {
    using F = typename V::Float;
    using M = Maths<V>;
    using Row = RowsOf<V>;
    static constexpr int64_t lanes = V::lanes;

    // exp(score - highest) in place, zeros up to whole vectors; returns 1 / sum.
    static NMS_INLINE float soften(float* scores, int64_t count, bool bf16) {
        for (int64_t i = count; i < padded(count, lanes); i++) scores[i] = -1e30f;
        F top = V::set(-1e30f), sum = V::set(0.0f);
        for (int64_t i = 0; i < count; i += lanes) top = V::max(top, V::load(scores + i));
        const F highest = V::set(V::highest(top));
        for (int64_t i = 0; i < count; i += lanes) {
            F weight = M::exp(V::sub(V::load(scores + i), highest));
            if (count - i < lanes) weight = V::keep((1u << (count - i)) - 1, weight);
            sum = V::add(sum, weight);
            V::store(scores + i, M::as(bf16, weight));  // a bf16 model multiplies weights in bf16, and divides later
        }
        return 1.0f / V::total(sum);
    }

    // vectors: how many make a head, or 0 for heads of any width.
    template <int vectors, class C>
    static NMS_INLINE F match(const float* query, const C* key, int64_t head_dim) {
        if constexpr (vectors > 0) {
            F sum = V::mul(V::load(query), Row::load(key));
            NMS_UNROLL for (int j = 1; j < vectors; j++)
                sum = V::fma(V::load(query + j * lanes), Row::load(key + j * lanes), sum);
            return sum;
        } else {
            F sum = V::set(0.0f);
            for (int64_t j = 0; j < head_dim; j += lanes)
                sum = V::fma(Row::load_some(query + j, head_dim - j), Row::load_some(key + j, head_dim - j), sum);
            return sum;
        }
    }

    template <int vectors, class C>
    static void in_cells(const CellAttention& a) {
        const C* const* cells = reinterpret_cast<const C* const*>(a.cells);
        for (int64_t head = 0; head < a.heads; head++) {
            const int64_t at = head * a.head_dim;
            const float* bias = a.bias ? a.bias + head * a.bias_stride : nullptr;
            for (int64_t p = 0; p < a.count; p += lanes) {
                F sums[lanes];
                const int64_t n = smaller(lanes, a.count - p);
                for (int64_t i = 0; i < n; i++)
                    sums[i] = match<vectors>(a.query + at, cells[p + i] + at, a.head_dim);
                for (int64_t i = n; i < lanes; i++) sums[i] = V::set(0.0f);
                F scores = V::mul(V::totals(sums), V::set(a.scale));
                if (bias) scores = V::add(scores, Row::load_some(bias + p, n));
                V::store(a.scores + p, scores);
            }
            const F inverse = V::set(soften(a.scores, a.count, a.bf16));
            constexpr int wide = vectors > 0 ? vectors : 1;
            for (int64_t j = 0; j < a.head_dim; j += wide * lanes) {
                F sum[wide];
                for (int v = 0; v < wide; v++) sum[v] = V::set(0.0f);
                for (int64_t p = 0; p < a.count; p++) {
                    const C* value = cells[p] + a.value_at + at + j;
                    const F weight = V::set(a.scores[p]);
                    if constexpr (vectors > 0)
                        NMS_UNROLL for (int v = 0; v < wide; v++)
                            sum[v] = V::fma(weight, Row::load(value + v * lanes), sum[v]);
                    else
                        sum[0] = V::fma(weight, Row::load_some(value, a.head_dim - j), sum[0]);
                }
                for (int v = 0; v < wide; v++)
                    Row::store_some(a.out + at + j + v * lanes, M::as(a.bf16, V::mul(sum[v], inverse)),
                                    a.head_dim - j - v * lanes);
            }
        }
    }
    template <class C>
    static void cells_of(const CellAttention& a) {
        if (a.head_dim == 4 * lanes)
            in_cells<4, C>(a);
        else if (a.head_dim == 2 * lanes)
            in_cells<2, C>(a);
        else if (a.head_dim == 8 * lanes)
            in_cells<8, C>(a);
        else
            in_cells<0, C>(a);
    }
    static void cells(const CellAttention& a) { a.half ? cells_of<uint16_t>(a) : cells_of<float>(a); }

    // Q queries from number `first` on share the loads of keys and values.
    template <int Q, class C>
    static NMS_NOINLINE void queries(const TurnedAttention& a, int64_t first) {
        const float* query = a.query + first * a.query_stride;
        for (int64_t p = 0; p < a.count; p += 2 * lanes) {
            const int both = p + lanes < a.width ? 2 : 1;
            constexpr int split = Q == 1 ? 4 : 1;  // enough sums in flight to hide the latency of one
            F sums[Q][2][split];
            for (int i = 0; i < Q; i++)
                for (int s = 0; s < split; s++) sums[i][0][s] = sums[i][1][s] = V::set(0.0f);
            for (int64_t c = 0; c < a.head_dim; c += split)
                NMS_UNROLL for (int s = 0; s < split; s++) {
                    if (split > 1 && c + s >= a.head_dim) break;
                    const C* key = static_cast<const C*>(a.keys) + (c + s) * a.width + p;
                    const F one = Row::load(key), two = both == 2 ? Row::load(key + lanes) : one;
                    NMS_UNROLL for (int i = 0; i < Q; i++) {
                        const F x = V::set(query[i * a.query_stride + c + s]);
                        sums[i][0][s] = V::fma(x, one, sums[i][0][s]);
                        sums[i][1][s] = V::fma(x, two, sums[i][1][s]);
                    }
                }
            for (int i = 0; i < Q; i++)
                for (int v = 0; v < both; v++) {
                    const int64_t at = p + v * lanes;
                    F total = sums[i][v][0];
                    for (int s = 1; s < split; s++) total = V::add(total, sums[i][v][s]);
                    F scores = V::mul(total, V::set(a.scale));
                    if (a.bias && at < a.count)
                        scores = V::add(scores, Row::load_some(a.bias - first - i + at, a.count - at));
                    V::store(a.scores + i * a.width + at, scores);
                }
        }
        float inverse[Q];
        for (int i = 0; i < Q; i++) inverse[i] = soften(a.scores + i * a.width, a.count, a.bf16);
        int64_t j = 0;
        for (; j + 4 * lanes <= a.head_dim; j += 4 * lanes) values<Q, 4, C>(a, first, j, inverse);
        for (; j < a.head_dim; j += lanes) values<Q, 1, C>(a, first, j, inverse);
        if (!a.weights) return;
        for (int i = 0; i < Q; i++)
            for (int64_t p = 0; p < a.count; p++)
                a.weights[(first + i) * a.weights_stride + p] += a.scores[i * a.width + p] * inverse[i];
    }
    template <int Q, int vectors, class C>
    static NMS_INLINE void values(const TurnedAttention& a, int64_t first, int64_t j, const float (&inverse)[Q]) {
        const int64_t rest = a.head_dim - j;
        F sum[Q][vectors];
        for (int i = 0; i < Q; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] = V::set(0.0f);
        for (int64_t p = 0; p < a.count; p++) {
            F value[vectors];
            NMS_UNROLL for (int v = 0; v < vectors; v++) {
                const C* from = static_cast<const C*>(a.values) + p * a.value_stride + j + v * lanes;
                value[v] = vectors > 1 ? Row::load(from) : Row::load_some(from, rest);
            }
            NMS_UNROLL for (int i = 0; i < Q; i++) {
                const F weight = V::set(a.scores[i * a.width + p]);
                NMS_UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = V::fma(weight, value[v], sum[i][v]);
            }
        }
        for (int i = 0; i < Q; i++)
            for (int v = 0; v < vectors; v++)
                Row::store_some(a.out + (first + i) * a.out_stride + j + v * lanes,
                                M::as(a.bf16, V::mul(sum[i][v], V::set(inverse[i]))), rest - v * lanes);
    }
    template <class C>
    static void turned_of(const TurnedAttention& a) {
        int64_t i = 0;
        for (; i + 4 <= a.queries; i += 4) queries<4, C>(a, i);
        for (; i < a.queries; i++) queries<1, C>(a, i);
    }
    static void turned(const TurnedAttention& a) { a.half ? turned_of<uint16_t>(a) : turned_of<float>(a); }

    // Keys [count], a row every `stride`, to [head_dim][width], zeros behind the last.
    static void turn(const float* keys, int64_t stride, int64_t count, int64_t head_dim, float* turned, int64_t width) {
        int64_t p = 0;
        for (; p + 8 <= count; p += 8) {
            int64_t c = 0;
            for (; c + 8 <= head_dim; c += 8) V::transpose8(keys + p * stride + c, stride, turned + c * width + p, width);
            for (; c < head_dim; c++)
                for (int64_t i = 0; i < 8; i++) turned[c * width + p + i] = keys[(p + i) * stride + c];
        }
        for (int64_t c = 0; c < head_dim; c++)
            for (int64_t i = p; i < width; i++) turned[c * width + i] = i < count ? keys[i * stride + c] : 0.0f;
    }
};

}  // namespace nms
