#include "lane.h"

#include <exception>
#include <stdexcept>
#include <utility>

#include "clock.h"

namespace nf {
namespace {

std::vector<int> all_but_first(const std::vector<int>& cores) {
  if (cores.empty()) throw std::invalid_argument("cores is empty; expected at least one");
  return {cores.begin() + 1, cores.end()};
}

int64_t at_least_one(int64_t threads) {
  if (threads < 1) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; expected 1 or more");
  }
  return threads;
}

}  // namespace

void Event::set(bool failed) {
  failed_ = failed;
  time_.store(steady_nanoseconds(), std::memory_order_release);
  time_.notify_all();
}

void Event::wait() const { wait_for_change<int64_t>(time_, 0); }

Lane::Lane(std::vector<int> cores)
    : cores_(std::move(cores)),
      helpers_(static_cast<int64_t>(cores_.size()) - 1, all_but_first(cores_)),
      leader_(&Lane::lead, this) {
  try {
    pin(leader_, cores_.front());
  } catch (...) {
    finish();
    throw;
  }
}

Lane::Lane(int64_t threads) : helpers_(at_least_one(threads) - 1), leader_(&Lane::lead, this) {}

Lane::~Lane() { finish(); }

void Lane::finish() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  pushed_.fetch_add(1, std::memory_order_release);
  pushed_.notify_one();
  leader_.join();
}

void Lane::push(Queued queued) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(queued));
  }
  pushed_.fetch_add(1, std::memory_order_release);
  pushed_.notify_one();
}

void Lane::submit(std::function<void()> command) { push({std::move(command), false}); }

void Lane::submit_always(std::function<void()> command) { push({std::move(command), true}); }

std::shared_ptr<Event> Lane::record() {
  auto event = std::make_shared<Event>();
  push({[this, event] { event->set(!error().empty()); }, true});
  return event;
}

void Lane::wait(std::shared_ptr<Event> event) {
  push({[event = std::move(event)] { event->wait(); }, true});
}

void Lane::synchronize() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
  if (!error_.empty()) throw std::invalid_argument(std::exchange(error_, {}));
}

std::string Lane::error() {
  const std::lock_guard lock(mutex_);
  return error_;
}

void Lane::lead() {
  for (;;) {
    const uint32_t pushed = pushed_.load(std::memory_order_acquire);
    Queued queued;
    {
      const std::lock_guard lock(mutex_);
      busy_ = !queue_.empty();
      if (busy_) {
        queued = std::move(queue_.front());
        queue_.pop_front();
        if (!error_.empty() && !queued.after_error) continue;
      } else if (closing_) {
        return;
      }
    }
    if (!queued.command) {
      changed_.notify_all();
      wait_for_change(pushed_, pushed);
      continue;
    }
    try {
      queued.command();
    } catch (const std::exception& error) {
      const std::lock_guard lock(mutex_);
      if (error_.empty()) error_ = error.what();
    }
  }
}

Lane*& current_lane() {
  thread_local Lane* lane = nullptr;
  return lane;
}

}  // namespace nf
