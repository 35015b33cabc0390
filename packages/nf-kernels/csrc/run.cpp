#include "run.h"

#include <cstddef>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "clock.h"

namespace nf {
namespace {

// Two runs must come in the same order on all lanes that they share, or each would wait for the other.
std::mutex& order_of_runs() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

Run::Run(std::shared_ptr<const Schedule> schedule, std::vector<Span> spans, std::vector<Input> inputs, Call on_call)
    : schedule_(std::move(schedule)),
      spans_(std::move(spans)),
      inputs_(std::move(inputs)),
      on_call_(std::move(on_call)),
      events_(static_cast<std::size_t>(schedule_->most_events())),
      times_(static_cast<std::size_t>(schedule_->num_nodes())) {}

std::shared_ptr<Run> Run::start(std::shared_ptr<const Schedule> schedule, const std::vector<Lane*>& lanes,
                                std::vector<Span> spans, std::vector<Input> inputs, Call on_call) {
  if (static_cast<int64_t>(lanes.size()) != schedule->num_lanes()) {
    throw std::invalid_argument("lanes has " + std::to_string(lanes.size()) + "; expected " +
                                std::to_string(schedule->num_lanes()) + ", as the schedule has commands for");
  }
  for (std::size_t i = 0; i < lanes.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (lanes[i] != lanes[j]) continue;
      throw std::invalid_argument("lanes[" + std::to_string(i) + "] is lanes[" + std::to_string(j) +
                                  "], too; expected every lane once");
    }
  }
  const std::shared_ptr<Run> run(
      new Run(std::move(schedule), std::move(spans), std::move(inputs), std::move(on_call)));
  run->check_nodes();
  const std::lock_guard lock(order_of_runs());
  for (std::size_t i = 0; i < lanes.size(); ++i) {
    lanes[i]->submit_always([run, i, lane = lanes[i]] { run->walk(i, *lane); });
  }
  run->end_ = lanes.front()->record();
  return run;
}

void Run::check_nodes() const {
  if (static_cast<int64_t>(spans_.size()) < schedule_->num_spans()) {
    throw std::invalid_argument("spans has " + std::to_string(spans_.size()) + "; expected " +
                                std::to_string(schedule_->num_spans()) + " or more, as the schedule numbers them");
  }
  if (static_cast<int64_t>(inputs_.size()) != schedule_->num_inputs()) {
    throw std::invalid_argument("inputs has " + std::to_string(inputs_.size()) + " tensors; expected " +
                                std::to_string(schedule_->num_inputs()) + ", as the program declares");
  }
  for (std::size_t i = 0; i < schedule_->nodes().size(); ++i) {
    const Schedule::Node& node = schedule_->nodes()[i];
    const Span& span = spans_[static_cast<std::size_t>(node.span)];
    if (span.num_rows == 0) continue;
    try {
      node.block->check(span, inputs_);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("spans[" + std::to_string(node.span) + "] does not fit node " + std::to_string(i) +
                                  ": " + error.what());
    }
  }
}

void Run::walk(std::size_t number, Lane& lane) {
  const std::string earlier = lane.error();
  if (number == 0) {
    if (!earlier.empty()) stopped_.store(true, std::memory_order_release);
    begun_.set();
  } else {
    begun_.wait();
    if (!earlier.empty()) stop("lanes[" + std::to_string(number) + "] had failed before: " + earlier);
  }
  for (const LaneCommand& command : schedule_->commands(number)) {
    const std::size_t event = static_cast<std::size_t>(command.argument);
    switch (command.code) {
      case Code::kLaunch:
        if (!stopped_.load(std::memory_order_acquire)) launch(command.argument, lane.threads());
        break;
      case Code::kWait:
        events_[event].wait();
        break;
      case Code::kSignal:
        events_[event].set();
        break;
    }
  }
  if (number > 0) {
    ended_.fetch_add(1, std::memory_order_acq_rel);
    ended_.notify_all();
    return;
  }
  const uint32_t others = static_cast<uint32_t>(schedule_->num_lanes()) - 1;
  for (uint32_t ended = ended_.load(std::memory_order_acquire); ended < others;
       ended = ended_.load(std::memory_order_acquire)) {
    wait_for_change(ended_, ended);
  }
  if (has_error_.load(std::memory_order_acquire)) throw std::runtime_error(error_);
}

void Run::launch(int64_t node, Threads& threads) {
  const Schedule::Node& what = schedule_->nodes()[static_cast<std::size_t>(node)];
  const Span& span = spans_[static_cast<std::size_t>(what.span)];
  if (span.num_rows == 0) return;
  try {
    const int64_t start = steady_nanoseconds();
    what.block->launch({node, span, inputs_, on_call_}, threads);
    times_[static_cast<std::size_t>(node)] = {start, steady_nanoseconds()};
  } catch (const std::exception& error) {
    stop(error.what());
  }
}

void Run::stop(const std::string& error) {
  if (has_error_.exchange(true, std::memory_order_acq_rel)) return;
  error_ = error;
  stopped_.store(true, std::memory_order_release);
}

}  // namespace nf
