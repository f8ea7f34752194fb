#include "gemm.h"

#define MOLEX_PRODUCT(NAME, TURNED) \
  MOLEX_VERSIONS(NAME,              \
                 (const float* a,   \
                  int64_t lda,      \
                  const float* b,   \
                  int64_t ldb,      \
                  float* c,         \
                  int64_t ldc,      \
                  int64_t rows,     \
                  int64_t columns,  \
                  int64_t depth,    \
                  bool add),        \
                 product_of<kLanes, kMany, TURNED>(a, lda, b, ldb, c, ldc, rows, columns, depth, add);)

namespace molex {

MOLEX_PRODUCT(product, false)
MOLEX_PRODUCT(product_turned, true)

}  // namespace molex
