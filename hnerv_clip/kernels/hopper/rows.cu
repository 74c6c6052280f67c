// The products of pixels with a kernel row's weights, from copies in shared memory: of BM + 8
// pixels, PART units of channels at a time, and of weights [W8][WP]. Each wgmma takes 16 values of
// the sum: two units, of one pixel or, where the number of units is odd, of two.

#ifdef RGB
constexpr int W8 = K * Y8, SUMS = 4 * W8;  // the kernel's rows are columns of the product
#else
constexpr int W8 = BACK ? X8 : Y8, SUMS = YC / 2;  // sums of a thread
#endif
constexpr int RUN = K * (BACK ? YC : XC);  // weights [W8][RUN][8] a row
constexpr int UNITS = PART, PARTS = (X8 + UNITS - 1) / UNITS;
constexpr int XP = BM + 8, WP = RUN + (BACK ? 0 : 8);  // from unit to unit
constexpr int X_BYTES = 16 * XP * UNITS, W_BYTES = 16 * WP * (BACK ? UNITS : W8);

// Adds the products of COUNT units of a kernel row to the sums of a warp group's 64 pixels
template <int COUNT>
__device__ inline void multiply(float (&sum)[1][SUMS], unsigned x, unsigned w, bool more) {
#if BACK  // the result's channels are a kernel column's rows of weights
#pragma unroll
  for (int kx = 0; kx < K; kx++)
#pragma unroll
    for (int c = 0; c < COUNT; c += 2, more = true)
      WGMMA(sum[0], operand(x + 16 * (c * XP + kx), XP, 8),
            operand(w + 16 * (c * WP + (K - 1 - kx) * YC), WP, 8), more);
#else
  constexpr int PAIRED = COUNT % 2 ? K / 2 * 2 : 0;  // columns taken two at a time
#pragma unroll
  for (int kx = 0; kx < PAIRED; kx += 2)
#pragma unroll
    for (int c = 0; c < COUNT; c++, more = true)
      WGMMA(sum[0], operand(x + 16 * (c * XP + kx), 1, 8),
            operand(w + 16 * (kx * XC + c * 8), XC, WP), more);
#pragma unroll
  for (int kx = PAIRED; kx < K; kx++)
#pragma unroll
    for (int c = 0; c < COUNT; c += 2, more = true)  // a last one alone meets weights of 0
      WGMMA(sum[0], operand(x + 16 * (c * XP + kx), c + 1 < COUNT ? XP : 1, 8),
            operand(w + 16 * (kx * XC + c * 8), 8, WP), more);
#endif
}
