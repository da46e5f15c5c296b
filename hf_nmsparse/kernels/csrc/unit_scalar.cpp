#include "simd_scalar.h"
#include "unit_of.h"

namespace nms {

const Unit scalar_unit = unit_of<Scalar>("scalar");

}  // namespace nms
