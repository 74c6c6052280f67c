"""Our own kernels, one file for each operation, forward and backward; and how they are launched.

In Triton; for large images on Hopper GPUs also in CUDA, see `hopper`. `launch` and
`compile_workers` compile and run both, `tiles` cuts their work into programs, `async_fence` adds to
Triton's products a fence that its older versions leave out.

Tensors lie channels-last: [B, H, W, C], written [N, C] where N = B·H·W. Activations are bfloat16
(float32 in Triton's interpreter, which has no bfloat16 products), sums and weight gradients
float32. Inputs of convolutions carry an edge of K//2 zeros on each side, so that no load asks where
the image ends, and lie with a guard of zeros around them. Sums over pixels are written as partial
sums [S, …], one per program, and added in a fixed order. Where `hopper` computes a convolution, its
input and the gradient at its output have the channel-blocked layout [C / 8, PLANE, 8] with PLANE
pixels; PLANE is 0 for channels last.
"""
