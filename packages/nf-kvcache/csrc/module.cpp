// pybind11 module nf_kvcache._native. Arrays are checked here, everything else by what they are handed to.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "prefix_index.h"

namespace py = pybind11;

namespace {

using nf::PrefixIndex;

// An array of one dimension of T, copied only if its elements are not side by side. A count of -1 takes any.
template <typename T>
py::array_t<T, py::array::c_style> vector_of(const py::array& array, const char* name, const char* dtype,
                                             int64_t count) {
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 1 || (count >= 0 && array.shape(0) != count)) {
    throw std::invalid_argument(std::string(name) + " is " + std::string(py::str(array.dtype())) + " " +
                                std::string(py::str(array.attr("shape"))) + "; expected " + dtype + " [" +
                                (count < 0 ? "n" : std::to_string(count)) + "].");
  }
  return py::array_t<T, py::array::c_style>::ensure(array);
}

template <typename T>
py::array_t<T> copy_of(const T* values, std::vector<py::ssize_t> shape) {
  py::array_t<T> array(std::move(shape));
  if (array.size() > 0) std::memcpy(array.mutable_data(), values, static_cast<std::size_t>(array.nbytes()));
  return array;
}

py::tuple walk(PrefixIndex& index, const py::bytes& salt, const py::array& tokens) {
  const auto checked = vector_of<int32_t>(tokens, "tokens", "int32", -1);
  const auto& path = index.walk(std::string_view(salt), checked.data(), checked.size());
  const auto count = static_cast<py::ssize_t>(path.nodes.size());
  const int32_t* pages = path.pages.empty() ? nullptr : path.pages.data()->data();
  return py::make_tuple(copy_of(path.nodes.data(), {count}),
                        copy_of(pages, {count, static_cast<py::ssize_t>(nf::kNumTiers)}));
}

int64_t extend(PrefixIndex& index, int64_t node, const py::array& tokens) {
  return index.extend(node, vector_of<int32_t>(tokens, "tokens", "int32", index.page_size()).data());
}

py::tuple advance(PrefixIndex& index, const py::array& nodes, const py::array& tokens, int64_t tier,
                  const py::array& pages) {
  const auto held = vector_of<int64_t>(nodes, "nodes", "int64", -1);
  const auto count = held.size();
  const auto keys = vector_of<int32_t>(tokens, "tokens", "int32", count * index.page_size());
  const auto targets = vector_of<int32_t>(pages, "pages", "int32", count);
  py::array_t<int64_t> longer = copy_of(held.data(), {count});
  py::array_t<bool> placed(count);
  index.advance(longer.mutable_data(), keys.data(), tier, targets.data(), placed.mutable_data(), count);
  return py::make_tuple(longer, placed);
}

py::array_t<int32_t> tokens(const PrefixIndex& index, int64_t node) {
  const int32_t* values = index.tokens(node);
  return copy_of(values, {values == nullptr ? 0 : static_cast<py::ssize_t>(index.page_size())});
}

bool holds(const PrefixIndex& index, const py::array& nodes, int64_t tier, const py::array& pages) {
  const auto names = vector_of<int64_t>(nodes, "nodes", "int64", -1);
  const auto expected = vector_of<int32_t>(pages, "pages", "int32", names.size());
  return index.holds(names.data(), tier, expected.data(), names.size());
}

py::array_t<int64_t> nodes(const PrefixIndex& index) {
  const auto names = index.nodes();
  return copy_of(names.data(), {static_cast<py::ssize_t>(names.size())});
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native part of nf_kvcache; use it through nf_kvcache.index.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const nf::NodeGone& error) {
      py::set_error(PyExc_KeyError, error.what());
    }
  });

  py::class_<PrefixIndex>(m, "PrefixIndex", "See nf_kvcache.index.PrefixIndex.")
      .def(py::init<int64_t, int64_t>(), py::arg("page_size"), py::arg("hash_bits") = 64)
      .def_property_readonly("page_size", &PrefixIndex::page_size)
      .def("__len__", &PrefixIndex::size)
      .def("walk", &walk, py::arg("salt"), py::arg("tokens"))
      .def("root", [](PrefixIndex& index, const py::bytes& salt) { return index.root(std::string_view(salt)); },
           py::arg("salt"))
      .def("extend", &extend, py::arg("node"), py::arg("tokens"))
      .def("place", &PrefixIndex::place, py::arg("node"), py::arg("tier"), py::arg("page"))
      .def("displace", &PrefixIndex::displace, py::arg("node"), py::arg("tier"))
      .def("page", &PrefixIndex::page, py::arg("node"), py::arg("tier"))
      .def("hold", &PrefixIndex::hold, py::arg("node"))
      .def("unhold", &PrefixIndex::unhold, py::arg("node"))
      .def("advance", &advance, py::arg("nodes"), py::arg("tokens"), py::arg("tier"), py::arg("pages"))
      .def("parent", &PrefixIndex::parent, py::arg("node"))
      .def("salt", [](const PrefixIndex& index, int64_t node) { return py::bytes(index.salt(node)); }, py::arg("node"))
      .def("tokens", &tokens, py::arg("node"))
      .def("num_children", &PrefixIndex::num_children, py::arg("node"))
      .def("holders", &PrefixIndex::holders, py::arg("node"))
      .def("is_alive", &PrefixIndex::is_alive, py::arg("node"))
      .def("holds", &holds, py::arg("nodes"), py::arg("tier"), py::arg("pages"))
      .def("nodes", &nodes)
      .def("check_integrity", &PrefixIndex::check_integrity);
}
