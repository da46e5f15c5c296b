#include "simd_avx2.h"
#include "unit_of.h"

namespace nms {

const Unit avx2_unit = unit_of<Avx2>("avx2");

}  // namespace nms
