// A weight gradient: sums over pixels, split-K.
//
// A tile is ROWS8 rows of 8 channels of x at (kernel row, kernel column), all channels of y, and
// one split of the pixels. Its x comes through registers, so that each warp can take any two of
// those rows. With FOLD, for few channels of y, the kernel's rows are columns of the product: y is
// moved against x by lines, and x is copied and read once for all of them.

constexpr int KERNEL_ROWS = FOLD ? 1 : K, N8 = FOLD ? K * Y8 : Y8;  // of x; columns / 8
constexpr int ALL8 = KERNEL_ROWS * K * X8, TILES = (ALL8 + ROWS8 - 1) / ROWS8, T = ROWS8 / 16;
constexpr int MOST = (ROWS8 + K * X8 - 2) / (K * X8) + 1;  // kernel rows that ROWS8 touch
constexpr int LINES = MOST < KERNEL_ROWS ? MOST : KERNEL_ROWS;
constexpr int XP = BM + 8, Y_BYTES = 16 * BM * N8, LINE_BYTES = 16 * XP * X8;
constexpr int STAGE_BYTES = Y_BYTES + LINES * LINE_BYTES;
static_assert(STAGES * (STAGE_BYTES + 16) == SHARED, "hopper.shared_bytes");

// out: partial sums [splits], each as the weights lie
extern "C" __global__ void __launch_bounds__(32 * CONSUMER_WARPS + 128, 1)
convolve(const bf16* x, const bf16* dy, const float*, float* out, void*, int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = smem_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile = blockIdx.x % TILES, split = blockIdx.x / TILES, splits = gridDim.x / TILES;
  const int first = tile * ROWS8 / (K * X8), lines = min(LINES, KERNEL_ROWS - first);
  const int steps = (pixels + BM - 1) / BM, each = (steps + splits - 1) / splits;
  const int start = split * each, total = min(each, steps - start);

  Pipeline pipeline;
  pipeline.init(stages + STAGES * STAGE_BYTES);
  if (warp >= CONSUMER_WARPS) {
    warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
    for (int i = 0; i < (warp == CONSUMER_WARPS ? total : 0); i++) {
      const unsigned stage = stages + i % STAGES * STAGE_BYTES;
      const long long pixel = (long long)(start + i) * BM;
      pipeline.producer_acquire(i, Y_BYTES + lines * LINE_BYTES);
      for (int c = lane; c < N8 + lines * X8; c += 32) {
        const int ky = FOLD ? (c < N8 ? P - c / Y8 : 0) : (c < N8 ? 0 : first + (c - N8) / X8 - P);
        const long long at = pixel + ky * WIDTH;
        if (c < N8)
          pipeline.copy(i, stage + 16 * BM * c, dy + 8 * (c % Y8 * (long long)pixels + at),
                        16 * BM);
        else
          pipeline.copy(i, stage + Y_BYTES + 16 * XP * (c - N8),
                    x + 8 * ((c - N8) % X8 * (long long)pixels + at - P), 16 * XP);
      }
    }
  } else {
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    unsigned from[T];  // this lane's row of the four 8×8 matrices that make 16 rows of x
#pragma unroll
    for (int m = 0; m < T; m++) {
      int row8 = tile * ROWS8 + (warp / 4 * T + m) * 8 + warp % 4 * 2 + lane / 8 % 2;
      if (row8 >= ALL8) row8 = tile * ROWS8;
      from[m] = Y_BYTES + (row8 / (K * X8) - first) * LINE_BYTES +
                16 * (row8 % X8 * XP + row8 / X8 % K + lane / 16 * 8 + lane % 8);
    }
    float sum[T][4 * N8] = {};
    for (int i = 0; i < total; i++) {
      unsigned stage = stages + i % STAGES * STAGE_BYTES;
      pipeline.consumer_wait(i);
#pragma unroll
      for (int k = 0; k < BM / 16; k++) {
        unsigned rows[T][4];
        wgmma_wait_group<3>();  // those four steps ago had these registers
#pragma unroll
        for (int m = 0; m < T; m++)
          ldmatrix_x4_trans(rows[m], stage + from[m] + 256 * k);
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < T; m++)
          WGMMA_REGISTERS(sum[m], rows[m], make_smem_desc(stage + 256 * k, 8, BM), true);
        wgmma_commit_group();
      }
      if (i) pipeline.consumer_release_loads(i - 1);
    }
    wgmma_wait_all(sum);
#pragma unroll
    for (int m = 0; m < T; m++)
#pragma unroll
      for (int j = 0; j < 2 * N8; j++) {
        int row8 = tile * ROWS8 + (warp / 4 * T + m) * 8 + warp % 4 * 2 + j % 2;
        if (row8 < ALL8) {
          int ky = row8 / (K * X8), line = row8 % (K * X8) * 8 + lane / 4;
          long long to = ((long long)(split * K + ky) * Y8 + j / 2) * (K * XC) + line;
          *reinterpret_cast<float2*>(out + to * 8 + lane % 4 * 2) =
              make_float2(sum[m][2 * j], sum[m][2 * j + 1]);
        }
      }
  }
}
