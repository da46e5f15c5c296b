#include "linear.h"
#include "masks.h"
#include "simd_avx512.h"

namespace nms {

const Unit avx512_unit = {
    "avx512",
    Avx512::lanes,
    Layout<Avx512>::packed_bytes,
    Layout<Avx512>::repack,
    Layout<Avx512>::restore,
    Linear<Avx512>::multiply,
    nullptr,
    Masks<Avx512>::rank,
    Masks<Avx512>::decay,
    Masks<Avx512>::apply,
    Masks<Avx512>::soften,
};

const Unit avx512_bf16_unit = {
    "avx512_bf16",
    Avx512::lanes,
    Layout<Avx512>::packed_bytes,
    Layout<Avx512>::repack,
    Layout<Avx512>::restore,
    Linear<Avx512>::multiply,
    multiply_pairs_avx512,
    Masks<Avx512>::rank,
    Masks<Avx512>::decay,
    Masks<Avx512>::apply,
    Masks<Avx512>::soften,
};

}  // namespace nms
