"""Kernels in C++ for processors with AVX512-BF16, compiled on the machine that runs them."""
