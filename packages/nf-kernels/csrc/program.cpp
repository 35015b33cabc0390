#include "program.h"

namespace nf {
namespace {

Recording*& current_recording() {
  thread_local Recording* recording = nullptr;
  return recording;
}

}  // namespace

int64_t Program::add_input(const Input& placeholder) {
  inputs_.push_back(placeholder);
  return num_inputs() - 1;
}

int64_t Program::add_block(std::unique_ptr<const Block> block) {
  blocks_.push_back(std::move(block));
  return num_blocks() - 1;
}

Recording::Recording(const Program& program) : program_(program), outer_(current_recording()) {
  current_recording() = this;
}

Recording::~Recording() { current_recording() = outer_; }

Recording* Recording::current() { return current_recording(); }

}  // namespace nf
