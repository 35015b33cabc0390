#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings.h"
#include "lane.h"
#include "program.h"
#include "run.h"
#include "schedule.h"

namespace py = pybind11;

namespace nf {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Rows of an array [n, width] as structs of as many numbers.
template <typename Row, typename T>
std::vector<Row> rows_of(const Array<T>& array) {
  static_assert(std::is_trivially_copyable_v<Row>);
  std::vector<Row> rows(static_cast<std::size_t>(array.nbytes()) / sizeof(Row));
  if (!rows.empty()) std::memcpy(rows.data(), array.data(), rows.size() * sizeof(Row));
  return rows;
}

// Python keeps the function for as long as it may be called.
Call borrowed(py::handle function) {
  return [function](int64_t node) { call_python([&] { function(node); }); };
}

// Calls what records one operation; the number of its block, or None where it has recorded none, or several.
std::optional<int64_t> record(Program& program, const py::function& operation) {
  Recording recording(program);
  operation();
  std::vector<std::unique_ptr<const Block>> blocks = recording.take();
  if (blocks.size() != 1) return std::nullopt;
  return program.add_block(std::move(blocks.front()));
}

std::shared_ptr<Schedule> make_schedule(std::shared_ptr<Program> program, const std::vector<Array<int32_t>>& lanes,
                                        const Array<int32_t>& blocks, const Array<int32_t>& spans) {
  std::vector<std::vector<LaneCommand>> commands;
  for (const Array<int32_t>& lane : lanes) commands.push_back(rows_of<LaneCommand>(lane));
  return std::make_shared<Schedule>(std::move(program), std::move(commands), rows_of<int32_t>(blocks),
                                    rows_of<int32_t>(spans));
}

std::shared_ptr<Run> start(std::shared_ptr<Schedule> schedule, const std::vector<Lane*>& lanes,
                           const Array<int64_t>& spans, const Array<int64_t>& inputs, const py::object& on_call) {
  std::vector<Span> span_rows = rows_of<Span>(spans);
  std::vector<Input> input_rows = rows_of<Input>(inputs);
  Call call = on_call.is_none() ? Call() : borrowed(on_call);
  const py::gil_scoped_release release;
  return Run::start(std::move(schedule), lanes, std::move(span_rows), std::move(input_rows), std::move(call));
}

py::array_t<int64_t> times(const Run& run) {
  const auto& pairs = run.times();
  py::array_t<int64_t> result({static_cast<py::ssize_t>(pairs.size()), py::ssize_t{2}});
  auto values = result.mutable_unchecked<2>();
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    values(static_cast<py::ssize_t>(i), 0) = pairs[i].first;
    values(static_cast<py::ssize_t>(i), 1) = pairs[i].second;
  }
  return result;
}

}  // namespace

void bind_programs(py::module_& m) {
  m.def("is_recording", [] { return Recording::current() != nullptr; });
  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init())
      .def("add_input",
           [](Program& program, uintptr_t address, int64_t rows, int64_t width, int64_t stride) {
             return program.add_input({address, rows, width, stride});
           })
      .def("record", &record)
      .def("call",
           [](Program& program, const py::function& function) {
             return program.add_block(std::make_unique<CallBlock>(borrowed(function)));
           })
      .def("schedule", &make_schedule);
  py::class_<Schedule, std::shared_ptr<Schedule>>(m, "Schedule").def("run", &start);
  py::class_<Run, std::shared_ptr<Run>>(m, "Run")
      .def_property_readonly("end", &Run::end)
      .def("failed", &Run::failed)
      .def("times", &times);
}

}  // namespace nf
