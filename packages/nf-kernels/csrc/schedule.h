// In which order, and on which lanes, blocks of a program are launched.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"

namespace nf {

enum class Code : int32_t { kLaunch = 0, kWait = 1, kSignal = 2 };

// The argument is a node to launch, or an event to wait for or to signal.
struct LaneCommand {
  Code code;
  int32_t argument;
};

// A node is a launch of a block on one of the spans that a run is given.
class Schedule {
 public:
  struct Node {
    const Block* block;
    int64_t span;
  };

  // Throws std::invalid_argument when an index is out of range, a node is launched twice, an event is not signalled exactly
  // once if somebody waits for it, or lanes would wait for each other for ever.
  Schedule(std::shared_ptr<const Program> program, std::vector<std::vector<LaneCommand>> lanes,
           const std::vector<int32_t>& blocks, const std::vector<int32_t>& spans);

  int64_t num_lanes() const { return static_cast<int64_t>(lanes_.size()); }
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size()); }
  // Events are numbered below this: each node may have one for its start and one for its end.
  int64_t most_events() const { return 2 * num_nodes(); }
  int64_t num_spans() const { return num_spans_; }
  int64_t num_inputs() const { return program_->num_inputs(); }
  const std::vector<LaneCommand>& commands(std::size_t lane) const { return lanes_[lane]; }
  const std::vector<Node>& nodes() const { return nodes_; }

 private:
  void check_commands() const;
  void check_progress() const;

  std::shared_ptr<const Program> program_;  // has the blocks
  std::vector<std::vector<LaneCommand>> lanes_;
  std::vector<Node> nodes_;
  int64_t num_spans_ = 0;  // that a run must be given, at least
};

}  // namespace nf
