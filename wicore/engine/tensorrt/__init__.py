"""The TensorRT engine: weight-free segment plans, our own kernels around a paged cache, CUDA graphs."""
