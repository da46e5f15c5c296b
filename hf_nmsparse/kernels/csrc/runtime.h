// What the C interface and the engine share: the unit in use, and checks of the weights that come in.
#pragma once
#include "unit.h"

namespace nms {

const Unit& unit_in_use();
bool select_unit(const char* name);  // false if this machine has it not

// What a weight of this format and shape begins with, as the unit in use packs it.
Header header(Format format, int64_t out, int64_t in);
bool fits(const uint8_t* packed, Format format, int64_t out, int64_t in);

void set_parallel_for(void* function);

// Of this thread: what went wrong since the last call of `clear_failure`, or null.
const char* failure();
void clear_failure();

}  // namespace nms
