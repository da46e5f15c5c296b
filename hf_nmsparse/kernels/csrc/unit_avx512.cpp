#include "simd_avx512.h"
#include "unit_of.h"

namespace nms {

const Unit avx512_unit = unit_of<Avx512>("avx512");
const Unit avx512_bf16_unit = unit_of<Avx512>("avx512_bf16", multiply_pairs_avx512);

}  // namespace nms
