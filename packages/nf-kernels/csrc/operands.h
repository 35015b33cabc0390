// Which part of its operands a launch of a recorded operation works on.
//
// An operation shows its operands to a visitor, always in the same order. FindInputs learns which of them are declared
// inputs, and Slice moves all of them to the rows and requests of a launch.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace nf {

struct Span {
  int64_t first_row, num_rows, first_request, num_requests;
};

// A tensor that stands for one given anew at every run, or one that is given for it: [rows] or [rows, width].
struct Input {
  uintptr_t address;
  int64_t rows, width, stride;
};

// For each operand that may be an input, in their order: which one it is, or -1.
using InputNumbers = std::array<int, 3>;

class FindInputs {
 public:
  explicit FindInputs(const std::vector<Input>& declared) : declared_(declared) { numbers_.fill(-1); }

  const InputNumbers& numbers() const { return numbers_; }

  void num_rows(int64_t) {}
  void num_requests(int64_t) {}
  void one_row_per_request() {}
  template <typename T>
  void rows(T*, int64_t, int64_t) {}
  template <typename T>
  void row_values(const T* values) { find(values); }
  void request_values(const int32_t* values, int64_t = 0) { find(values); }
  void request_rows(const int32_t* values, int64_t, int64_t) { find(values); }

 private:
  void find(const void* address) {
    const auto is_it = [address](const Input& input) { return input.address == reinterpret_cast<uintptr_t>(address); };
    const auto found = std::find_if(declared_.begin(), declared_.end(), is_it);
    numbers_[operand_++] = found == declared_.end() ? -1 : static_cast<int>(found - declared_.begin());
  }

  const std::vector<Input>& declared_;
  InputNumbers numbers_;
  std::size_t operand_ = 0;
};

// Throws std::invalid_argument where the operation was recorded with fewer rows or requests than the span has, or an
// input has fewer.
class Slice {
 public:
  Slice(const Span& span, const std::vector<Input>& inputs, const InputNumbers& numbers)
      : span_(span), inputs_(inputs), numbers_(numbers) {}

  // The number of rows, and of requests, that the operation was recorded with.
  void num_rows(int64_t& count) {
    check_range("rows", span_.first_row, span_.num_rows, count, "the operation was recorded with");
    count = span_.num_rows;
  }
  void num_requests(int64_t& count) {
    check_range("requests", span_.first_request, span_.num_requests, count, "the operation was recorded with");
    count = span_.num_requests;
  }
  void one_row_per_request() {
    if (span_.num_rows == span_.num_requests) return;
    throw std::invalid_argument("a span has " + std::to_string(span_.num_rows) + " rows of " +
                                std::to_string(span_.num_requests) + " requests; expected one row per request");
  }

  // An operand with a row of elements for each row.
  template <typename T>
  void rows(T*& address, int64_t stride, int64_t element_bytes) {
    if (address) address = advanced(address, span_.first_row * stride * element_bytes);
  }

  // A number for each row.
  template <typename T>
  void row_values(const T*& values) {
    if (const Input* input = next_input()) {
      check_range("rows", span_.first_row, span_.num_rows, input->rows, "the run's input has");
      values = reinterpret_cast<const T*>(input->address);
    }
    values = advanced(values, span_.first_row * static_cast<int64_t>(sizeof(T)));
  }

  // A number for each request and `more` behind the last; null for none.
  void request_values(const int32_t*& values, int64_t more = 0) {
    if (const Input* input = next_input()) {
      check_range("requests", span_.first_request, span_.num_requests + more, input->rows, "the run's input has");
      values = reinterpret_cast<const int32_t*>(input->address);
    }
    if (values) values = advanced(values, span_.first_request * static_cast<int64_t>(sizeof(int32_t)));
  }

  // A row of numbers for each request.
  void request_rows(const int32_t*& values, int64_t& stride, int64_t& width) {
    if (const Input* input = next_input()) {
      check_range("requests", span_.first_request, span_.num_requests, input->rows, "the run's input has");
      values = reinterpret_cast<const int32_t*>(input->address);
      stride = input->stride;
      width = input->width;
    }
    values = advanced(values, span_.first_request * stride * static_cast<int64_t>(sizeof(int32_t)));
  }

 private:
  const Input* next_input() {
    const int number = numbers_[operand_++];
    return number < 0 ? nullptr : &inputs_[static_cast<std::size_t>(number)];
  }

  static void check_range(const char* what, int64_t first, int64_t count, int64_t have, const char* who) {
    if (first >= 0 && count >= 0 && first <= have - count) return;
    throw std::invalid_argument("a span takes " + std::to_string(count) + " " + what + " from " +
                                std::to_string(first) + " on; " + who + " " + std::to_string(have));
  }

  template <typename T>
  static T* advanced(T* address, int64_t bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes));
  }

  const Span& span_;
  const std::vector<Input>& inputs_;
  const InputNumbers& numbers_;
  std::size_t operand_ = 0;
};

}  // namespace nf
