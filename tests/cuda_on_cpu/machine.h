// What a test sets on the machine before it runs kernels.

#pragma once

#include <cstdint>

namespace molex::device {

// Barriers are numbered as a thread meets them, those of a kind for themselves: some warps do not take part
// in what others synchronise among their lanes.
enum Kind { kBlock, kWarpLanes, kCopies, kFences, kProducts, kKinds };

struct Options {
  uint64_t seed = 1;  // of the order in which fibers run
  // Every thread passes its barrier of this kind and number without waiting.
  int left_out_kind = -1, left_out_barrier = -1;
};

// Whether clusters of blocks have room, from now on.
void set_clusters(bool fit);
// Whether there are products by warp groups, from now on.
void set_warp_groups(bool exist);

void set_options(const Options& options);

// The largest number of barriers of a kind that a thread has met since the options were set.
int most_barriers(int kind);

}  // namespace molex::device
