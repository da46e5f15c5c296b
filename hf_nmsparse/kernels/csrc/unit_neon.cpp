#include "simd_neon.h"
#include "unit_of.h"

namespace nms {

const Unit neon_unit = unit_of<Neon>("neon");

}  // namespace nms
