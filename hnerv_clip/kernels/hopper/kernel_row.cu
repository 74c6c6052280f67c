// The products of pixels with a kernel row's weights, from a stage in shared memory: BM + 8 pixels,
// CHUNK blocks of channels, and weights [W8][WP]. Each wgmma takes 16 values of k: two blocks, of
// one pixel or, where the number of blocks is odd, of two.

#ifdef RGB_FORWARD
constexpr int W8 = K * Y8, SUMS = 4 * W8;  // the kernel's rows are columns of the product
#else
constexpr int W8 = INPUT_GRADIENT ? X8 : Y8, SUMS = YC / 2;  // accumulators of a thread
#endif
constexpr int RUN = K * (INPUT_GRADIENT ? YC : XC);  // weights [W8][RUN][8] a row
constexpr int CHUNKS = (X8 + CHUNK - 1) / CHUNK;
constexpr int XP = BM + 8, WP = RUN + (INPUT_GRADIENT ? 0 : 8);  // from block to block
constexpr int X_BYTES = 16 * XP * CHUNK, W_BYTES = 16 * WP * (INPUT_GRADIENT ? CHUNK : W8);

// Adds the products of COUNT blocks of a kernel row to a warpgroup's accumulators, of 64 pixels
template <int COUNT>
__device__ inline void multiply(float (&sum)[1][SUMS], unsigned x, unsigned w, bool add) {
#if INPUT_GRADIENT  // the result's channels are a kernel column's rows of weights
#pragma unroll
  for (int kx = 0; kx < K; kx++)
#pragma unroll
    for (int c = 0; c < COUNT; c += 2, add = true)
      WGMMA(sum[0], make_smem_desc(x + 16 * (c * XP + kx), XP, 8),
            make_smem_desc(w + 16 * (c * WP + (K - 1 - kx) * YC), WP, 8), add);
#else
  constexpr int PAIRED = COUNT % 2 ? K / 2 * 2 : 0;  // columns taken two at a time
#pragma unroll
  for (int kx = 0; kx < PAIRED; kx += 2)
#pragma unroll
    for (int c = 0; c < COUNT; c++, add = true)
      WGMMA(sum[0], make_smem_desc(x + 16 * (c * XP + kx), 1, 8),
            make_smem_desc(w + 16 * (kx * XC + c * 8), XC, WP), add);
#pragma unroll
  for (int kx = PAIRED; kx < K; kx++)
#pragma unroll
    for (int c = 0; c < COUNT; c += 2, add = true)  // a last one alone meets weights of 0
      WGMMA(sum[0], make_smem_desc(x + 16 * (c * XP + kx), c + 1 < COUNT ? XP : 1, 8),
            make_smem_desc(w + 16 * (kx * XC + c * 8), 8, WP), add);
#endif
}
