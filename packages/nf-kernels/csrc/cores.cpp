#include "cores.h"

#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <pthread.h>
#endif

namespace nf {

#if defined(__linux__)

int current_core() { return sched_getcpu(); }

void pin(std::thread& thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(core), &set);
  if (const int error = pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set)) {
    throw std::runtime_error("core " + std::to_string(core) + " cannot be had: " + std::strerror(error));
  }
}

void ForbiddenCore::set(std::thread& thread, int core) {
  cpu_set_t allowed;
  if (pthread_getaffinity_np(thread.native_handle(), sizeof(allowed), &allowed) != 0) return;
  if (core_ >= 0 && CPU_EQUAL(&allowed, &allowed_)) CPU_SET(static_cast<std::size_t>(core_), &allowed);
  CPU_CLR(static_cast<std::size_t>(core), &allowed);
  if (CPU_COUNT(&allowed) == 0) return;
  if (pthread_setaffinity_np(thread.native_handle(), sizeof(allowed), &allowed) != 0) return;
  core_ = core;
  allowed_ = allowed;
}

#else

int current_core() { return -1; }
void pin(std::thread&, int) {}
void ForbiddenCore::set(std::thread&, int) {}

#endif

}  // namespace nf
