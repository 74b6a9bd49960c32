#include "path_kernels.h"

const baton::Path* baton::path_avx512(bool bf16) {
  static const Path paths[] = {make_path<Float32>("avx512"), make_path<BFloat16>("avx512")};
  return &paths[bf16];
}
