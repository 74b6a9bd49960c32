#include "path_kernels.h"

const baton::Path* baton::path_avx2(bool bf16) {
  static const Path paths[] = {make_path<Float32>("avx2"), make_path<BFloat16>("avx2")};
  return &paths[bf16];
}
