// The table of a vector unit, from what is written once for all.
#pragma once
#include "attend.h"
#include "layout.h"
#include "linear.h"
#include "masks.h"
#include "rows.h"
#include "transposable.h"
#include "unit.h"

namespace nms {

template <class V>
constexpr Unit unit_of(const char* name, void (*multiply_pairs)(Format, const Product&) = nullptr) {
    Unit unit{};
    unit.name = name;
    unit.lanes = V::lanes;
    unit.packed_bytes = Layout<V>::packed_bytes;
    unit.repack = Layout<V>::repack;
    unit.restore = Layout<V>::restore;
    unit.gather = Layout<V>::gather;
    unit.multiply = Linear<V>::multiply;
    unit.multiply_pairs = multiply_pairs;
    unit.quantise = Linear<V>::quantise;
    unit.project = Linear<V>::project;
    unit.choose = Finishing<V>::choose;
    unit.normalise = RowsOf<V>::normalise;
    unit.embed = RowsOf<V>::embed;
    unit.log_sum = RowsOf<V>::log_sum;
    unit.attend_cells = Attention<V>::cells;
    unit.attend_turned = Attention<V>::turned;
    unit.turn = Attention<V>::turn;
    unit.narrow = RowsOf<V>::narrow;
    unit.rank = Masks<V>::rank;
    unit.rank_transposable = Transposable<V>::rank;
    unit.decay = Masks<V>::decay;
    unit.apply = Masks<V>::apply;
    unit.soften = Masks<V>::soften;
    return unit;
}

}  // namespace nms
