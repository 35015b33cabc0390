#include "bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "lane.h"

namespace py = pybind11;

namespace nf {
namespace {

// A lane ends without the GIL: what it still has to run may want it.
template <typename ThreadsOf>
std::shared_ptr<Lane> make_lane(ThreadsOf threads) {
  return std::shared_ptr<Lane>(new Lane(std::move(threads)), [](Lane* lane) {
    const py::gil_scoped_release release;
    delete lane;
  });
}

// Queues a call of a Python function, which holds the GIL for as long as it runs.
void call_on_lane(Lane& lane, py::function function) {
  const std::shared_ptr<py::function> held(new py::function(std::move(function)), [](py::function* last) {
    const py::gil_scoped_acquire gil;
    delete last;
  });
  lane.submit([held] { call_python([&] { (*held)(); }); });
}

}  // namespace

void bind_lanes(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Event, std::shared_ptr<Event>>(m, "Event")
      .def("done", &Event::done)
      .def("wait", &Event::wait, release())
      .def("failed", &Event::failed)
      .def("time", &Event::time);
  py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane")
      .def(py::init(&make_lane<std::vector<int>>), py::arg("cores"))
      .def_static("of_threads", &make_lane<int64_t>, py::arg("threads"))
      .def("record", &Lane::record)
      .def("wait", &Lane::wait)
      .def("synchronize", &Lane::synchronize, release())
      .def("error", &Lane::error)
      .def("call", &call_on_lane)
      .def_property_readonly("cores", &Lane::cores);
  m.def("set_current_lane", [](Lane* lane) { current_lane() = lane; }, py::arg("lane").none(true));
}

}  // namespace nf
