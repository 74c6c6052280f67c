"""Our own kernels, in Triton and, for Hopper GPUs, in CUDA; and how they are launched."""
