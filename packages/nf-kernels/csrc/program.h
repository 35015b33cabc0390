// Programs: operations that are written down once and launched again and again, on some of their rows.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "operands.h"
#include "threads.h"

namespace nf {

using Call = std::function<void(int64_t node)>;

// What a launch is given beside the block.
struct Launch {
  int64_t node;
  const Span& span;
  const std::vector<Input>& inputs;
  const Call& on_call;  // in place of the blocks' own calls; may be empty
};

class Block {
 public:
  virtual ~Block() = default;
  // Throws std::invalid_argument when the span is outside of what was recorded, or of the inputs.
  virtual void check(const Span& span, const std::vector<Input>& inputs) const = 0;
  // Runs it; the span was checked. What it throws stops the run.
  virtual void launch(const Launch& launch, Threads& threads) const = 0;
};

template <typename Operation>
class OperationBlock : public Block {
 public:
  OperationBlock(const Operation& operation, const std::vector<Input>& declared) : operation_(operation) {
    FindInputs find(declared);
    operation_.operands(find);
    inputs_ = find.numbers();
  }

  void check(const Span& span, const std::vector<Input>& inputs) const override { part(span, inputs); }

  void launch(const Launch& launch, Threads& threads) const override { part(launch.span, launch.inputs).run(threads); }

 private:
  Operation part(const Span& span, const std::vector<Input>& inputs) const {
    Operation result = operation_;
    Slice slice(span, inputs, inputs_);
    result.operands(slice);
    return result;
  }

  Operation operation_;
  InputNumbers inputs_;
};

class CallBlock : public Block {
 public:
  explicit CallBlock(Call call) : call_(std::move(call)) {}

  void check(const Span&, const std::vector<Input>&) const override {}

  void launch(const Launch& launch, Threads&) const override {
    (launch.on_call ? launch.on_call : call_)(launch.node);
  }

 private:
  Call call_;
};

// Blocks do not move, and none is removed: lanes read them while others are added.
class Program {
 public:
  // Declares a tensor that stands for one given anew at every run; returns its number.
  int64_t add_input(const Input& placeholder);
  // Returns the number of the block.
  int64_t add_block(std::unique_ptr<const Block> block);

  int64_t num_inputs() const { return static_cast<int64_t>(inputs_.size()); }
  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  const std::vector<Input>& inputs() const { return inputs_; }
  const Block& block(int64_t number) const { return *blocks_[static_cast<std::size_t>(number)]; }

 private:
  std::vector<Input> inputs_;
  std::vector<std::unique_ptr<const Block>> blocks_;
};

// While it exists, operations of this thread are written down and not run.
class Recording {
 public:
  explicit Recording(const Program& program);
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  // This thread's; null: none.
  static Recording* current();

  // Writes an operation down. One without operands cannot be: it is dropped.
  template <typename Operation>
  void add(const Operation& operation) {
    if constexpr (requires(Operation& o, FindInputs& find) { o.operands(find); }) {
      blocks_.push_back(std::make_unique<OperationBlock<Operation>>(operation, program_.inputs()));
    }
  }

  // What was written down.
  std::vector<std::unique_ptr<const Block>> take() { return std::move(blocks_); }

 private:
  const Program& program_;
  Recording* outer_;
  std::vector<std::unique_ptr<const Block>> blocks_;
};

}  // namespace nf
