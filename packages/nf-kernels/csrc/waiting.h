// How threads wait for each other: a little while on the processor, as most changes come at once, then asleep.
#pragma once

#include <atomic>
#include <cstdint>

namespace nf {

// Waits a little while; returns whether `value` is no longer `old`.
template <typename T>
bool spin_for_change(const std::atomic<T>& value, T old) {
  constexpr int kSpins = 4000;
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return false;
}

// Waits until `value` is no longer `old`; who changes it notifies.
template <typename T>
void wait_for_change(const std::atomic<T>& value, T old) {
  if (spin_for_change(value, old)) return;
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Set once. Setting it is a system call only when somebody sleeps: the standard library's notify_all makes one for those
// who wait for other things, too.
class Flag {
 public:
  void set() {
    if (state_.exchange(kSet, std::memory_order_acq_rel) == kSleeping) state_.notify_all();
  }

  void wait() {
    if (spin_for_change<uint32_t>(state_, kOpen)) {
      if (state_.load(std::memory_order_acquire) == kSet) return;
    } else if (uint32_t open = kOpen; !state_.compare_exchange_strong(open, kSleeping) && open == kSet) {
      return;
    }
    while (state_.load(std::memory_order_acquire) != kSet) state_.wait(kSleeping, std::memory_order_acquire);
  }

 private:
  static constexpr uint32_t kOpen = 0, kSleeping = 1, kSet = 2;

  std::atomic<uint32_t> state_{kOpen};
};

}  // namespace nf
