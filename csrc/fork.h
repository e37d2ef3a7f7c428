// What a forked child needs that its parent alone can give.
#pragma once

namespace peftkernels {

// From now on a thread that forks lets go of its team of OpenMP threads just before, so that parent and child each make
// a new one when they need it. Threads do not live on in a child, and GNU's OpenMP does not notice: a child would wait
// for its parent's threads for ever, in these kernels and in torch's alike.
void release_threads_before_forks();

} // namespace peftkernels
