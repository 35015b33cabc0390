#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace nf {
namespace {

constexpr uint32_t kOpen = 1u << 15;
constexpr uint32_t kJoined = kOpen - 1;
constexpr uint32_t kNumber = 1u << 16;

}  // namespace

void pin(std::thread& thread, int core) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(core), &set);
  if (const int error = pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set)) {
    throw std::runtime_error("core " + std::to_string(core) + " cannot be had: " + std::strerror(error));
  }
#else
  static_cast<void>(thread);  // the system has no pinning; the threads go where it puts them
  static_cast<void>(core);
#endif
}

Pool::Pool(int64_t helpers, const std::vector<int>& cores) {
  try {
    for (int64_t i = 0; i < helpers; ++i) {
      threads_.emplace_back(&Pool::help, this, i + 1);
      if (!cores.empty()) pin(threads_.back(), cores[static_cast<std::size_t>(i)]);
    }
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stopping_.store(true);
  gate_.fetch_add(kNumber, std::memory_order_release);
  gate_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::run(const Command& command) {
  int64_t taken = 0;
  const std::unique_lock lock(running_, std::try_to_lock);
  if (!lock.owns_lock() || threads_.empty()) {
    command(Team{0, size(), &taken});
    return;
  }
  command_ = &command;
  taken_ = 0;
  finished_.store(0, std::memory_order_relaxed);
  const uint32_t number = (gate_.load(std::memory_order_relaxed) & ~(kNumber - 1)) + kNumber;
  gate_.store(number | kOpen, std::memory_order_release);
  gate_.notify_all();
  command(Team{0, size(), &taken_});
  const uint32_t joined = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & kJoined;
  for (uint32_t finished = finished_.load(std::memory_order_acquire); finished < joined;
       finished = finished_.load(std::memory_order_acquire)) {
    wait_for_change(finished_, finished);
  }
}

void Pool::help(int64_t index) {
  for (uint32_t seen = 0;;) {
    uint32_t gate = gate_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    if ((gate & kOpen) == 0 || gate / kNumber == seen / kNumber) {
      // Asleep for as many commands as there are numbers, it would miss one: nobody waits for it.
      wait_for_change(gate_, gate);
      continue;
    }
    if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
    seen = gate;
    (*command_)(Team{index, size(), &taken_});
    finished_.fetch_add(1, std::memory_order_acq_rel);
    finished_.notify_one();
  }
}

}  // namespace nf
