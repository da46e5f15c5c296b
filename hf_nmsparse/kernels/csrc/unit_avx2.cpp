#include "linear.h"
#include "masks.h"
#include "simd_avx2.h"

namespace nms {

const Unit avx2_unit = {
    "avx2",
    Avx2::lanes,
    Layout<Avx2>::packed_bytes,
    Layout<Avx2>::repack,
    Layout<Avx2>::restore,
    Linear<Avx2>::multiply,
    nullptr,
    Masks<Avx2>::rank,
    Masks<Avx2>::decay,
    Masks<Avx2>::apply,
    Masks<Avx2>::soften,
};

}  // namespace nms
