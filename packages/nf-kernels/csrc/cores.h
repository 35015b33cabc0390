// Which core a thread runs on. Where the system cannot say or be told, threads run where it puts them.
#pragma once

#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace nf {

// The core that this thread runs on; -1 where that is not known.
int current_core();

// Keeps a thread on a core. Throws std::runtime_error when the core cannot be had.
void pin(std::thread& thread, int core);

// A core that a thread must not run on, one at a time.
class ForbiddenCore {
 public:
  // Moves the thread off `core` for good, and lets it back on the one before, unless somebody else has changed where it may
  // run. Nothing happens where it may run nowhere else.
  void set(std::thread& thread, int core);

 private:
#if defined(__linux__)
  int core_ = -1;
  cpu_set_t allowed_{};  // as it was left
#endif
};

}  // namespace nf
