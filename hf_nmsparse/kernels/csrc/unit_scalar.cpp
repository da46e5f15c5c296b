#include "linear.h"
#include "masks.h"
#include "simd_scalar.h"

namespace nms {

const Unit scalar_unit = {
    "scalar",
    Scalar::lanes,
    Layout<Scalar>::packed_bytes,
    Layout<Scalar>::repack,
    Layout<Scalar>::restore,
    Linear<Scalar>::multiply,
    nullptr,
    Masks<Scalar>::rank,
    Masks<Scalar>::decay,
    Masks<Scalar>::apply,
    Masks<Scalar>::soften,
};

}  // namespace nms
