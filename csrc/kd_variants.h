// The forward kernels of kd_cuda.cu by name, for those who want to choose: the tests. kd_forward_cuda picks by shape.
#pragma once

#include "kd.h"

namespace mtkd_fast {

const char* kd_forward_in_registers(const KDForward<float>&, int device, void* stream);
// A row in so many blocks, of so many warps or more. Of one block, the kernel of short rows or that of long ones.
struct KDShape {
  int blocks;
  bool is_short;
  int warps;
};
const char* kd_forward_in_shared_memory(const KDForward<float>&, KDShape, int device, void* stream);
const char* kd_forward_streaming(const KDForward<float>&, int device, void* stream);
const char* kd_forward_of_pixels(const KDForward<float>&, int device, void* stream);
const char* kd_forward_streaming_of_pixels(const KDForward<float>&, int device, void* stream);

// Where a row lies in shared memory: so many blocks of so many threads, room for so many rows as they come.
struct KDPlacement {
  int blocks, threads, places;
  int64_t shared_bytes;
};
KDPlacement kd_placement(const KDForward<float>&, int device);

}  // namespace mtkd_fast
