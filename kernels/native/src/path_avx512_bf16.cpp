#include "path_kernels.h"

const baton::Path* baton::path_avx512_bf16(bool bf16) {
  static const Path paths[] = {make_path<Float32>("avx512_bf16"), make_path<BFloat16>("avx512_bf16")};
  return &paths[bf16];
}
