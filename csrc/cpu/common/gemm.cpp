#include "cpu/common/gemm.h"

#define MOLEX_PRODUCT(NAME, ...)   \
  MOLEX_VERSIONS(NAME,             \
                 (const float* a,  \
                  int64_t lda,     \
                  const float* b,  \
                  int64_t ldb,     \
                  float* c,        \
                  int64_t ldc,     \
                  int64_t rows,    \
                  int64_t columns, \
                  int64_t depth,   \
                  bool add),       \
                 __VA_ARGS__(a, lda, b, ldb, c, ldc, rows, columns, depth, add);)

namespace molex {

MOLEX_PRODUCT(product, product_of<kLanes, kMany, false>)
MOLEX_PRODUCT(product_turned, product_of<kLanes, kMany, true>)
MOLEX_PRODUCT(product_inner, inner_of<kLanes, kMany>)

}  // namespace molex
