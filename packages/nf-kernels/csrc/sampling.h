// Sampling of one token per row.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "team.h"

namespace nf {

// Bytes of scratch that one thread needs.
int64_t sample_scratch_bytes(int64_t vocab_size);

// Writes a token per row, with the exponentials and maxima of `table`.
void sample(const SampleArgs& args, const KernelTable& table, const Team& team);

}  // namespace nf
