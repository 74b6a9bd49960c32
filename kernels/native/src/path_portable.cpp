#include "path_kernels.h"

const baton::Path* baton::path_portable(bool bf16) {
  static const Path paths[] = {make_path<Float32>("portable"), make_path<BFloat16>("portable")};
  return &paths[bf16];
}
