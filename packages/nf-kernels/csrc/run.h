// One run of a schedule on some lanes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lane.h"
#include "schedule.h"
#include "waiting.h"

namespace nf {

// Every lane has a part of the run. That of the first lane is the frame: no other begins before it, and it ends after all
// others, so that runs with the same first lane come one after the other, and an event that is recorded behind it tells
// that the run is over.
//
// The first thing that a launch throws is the run's error: nothing is launched after it, but all lanes go on waiting and
// signalling. In the end it is the first lane's error. Where that lane has one already, nothing is launched at all.
class Run {
 public:
  // Queues a run. `on_call` and the calls of the program's blocks must stay valid until it is over.
  //
  // Throws std::invalid_argument when there are too few spans or inputs, a node's span is outside of what its block was
  // recorded with or of the inputs, or a lane is there twice.
  static std::shared_ptr<Run> start(std::shared_ptr<const Schedule> schedule, const std::vector<Lane*>& lanes,
                                    std::vector<Span> spans, std::vector<Input> inputs, Call on_call);

  // The end, on the first lane.
  const std::shared_ptr<Event>& end() const { return end_; }
  // Whether something was not launched, or was in vain; to be asked when it is over.
  bool failed() const { return stopped_.load(std::memory_order_acquire); }
  // Start and end of each node in nanoseconds of the steady clock, 0 where it did not run; to be asked when it is over.
  const std::vector<std::pair<int64_t, int64_t>>& times() const { return times_; }

 private:
  Run(std::shared_ptr<const Schedule> schedule, std::vector<Span> spans, std::vector<Input> inputs, Call on_call);

  void check_nodes() const;
  void walk(std::size_t number, Lane& lane);
  void launch(int64_t node, Threads& threads);
  void stop(const std::string& error);

  std::shared_ptr<const Schedule> schedule_;
  std::vector<Span> spans_;
  std::vector<Input> inputs_;
  Call on_call_;
  std::shared_ptr<Event> end_;

  Flag begun_;                      // the first lane has come to its part
  std::atomic<uint32_t> ended_{0};  // parts of other lanes
  std::vector<Flag> events_;
  std::vector<std::pair<int64_t, int64_t>> times_;

  std::atomic<bool> has_error_{false};
  std::string error_;  // written by who has set has_error_, before stopped_
  std::atomic<bool> stopped_{false};
};

}  // namespace nf
