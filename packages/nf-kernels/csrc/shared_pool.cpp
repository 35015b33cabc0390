#include "shared_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <thread>

namespace nf {

void SharedPool::run_together(const Command& kernel) {
  std::shared_ptr<Pool> pool;
  {
    const std::lock_guard lock(mutex_);
    if (!pool_) pool_ = std::make_shared<Pool>(num_threads_ - 1);
    pool = pool_;
  }
  pool->run_together(kernel);
}

void SharedPool::set_num_threads(int64_t num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument("num_threads is " + std::to_string(num_threads) + "; expected 1 or more");
  }
  const std::lock_guard lock(mutex_);
  num_threads_ = num_threads;
  pool_.reset();
}

int64_t SharedPool::num_threads() {
  const std::lock_guard lock(mutex_);
  return num_threads_;
}

SharedPool& shared_pool() {
  static SharedPool* const pool = new SharedPool;
  return *pool;
}

int64_t max_threads() {
  static const int64_t cores = std::thread::hardware_concurrency();  // a system call each time, else
  return std::max(cores, shared_pool().num_threads());
}

}  // namespace nf
