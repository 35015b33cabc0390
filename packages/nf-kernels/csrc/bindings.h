// What Python sees of lanes, and of programs that run on them.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

namespace nf {

void bind_lanes(pybind11::module_& m);
void bind_programs(pybind11::module_& m);

// Calls Python from a thread of a lane. What it raises becomes a std::runtime_error, which is read without the GIL.
template <typename Function>
void call_python(const Function& function) {
  const pybind11::gil_scoped_acquire gil;
  try {
    function();
  } catch (const pybind11::error_already_set& error) {
    throw std::runtime_error(error.what());
  }
}

}  // namespace nf
