// Which of the kernels' builds run on this processor, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace nf {

// The kernels in use: at first the best ones of this processor.
const KernelTable& kernels();

// The names of those that this processor can run, the best one first.
std::vector<std::string> usable_isas();

// Takes others from now on. Throws std::invalid_argument when the processor cannot run them.
void use_isa(const std::string& name);

}  // namespace nf
