// Batches of reads and writes through io_uring.
#include <errno.h>
#include <liburing.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace {

// What a read that meets the end of the file reports.
constexpr int kShort = ENODATA;

[[noreturn]] void raise_os_error(int error, const std::string& what) {
  py::object type = py::module_::import("builtins").attr("OSError");
  PyErr_SetObject(type.ptr(), py::make_tuple(error, what).ptr());
  throw py::error_already_set();
}

struct Transfer {
  int fd;
  std::uint64_t offset;
  char* data;
  std::size_t size;
  int error = 0;
};

class Ring {
 public:
  explicit Ring(unsigned depth) : depth_(depth) {
    const int error = open();
    if (error != 0) raise_os_error(error, "io_uring_setup failed");
  }

  ~Ring() { close(); }

  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  std::vector<int> run(bool write,
                       const std::vector<std::tuple<int, std::int64_t, py::buffer>>& requests) {
    std::vector<py::buffer_info> views;
    std::vector<Transfer> transfers;
    views.reserve(requests.size());
    transfers.reserve(requests.size());
    for (const auto& [fd, offset, buffer] : requests) {
      views.push_back(buffer.request(/*writable=*/!write));
      const py::buffer_info& view = views.back();
      if (view.ndim != 1 || view.strides[0] != view.itemsize) {
        throw py::value_error("A buffer is not one contiguous row; expected uint8 [n].");
      }
      if (offset < 0) {
        throw py::value_error("An offset is " + std::to_string(offset) +
                    "; expected at least 0.");
      }
      transfers.push_back({fd, static_cast<std::uint64_t>(offset),
                 static_cast<char*>(view.ptr),
                 static_cast<std::size_t>(view.size * view.itemsize)});
    }
    {
      py::gil_scoped_release release;
      std::lock_guard<std::mutex> guard(mutex_);
      transfer(write, transfers);
    }
    std::vector<int> errors;
    errors.reserve(transfers.size());
    for (const Transfer& item : transfers) errors.push_back(item.error);
    return errors;
  }

  void close() {
    if (is_open_) io_uring_queue_exit(&ring_);
    is_open_ = false;
  }

 private:
  int open() {
    const int result = io_uring_queue_init(depth_, &ring_, 0);
    is_open_ = result == 0;
    return -result;
  }

  void transfer(bool write, std::vector<Transfer>& transfers) {
    // A ring that failed was closed; this is the next chance.
    const int error = is_open_ ? 0 : open();
    std::vector<std::size_t> todo;  // a stack: the first request on top
    for (std::size_t i = transfers.size(); i-- > 0;) todo.push_back(i);
    std::size_t in_kernel = 0;
    int failed = error;
    while (failed == 0 && (!todo.empty() || in_kernel > 0 || io_uring_sq_ready(&ring_) > 0)) {
      prepare(write, transfers, todo, in_kernel);
      failed = submit(in_kernel);
      if (failed == 0) failed = reap(write, transfers, todo, in_kernel);
    }
    if (failed == 0) return;
    // The kernel may still be using buffers: nothing returns before it has let go of all.
    while (in_kernel > 0) {
      if (reap(write, transfers, todo, in_kernel) != 0) break;
    }
    for (Transfer& item : transfers) {
      if (item.size > 0 && item.error == 0) item.error = failed;
    }
    close();
  }

  void prepare(bool write, const std::vector<Transfer>& transfers, std::vector<std::size_t>& todo,
         std::size_t in_kernel) {
    while (!todo.empty() && in_kernel + io_uring_sq_ready(&ring_) < depth_) {
      io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
      if (sqe == nullptr) return;
      const std::size_t index = todo.back();
      todo.pop_back();
      const Transfer& item = transfers[index];
      // A length has 32 bits; what is left over goes into a second request.
      const auto size = static_cast<unsigned>(std::min<std::size_t>(item.size, 1u << 30));
      if (write) {
        io_uring_prep_write(sqe, item.fd, item.data, size, item.offset);
      } else {
        io_uring_prep_read(sqe, item.fd, item.data, size, item.offset);
      }
      io_uring_sqe_set_data64(sqe, index);
    }
  }

  // Hands over what was prepared and waits for a completion; 0 or an errno. What the kernel does
  // not take now, because it is short of something, is handed over the next time.
  int submit(std::size_t& in_kernel) {
    for (;;) {
      const int result = io_uring_submit_and_wait(&ring_, 1);
      if (result >= 0) {
        in_kernel += static_cast<std::size_t>(result);
        if (in_kernel > 0) return 0;
      } else if (result != -EINTR && result != -EAGAIN && result != -EBUSY) {
        return -result;
      } else if (in_kernel > 0) {
        return 0;
      }
    }
  }

  // Takes every completion that is there, and at least one; 0 or an errno.
  int reap(bool write, std::vector<Transfer>& transfers, std::vector<std::size_t>& todo,
       std::size_t& in_kernel) {
    io_uring_cqe* cqe = nullptr;
    int result;
    do {
      result = io_uring_wait_cqe(&ring_, &cqe);
    } while (result == -EINTR || result == -EAGAIN);
    if (result < 0) return -result;
    while (cqe != nullptr) {
      const auto index = static_cast<std::size_t>(io_uring_cqe_get_data64(cqe));
      const int moved = cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
      --in_kernel;
      Transfer& item = transfers[index];
      if (moved == -EINTR || moved == -EAGAIN) {
        todo.push_back(index);
      } else if (moved < 0) {
        item.error = -moved;
      } else if (moved == 0 && item.size > 0) {
        item.error = write ? EIO : kShort;
      } else {
        item.data += moved;
        item.offset += static_cast<std::uint64_t>(moved);
        item.size -= static_cast<std::size_t>(moved);
        if (item.size > 0) todo.push_back(index);
      }
      if (io_uring_peek_cqe(&ring_, &cqe) != 0) cqe = nullptr;
    }
    return 0;
  }

  unsigned depth_;
  bool is_open_ = false;
  io_uring ring_{};
  std::mutex mutex_;
};

}  // namespace

PYBIND11_MODULE(_uring, module) {
  module.doc() = "Batches of reads and writes through io_uring.";
  py::class_<Ring>(module, "Ring",
           "A queue of requests to the kernel.\n\n"
           "Args:\n    depth: requests that may be under way at once, >= 1.\n\n"
           "Raises:\n    OSError: the kernel has no io_uring, or does not allow it.")
    .def(py::init<unsigned>(), py::arg("depth"))
    .def("run", &Ring::run, py::arg("write"), py::arg("requests"),
       "Transfer all of `requests`, and return when the last is done. Releases the GIL.\n\n"
       "Args:\n    write: from the buffers to the files, else from the files to the buffers."
       "\n    requests: (file descriptor, offset in bytes, buffer) each; uint8 [n], "
       "contiguous.\n\n"
       "Returns:\n    For each 0, or the errno why it failed; ENODATA where the file ends "
       "too early.");
}
