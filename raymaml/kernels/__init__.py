"""Kernels in C++ for convolution, batch norm and max-pool, and the blocks of a network on them."""
