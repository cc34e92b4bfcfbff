// The way of an image into the vision tower.
// variant:
#include "common.cuh"

// Grid: patches, row by row. patches half [grid][3 * side * side], channel by channel and in it row by row, as the
// weights of a convolution lie: pixels uint8 [size][size][3] from -1 (0) to 1 (255).
extern "C" __global__ void __launch_bounds__(128)
    cut_patches(const unsigned char* pixels, half* patches, int size, int side) {
  pdl_launch();
  pdl_wait();
  const int patch = static_cast<int>(blockIdx.x), across = size / side, plane = side * side;
  const long long corner = (static_cast<long long>(patch / across) * size + patch % across) * side;
  half* target = patches + static_cast<long long>(patch) * 3 * plane;
  for (int i = static_cast<int>(threadIdx.x); i < 3 * plane; i += 128) {
    const int channel = i / plane, y = i % plane / side, x = i % side;
    const float value = pixels[(corner + static_cast<long long>(y) * size + x) * 3 + channel];
    target[i] = __float2half_rn((value / 255.0f - 0.5f) / 0.5f);
  }
}
