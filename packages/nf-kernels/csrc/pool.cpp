#include "pool.h"

namespace nf {
namespace {

constexpr uint32_t kOpen = 1u << 15;
constexpr uint32_t kJoined = kOpen - 1;
constexpr uint32_t kNumber = 1u << 16;

}  // namespace

Pool::Pool(int64_t helpers, const std::vector<int>& cores) : pinned_(!cores.empty()) {
  try {
    for (int64_t i = 0; i < helpers; ++i) {
      Helper& helper = helpers_.emplace_back();
      helper.thread = std::thread([this, &helper, i] { help(helper, i + 1); });
      if (pinned_) pin(helper.thread, cores[static_cast<std::size_t>(i)]);
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
  for (Helper& helper : helpers_) {
    if (helper.thread.joinable()) helper.thread.join();
  }
}

void Pool::run_together(const Command& kernel) {
  int64_t taken = 0;
  if (helpers_.empty()) return kernel(Team{0, 1, &taken});
  const std::unique_lock lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) return kernel(Team{0, size(), &taken});
  const int core = pinned_ ? -1 : current_core();
  for (Helper& helper : helpers_) {
    if (core < 0 || helper.core.load(std::memory_order_relaxed) != core) continue;
    helper.forbidden.set(helper.thread, core);
    helper.core.store(-1, std::memory_order_relaxed);
  }
  kernel_ = &kernel;
  taken_ = 0;
  finished_.store(0, std::memory_order_relaxed);
  const uint32_t number = (gate_.load(std::memory_order_relaxed) & ~(kNumber - 1)) + kNumber;
  gate_.store(number | kOpen, std::memory_order_release);
  gate_.notify_all();
  kernel(Team{0, size(), &taken_});
  const uint32_t joined = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & kJoined;
  for (uint32_t finished = finished_.load(std::memory_order_acquire); finished < joined;
       finished = finished_.load(std::memory_order_acquire)) {
    wait_for_change(finished_, finished);
  }
}

void Pool::help(Helper& helper, int64_t index) {
  for (uint32_t seen = 0;;) {
    uint32_t gate = gate_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    if ((gate & kOpen) == 0 || gate / kNumber == seen / kNumber) {
      helper.core.store(current_core(), std::memory_order_relaxed);
      // Asleep for as many kernels as there are numbers, it would miss one: nobody waits for it.
      wait_for_change(gate_, gate);
      continue;
    }
    if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
    seen = gate;
    (*kernel_)(Team{index, size(), &taken_});
    finished_.fetch_add(1, std::memory_order_acq_rel);
    finished_.notify_one();
  }
}

}  // namespace nf
