// What a test sets on the machine before it runs kernels.

#pragma once

#include <cstdint>

namespace molex::device {

struct Options {
  uint64_t seed = 1;          // of the order in which fibers run
  int left_out_barrier = -1;  // every thread passes its barrier of this number without waiting
};

void set_options(const Options& options);

// The largest number of barriers that a thread has met since the options were set.
int most_barriers();

}  // namespace molex::device
