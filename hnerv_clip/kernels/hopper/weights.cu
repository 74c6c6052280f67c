// A weight gradient: sums over pixels.
//
// A program takes BLOCK units of (kernel row, kernel column, channels of x), all channels of y and
// one share of the pixels. Its x comes through registers, so that each warp can take any two units.
// With FOLD, for few channels of y, the kernel's rows are columns of the product: y is moved
// against x by lines, and x is copied and read once for all of them.

constexpr int ROWS = FOLD ? 1 : K, YU = FOLD ? K * Y8 : Y8;  // rows in a program's x; units of y
constexpr int UNITS = ROWS * K * X8, BLOCKS = (UNITS + BLOCK - 1) / BLOCK, T = BLOCK / 16;
constexpr int MOST = (BLOCK + K * X8 - 2) / (K * X8) + 1;  // kernel rows that BLOCK units touch
constexpr int LINES = MOST < ROWS ? MOST : ROWS;
constexpr int XP = BM + 8, Y_BYTES = 16 * BM * YU, LINE_BYTES = 16 * XP * X8;
constexpr int STAGE_BYTES = Y_BYTES + LINES * LINE_BYTES;
static_assert(STAGES * (STAGE_BYTES + 16) == SHARED, "hopper.shared_bytes");

// out: partial sums [shares], each as the weights lie
extern "C" __global__ void __launch_bounds__(32 * WARPS + 128, 1)
convolve(const bf16* x, const bf16* dy, const float*, float* out, void*, int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = shared_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block = blockIdx.x % BLOCKS, share = blockIdx.x / BLOCKS, shares = gridDim.x / BLOCKS;
  const int first = block * BLOCK / (K * X8), lines = min(LINES, ROWS - first);  // kernel rows
  const int tiles = (pixels + BM - 1) / BM, each = (tiles + shares - 1) / shares;
  const int start = share * each, total = min(each, tiles - start);

  Ring ring;
  ring.open(stages + STAGES * STAGE_BYTES);
  if (warp >= WARPS) {
    give_registers<FEW>();
    for (int i = 0; i < (warp == WARPS ? total : 0); i++) {
      const unsigned stage = stages + i % STAGES * STAGE_BYTES;
      const long long pixel = (long long)(start + i) * BM;
      ring.expect(i, Y_BYTES + lines * LINE_BYTES);
      for (int c = lane; c < YU + lines * X8; c += 32) {
        const int ky = FOLD ? (c < YU ? P - c / Y8 : 0) : (c < YU ? 0 : first + (c - YU) / X8 - P);
        const long long at = pixel + ky * WIDTH;
        if (c < YU)
          ring.copy(i, stage + 16 * BM * c, dy + 8 * (c % Y8 * (long long)pixels + at), 16 * BM);
        else
          ring.copy(i, stage + Y_BYTES + 16 * XP * (c - YU),
                    x + 8 * ((c - YU) % X8 * (long long)pixels + at - P), 16 * XP);
      }
    }
  } else {
    take_registers<MANY>();
    unsigned from[T];  // this lane's row of the four 8×8 matrices that make 16 rows of x
#pragma unroll
    for (int m = 0; m < T; m++) {
      int unit = block * BLOCK + (warp / 4 * T + m) * 8 + warp % 4 * 2 + lane / 8 % 2;
      if (unit >= UNITS) unit = block * BLOCK;
      from[m] = Y_BYTES + (unit / (K * X8) - first) * LINE_BYTES +
                16 * (unit % X8 * XP + unit / X8 % K + lane / 16 * 8 + lane % 8);
    }
    float sum[T][4 * YU] = {};
    for (int i = 0; i < total; i++) {
      unsigned stage = stages + i % STAGES * STAGE_BYTES;
      ring.wait_full(i);
#pragma unroll
      for (int k = 0; k < BM / 16; k++) {
        unsigned rows[T][4];
        wait_products<3>();  // those four steps back had these registers
#pragma unroll
        for (int m = 0; m < T; m++)
          load_matrices(rows[m], stage + from[m] + 256 * k);
        begin_products();
#pragma unroll
        for (int m = 0; m < T; m++)
          WGMMA_REGISTERS(sum[m], rows[m], operand(stage + 256 * k, 8, BM), true);
        commit_products();
      }
      if (i) ring.leave(i - 1);
    }
    finish_products(sum);
#pragma unroll
    for (int m = 0; m < T; m++)
#pragma unroll
      for (int j = 0; j < 2 * YU; j++) {
        int unit = block * BLOCK + (warp / 4 * T + m) * 8 + warp % 4 * 2 + j % 2;
        if (unit < UNITS) {
          int ky = unit / (K * X8), line = unit % (K * X8) * 8 + lane / 4;  // of a unit of y
          long long to = ((long long)(share * K + ky) * Y8 + j / 2) * (K * XC) + line;
          *reinterpret_cast<float2*>(out + to * 8 + lane % 4 * 2) =
              make_float2(sum[m][2 * j], sum[m][2 * j + 1]);
        }
      }
  }
}
