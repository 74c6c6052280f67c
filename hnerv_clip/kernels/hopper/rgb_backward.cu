// Backward pass of the RGB head, the last activation and the last pixel shuffle.
//
// A tile is the pixels of SH lines, BM wide, that were one line before the shuffle. Their gradients
// come from LINES lines of the frame's, eight values a pixel; each wgmma takes two pixels of a
// line. Macros: ACT, SH, SW, CG as in `rgb_head.rgb_backward`; EDGE of pre and dpre; YC, the
// channels of a pixel.

constexpr int H = HEIGHT - 2 * P, W = WIDTH - 2 * P, CO = SH * SW * CG, LINES = SH + 2 * P;
constexpr int STRIPS = (W + BM - 1) / BM, LOW_WIDTH = W / SW + 2 * EDGE;
constexpr int LOW_PLANE = (H / SH + 2 * EDGE) * LOW_WIDTH;
constexpr int XP = BM + 8, WP = (K + 1) * YC;  // a line of pixels; a kernel row, the last column 0
constexpr int PRE_BYTES = BM / SW * CO * 2, STAGE_BYTES = PRE_BYTES + LINES * 16 * XP;
static_assert(STAGES * (STAGE_BYTES + 16) + 16 * K * WP == SHARED, "hopper.shared_bytes");

__device__ inline float activation_grad(float x) {
  if (ACT == GELU) {
    float density;
    const float cdf = normal_cdf(x, density);
    return cdf + x * density * 0.3989422804014327f;
  }
  if (ACT == RELU) return x > 0 ? 1.f : 0.f;
  if (ACT == SIN) return cosf(x);
  const float s = __fdividef(1.f, 1.f + __expf(-x));
  return s + x * s * (1 - s);
}

// pre [images, .., ..][CO], dpre channel-blocked; dbias [thread blocks, CONSUMER_WARPS, CO]
extern "C" __global__ void __launch_bounds__(32 * CONSUMER_WARPS + 128, 1)
convolve(const bf16* drgb, const bf16* weight, const bf16* pre, bf16* dpre, float* dbias,
         int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = smem_address(memory), weights = stages + STAGES * STAGE_BYTES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int images = pixels / (WIDTH * HEIGHT), tiles = images * (H / SH) * STRIPS;
  const int total = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;

  clear_smem(memory + STAGES * STAGE_BYTES, 16 * K * WP);
  __syncthreads();
  for (int i = threadIdx.x; i < K * K * YC; i += blockDim.x) {  // columns from the last
    const int ky = i / (K * YC), kx = i / YC % K;
    reinterpret_cast<uint4*>(memory + STAGES * STAGE_BYTES)[ky * WP + i % (K * YC)] =
        reinterpret_cast<const uint4*>(weight)[(ky * K + K - 1 - kx) * YC + i % YC];
  }
  Pipeline pipeline;
  pipeline.init(weights + 16 * K * WP);

  float bias[SH][YC / 4] = {};
  for (int i = 0; i < total; i++) {
    const int tile = blockIdx.x + i * gridDim.x, image = tile / STRIPS / (H / SH);
    const int y = tile / STRIPS % (H / SH), strip = tile % STRIPS * BM;
    const int corner = image * LOW_PLANE + (y + EDGE) * LOW_WIDTH + strip / SW + EDGE;
    const int stage = i % STAGES * STAGE_BYTES;
    if (warp == CONSUMER_WARPS) {
      pipeline.producer_acquire(i, STAGE_BYTES);
      if (lane < LINES)
        pipeline.copy(i, stages + stage + PRE_BYTES + 16 * XP * lane,
                  drgb + 8 * (((long long)image * HEIGHT + y * SH + lane) * WIDTH + strip),
                  16 * XP);
      else if (lane == LINES)
        pipeline.copy(i, stages + stage, pre + (long long)corner * CO, PRE_BYTES);
    } else if (warp < CONSUMER_WARPS) {
      pipeline.consumer_wait(i);
#pragma unroll
      for (int line = 0; line < SH; line++) {
        float sum[1][YC / 2];
        wgmma_fence();
#pragma unroll
        for (int ky = 0; ky < K; ky++)
#pragma unroll
          for (int kx = 0; kx < K; kx += 2)
            WGMMA(sum[0], make_smem_desc(stages + stage + PRE_BYTES + 16 * (
                              (line + K - 1 - ky) * XP + warp / 4 * 64 + kx), 1, 8),
                  make_smem_desc(weights + 16 * (ky * WP + kx * YC), YC, 8), ky || kx);
        wgmma_commit_group();
        wgmma_wait_all(sum);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int pixel = warp * 16 + lane / 4 + 8 * half;
          if (strip + pixel >= W) continue;
          const int first = (line * SW + pixel % SW) * CG;
#pragma unroll
          for (int j = 0; j < Y8; j++) {
            const int c = 8 * j + lane % 4 * 2, co = first + c;
            if (c >= CG) continue;
            const unsigned both = load_bf16x2(memory + stage + (pixel / SW * CO + co) * 2);
            const float a = sum[0][4 * j + 2 * half] * activation_grad(low(both));
            const float b = sum[0][4 * j + 2 * half + 1] * activation_grad(high(both));
            bias[line][2 * j] += a, bias[line][2 * j + 1] += b;
            *reinterpret_cast<unsigned*>(
                dpre + 8 * ((long long)(co / 8) * images * LOW_PLANE + corner + pixel / SW) +
                co % 8) = pack_bf16x2(a, b);
          }
        }
      }
      pipeline.consumer_release_loads(i);
    }
  }
  if (warp >= CONSUMER_WARPS) return;
#pragma unroll
  for (int line = 0; line < SH; line++)
#pragma unroll
    for (int n = 0; n < YC / 4; n++) {
      float sum = bias[line][n];
      for (int other = 4 * SW; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
      const int c = n / 2 * 8 + lane % 4 * 2 + n % 2;
      if (lane < 4 * SW && c < CG)
        dbias[(blockIdx.x * CONSUMER_WARPS + warp) * CO + (line * SW + lane / 4) * CG + c] = sum;
    }
}
