// A lane of a CPU: threads that run commands in order, beside other lanes and whoever gives the commands.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"

namespace nf {

// A point in a lane's order of commands.
class Event {
 public:
  bool done() const { return time_.load(std::memory_order_acquire) != 0; }
  void wait() const;
  // Nanoseconds of the steady clock at which the lane came to the event; 0 before.
  int64_t time() const { return time_.load(std::memory_order_acquire); }
  // Whether something had failed on the lane before it came to the event; to be asked when it is done.
  bool failed() const { return failed_; }
  void set(bool failed);

 private:
  bool failed_ = false;  // written before the time
  std::atomic<int64_t> time_{0};
};

class Lane {
 public:
  // Starts one thread per core, each pinned to its own. Throws std::runtime_error when a core cannot be had.
  explicit Lane(std::vector<int> cores);
  // Starts so many threads, on whatever cores the system puts them.
  explicit Lane(int64_t threads);
  // Finishes what was submitted.
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // Queues a command, which runs its kernels on the lane's threads. What it throws is the lane's error, after which commands
  // are dropped until `synchronize` has told of it.
  void submit(std::function<void()> command);
  // As `submit`, for a command that runs after an error, too: others wait for what it does.
  void submit_always(std::function<void()> command);
  std::shared_ptr<Event> record();
  // What is submitted from now on runs after the event.
  void wait(std::shared_ptr<Event> event);
  // Blocks until the lane is idle; throws std::invalid_argument with its error, if there is one.
  void synchronize();
  // The lane's error, if there is one by now, which stays: commands are dropped until `synchronize` has told of it.
  std::string error();

  // For the lane's commands alone.
  Threads& threads() { return helpers_; }

  const std::vector<int>& cores() const { return cores_; }

 private:
  struct Queued {
    std::function<void()> command;
    bool after_error;  // whether it runs even so: an event that somebody may be waiting for
  };
  void push(Queued queued);
  void lead();
  void finish();

  std::vector<int> cores_;
  Pool helpers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Queued> queue_;
  bool busy_ = false;
  bool closing_ = false;
  std::string error_;
  std::atomic<uint32_t> pushed_{0};  // commands so far
  std::thread leader_;
};

// The lane that this thread's operations go to; null: they run at once.
Lane*& current_lane();

}  // namespace nf
