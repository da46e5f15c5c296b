#include "simd_neon.h"
#include "unit_of.h"

namespace nms {

const Unit neon_dotprod_unit = unit_of<NeonDot>("neon_dotprod");

}  // namespace nms
