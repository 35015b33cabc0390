// Threads that help another one to run a kernel.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "cores.h"
#include "threads.h"
#include "waiting.h"

namespace nf {

// A thread that is late is not waited for: whoever runs a kernel takes all tasks that no helper has taken, and then waits
// for those alone that are at work. So a helper that the system has put aside for another program holds nobody up.
//
// The system often wakes a helper on the core of the thread that woke it, where it waits for that one's time slice to end
// though other cores idle. A helper that was last seen there is moved away first.
class Pool : public Threads {
 public:
  // Starts `helpers` threads; with `cores`, each is pinned to its own. Throws std::runtime_error when a core cannot be had.
  explicit Pool(int64_t helpers, const std::vector<int>& cores = {});
  ~Pool() override;

  // Runs a kernel on this thread, which is the team's first, and on the helpers that come in time. When another thread is
  // in here, this one runs the kernel alone.
  void run_together(const Command& kernel) override;

  int64_t size() const { return static_cast<int64_t>(helpers_.size()) + 1; }

 private:
  struct Helper {
    std::thread thread;
    std::atomic<int> core{-1};  // that it ran on last; -1 where that is not known
    ForbiddenCore forbidden;    // that of the thread it helps, once the two have met
  };

  void help(Helper& helper, int64_t index);
  void stop();

  std::deque<Helper> helpers_;
  bool pinned_;
  std::mutex running_;
  const Command* kernel_ = nullptr;
  int64_t taken_ = 0;
  // Number of the kernel, whether helpers may still join, how many have. A helper joins by counting itself.
  std::atomic<uint32_t> gate_{0};
  std::atomic<uint32_t> finished_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace nf
