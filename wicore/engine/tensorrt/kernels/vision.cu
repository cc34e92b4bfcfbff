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

// Grid: rows. wide half [grid][to] = narrow half [grid][from] and zeros behind it.
extern "C" __global__ void __launch_bounds__(128) widen_rows(const half* narrow, half* wide, int from, int to) {
  pdl_launch();
  pdl_wait();
  const half* source = narrow + static_cast<long long>(blockIdx.x) * from;
  half* target = wide + static_cast<long long>(blockIdx.x) * to;
  for (int i = static_cast<int>(threadIdx.x); i < to; i += 128) target[i] = i < from ? source[i] : __float2half_rn(0.0f);
}

// Grid: tiles of 32 columns, then of 32 rows. target half [columns][rows] = source half [rows][columns], transposed.
extern "C" __global__ void __launch_bounds__(256)
    transpose(const half* source, half* target, int rows, int columns) {
  __shared__ half tile[32][33];
  pdl_launch();
  pdl_wait();
  const int x = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32;
  const int row0 = static_cast<int>(blockIdx.y) * 32, column0 = static_cast<int>(blockIdx.x) * 32;
  for (int y = first; y < 32; y += 8)
    if (row0 + y < rows && column0 + x < columns)
      tile[y][x] = source[static_cast<long long>(row0 + y) * columns + column0 + x];
  __syncthreads();
  for (int y = first; y < 32; y += 8)
    if (column0 + y < columns && row0 + x < rows)
      target[static_cast<long long>(column0 + y) * rows + row0 + x] = tile[x][y];
}
