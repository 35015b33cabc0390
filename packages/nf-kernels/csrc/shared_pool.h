// The threads that operations run on when no lane is current.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "pool.h"
#include "threads.h"

namespace nf {

// Its threads are started when the first operation needs them.
class SharedPool : public Threads {
 public:
  // Throws std::invalid_argument when it is less than 1.
  void set_num_threads(int64_t num_threads);
  int64_t num_threads();

  void run_together(const Command& kernel) override;

 private:
  std::mutex mutex_;
  int64_t num_threads_ = 1;
  std::shared_ptr<Pool> pool_;
};

// The one of this process. It is never destroyed: the system ends its threads with the process.
SharedPool& shared_pool();

// The most threads that run a kernel together, shared ones or a lane's.
int64_t max_threads();

}  // namespace nf
