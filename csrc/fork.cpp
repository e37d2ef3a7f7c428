#include "fork.h"

// Other OpenMP libraries than GNU's look after forks themselves.
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && !defined(_WIN32)
#include <omp.h>
#include <pthread.h>

namespace peftkernels {

void release_threads_before_forks() {
  // Within a parallel region, which no team can be taken from, this does nothing.
  pthread_atfork([] { omp_pause_resource_all(omp_pause_hard); }, nullptr, nullptr);
}

} // namespace peftkernels

#else

namespace peftkernels {

void release_threads_before_forks() {}

} // namespace peftkernels

#endif
