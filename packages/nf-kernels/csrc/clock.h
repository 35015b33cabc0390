// The clock of events and launches.
#pragma once

#include <chrono>
#include <cstdint>

namespace nf {

// Nanoseconds of the steady clock; never 0.
inline int64_t steady_nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace nf
