// The threads that run one kernel together.
//
// A kernel is a function that every thread of a team calls with the same arguments. The work is cut into tasks, which
// the threads take one after the other; some may come late or not at all, and the others do everything.
#pragma once

#include <cstdint>

namespace nf {

struct Team {
  int64_t index;   // of this thread, 0 to size - 1
  int64_t size;
  int64_t* taken;  // tasks taken so far, shared by the team; 0 when the kernel starts
};

namespace {

// The next of the kernel's tasks, which the team takes one by one; the caller stops at their number.
inline int64_t next_task(const Team& team) {
  return __atomic_fetch_add(team.taken, 1, __ATOMIC_RELAXED);
}

// Some of the rows of a kernel whose task is a number of rows.
struct RowRange {
  int64_t first, end;
};

// Takes the next rows, about as many as are worth taking at a time; none are left when `first` is `num_rows`.
inline RowRange next_rows(const Team& team, int64_t num_rows, int64_t width) {
  constexpr int64_t kElements = 1 << 14;
  const int64_t rows = width >= kElements ? 1 : kElements / (width > 0 ? width : 1);
  const int64_t first = next_task(team) * rows;
  if (first >= num_rows) return {num_rows, num_rows};
  return {first, first + rows < num_rows ? first + rows : num_rows};
}

}  // namespace
}  // namespace nf
