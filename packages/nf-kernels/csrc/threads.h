// What kernels run on.
#pragma once

#include <cstdint>

#include "team.h"

namespace nf {

// A function that all threads of a team call. It refers to the function and does not keep it.
class Command {
 public:
  template <typename Function>
  Command(const Function& function)
      : function_(&function), call_([](const void* callee, const Team& team) {
          (*static_cast<const Function*>(callee))(team);
        }) {}

  void operator()(const Team& team) const { call_(function_, team); }

 private:
  const void* function_;
  void (*call_)(const void*, const Team&);
};

class Threads {
 public:
  Threads() = default;
  virtual ~Threads() = default;
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  // Runs a kernel, which must not throw, to its end.
  virtual void run_together(const Command& kernel) = 0;

  // As run_together or, when there is little to do, on this thread alone. `work` is a number of elements.
  void run(int64_t work, const Command& kernel) {
    constexpr int64_t kParallelWork = 1 << 15;  // below this, waking threads costs more than it saves
    if (work >= kParallelWork) return run_together(kernel);
    int64_t taken = 0;
    kernel(Team{0, 1, &taken});
  }
};

}  // namespace nf
