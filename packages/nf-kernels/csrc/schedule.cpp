#include "schedule.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace nf {
namespace {

std::string place(std::size_t lane, std::size_t row) {
  return "commands[" + std::to_string(lane) + "][" + std::to_string(row) + "]";
}

}  // namespace

Schedule::Schedule(std::shared_ptr<const Program> program, std::vector<std::vector<LaneCommand>> lanes,
                   const std::vector<int32_t>& blocks, const std::vector<int32_t>& spans)
    : program_(std::move(program)), lanes_(std::move(lanes)) {
  if (lanes_.empty()) throw std::invalid_argument("commands is empty; expected the commands of at least one lane");
  if (blocks.size() != spans.size()) {
    throw std::invalid_argument("blocks has " + std::to_string(blocks.size()) + " nodes and spans " +
                                std::to_string(spans.size()) + "; expected as many");
  }
  for (std::size_t node = 0; node < blocks.size(); ++node) {
    if (blocks[node] < 0 || blocks[node] >= program_->num_blocks()) {
      throw std::invalid_argument("blocks[" + std::to_string(node) + "] is " + std::to_string(blocks[node]) +
                                  "; expected the number of one of the program's " +
                                  std::to_string(program_->num_blocks()) + " blocks");
    }
    if (spans[node] < 0) {
      throw std::invalid_argument("spans[" + std::to_string(node) + "] is " + std::to_string(spans[node]) +
                                  "; expected the number of one of a run's spans");
    }
    nodes_.push_back({&program_->block(blocks[node]), spans[node]});
    num_spans_ = std::max<int64_t>(num_spans_, spans[node] + 1);
  }
  check_commands();
  check_progress();
}

void Schedule::check_commands() const {
  std::vector<bool> launched(nodes_.size()), signalled(2 * nodes_.size());
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
    for (std::size_t row = 0; row < lanes_[lane].size(); ++row) {
      const auto [code, argument] = lanes_[lane][row];
      if (code != Code::kLaunch && code != Code::kWait && code != Code::kSignal) {
        throw std::invalid_argument(place(lane, row) + " has code " + std::to_string(static_cast<int32_t>(code)) +
                                    "; expected 0 (launch), 1 (wait) or 2 (signal)");
      }
      const int64_t end = code == Code::kLaunch ? num_nodes() : most_events();
      if (argument < 0 || argument >= end) {
        throw std::invalid_argument(place(lane, row) + " has argument " + std::to_string(argument) +
                                    "; expected less than " + std::to_string(end) +
                                    (code == Code::kLaunch ? ", the number of nodes" : ", twice the number of nodes"));
      }
      if (code == Code::kWait) continue;
      std::vector<bool>& seen = code == Code::kLaunch ? launched : signalled;
      if (seen[static_cast<std::size_t>(argument)]) {
        throw std::invalid_argument(place(lane, row) + (code == Code::kLaunch ? " launches node " : " signals event ") +
                                    std::to_string(argument) + " a second time; expected once in a schedule");
      }
      seen[static_cast<std::size_t>(argument)] = true;
    }
  }
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
    for (std::size_t row = 0; row < lanes_[lane].size(); ++row) {
      const auto [code, argument] = lanes_[lane][row];
      if (code == Code::kWait && !signalled[static_cast<std::size_t>(argument)]) {
        throw std::invalid_argument(place(lane, row) + " waits for event " + std::to_string(argument) +
                                    ", which no lane signals");
      }
    }
  }
}

// Walks all lanes as far as they come.
void Schedule::check_progress() const {
  std::vector<bool> signalled(2 * nodes_.size());
  std::vector<std::size_t> reached(lanes_.size());
  for (bool moved = true; moved;) {
    moved = false;
    for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
      for (; reached[lane] < lanes_[lane].size(); ++reached[lane], moved = true) {
        const auto [code, argument] = lanes_[lane][reached[lane]];
        if (code == Code::kWait && !signalled[static_cast<std::size_t>(argument)]) break;
        if (code == Code::kSignal) signalled[static_cast<std::size_t>(argument)] = true;
      }
    }
  }
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
    if (reached[lane] == lanes_[lane].size()) continue;
    throw std::invalid_argument(place(lane, reached[lane]) + " waits for event " +
                                std::to_string(lanes_[lane][reached[lane]].argument) +
                                ", which is signalled only after it; expected lanes that do not wait for each other");
  }
}

}  // namespace nf
