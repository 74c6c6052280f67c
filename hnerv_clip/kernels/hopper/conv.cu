// A convolution forward, with activation and pixel shuffle, or its input's gradient.
//
// An implicit matrix product: a tile is BM neighbouring pixels of x and all YC channels of the
// result. A thread block loops over the kernel's rows; a stage holds BM + 8 pixels and the row's
// weights, all channels of x or CHUNK blocks of them at a time. Macros: INPUT_GRADIENT 0 or 1;
// CHUNK; and for 0 ACT, SH, SW, CG, CN, EDGE as in `conv.conv_forward`, and whether OUT_BLOCKED.

constexpr int STEPS = K * CHUNKS, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int ROW = 16 * Y8;  // bytes of a pixel's results on their way out
static_assert(STAGES * (STAGE_BYTES + 16) + CONSUMER_WARPS * 8 * ROW == SHARED,
              "hopper.shared_bytes");

#ifdef ACT
__device__ inline float activate(float x) {
  float density;
  if (ACT == GELU) return x * normal_cdf(x, density);
  if (ACT == RELU) return fmaxf(x, 0.f);
  return ACT == SIN ? sinf(x) : __fdividef(x, 1.f + __expf(-x));
}
#endif

// pre [pixels][YC] and bias may be absent; out of INPUT_GRADIENT is [images, rows, columns][YC]
struct Epilogue {
  const float* bias;
  bf16 *pre, *out;
  unsigned char* memory;  // 8 · ROW bytes of each warp
  int pixels;

  // 16 pixels of a warp, 8 at a time
  __device__ inline void store(const float (&sum)[SUMS], int start) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned char* row = memory + warp * 8 * ROW;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int first = start + warp * 16 + half * 8;
      __syncwarp();
#pragma unroll
      for (int j = 0; j < Y8; j++) {
        float a = sum[4 * j + 2 * half], b = sum[4 * j + 2 * half + 1];
        if (!INPUT_GRADIENT) {
          float2 add = *reinterpret_cast<const float2*>(bias + 8 * j + lane % 4 * 2);
          a += add.x, b += add.y;
        }
        *reinterpret_cast<unsigned*>(row + lane / 4 * ROW + 16 * j + lane % 4 * 4) =
            pack_bf16x2(a, b);
      }
      __syncwarp();
#if INPUT_GRADIENT  // the edges' results are left out
      for (int u = lane; u < 8 * Y8; u += 32) {
        const Position at(first + u / Y8, pixels);
        if (!at.inside) continue;
        long long to = ((long long)at.image * (HEIGHT - 2 * P) + at.y) * (WIDTH - 2 * P) + at.x;
        *reinterpret_cast<uint4*>(out + to * YC + u % Y8 * 8) =
            *reinterpret_cast<uint4*>(row + u / Y8 * ROW + u % Y8 * 16);
      }
#else
      if (pre)
        for (int u = lane; u < 8 * Y8; u += 32)
          if (first + u / Y8 < pixels)
            *reinterpret_cast<uint4*>(pre + (long long)first * YC + u * 8) =
                *reinterpret_cast<uint4*>(row + u / Y8 * ROW + u % Y8 * 16);
      constexpr int N8 = CN / 8, OUT_WIDTH = (WIDTH - 2 * P) * SW + 2 * EDGE;
      constexpr int OUT_HEIGHT = (HEIGHT - 2 * P) * SH + 2 * EDGE;
      const long long plane = (long long)(pixels / (WIDTH * HEIGHT)) * OUT_WIDTH * OUT_HEIGHT;
#pragma unroll
      for (int n = 0; n < (8 * SH * SW * N8 + 31) / 32; n++) {  // in the order of memory
        const int u = lane + 32 * n;
        const int c = OUT_BLOCKED ? u / (8 * SW * SH) : u % N8, j = (OUT_BLOCKED ? u : u / N8) % SW;
        const int i = OUT_BLOCKED ? u / (8 * SW) % SH : u / (N8 * SW) % SH;
        const int pixel = first + (OUT_BLOCKED ? u / SW % 8 : u / (N8 * SW * SH));
        const Position at(pixel, pixels);
        if (!at.inside || u >= 8 * SH * SW * N8) continue;
        const unsigned* from = reinterpret_cast<const unsigned*>(
            row + (pixel - first) * ROW + ((i * SW + j) * CG + c * 8) * 2);
        unsigned to[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
          to[k] = c * 8 + 2 * k < CG
                      ? pack_bf16x2(activate(low(from[k])), activate(high(from[k]))) : 0;
        long long cell = ((long long)at.image * OUT_HEIGHT + at.y * SH + i + EDGE) * OUT_WIDTH +
                         at.x * SW + j + EDGE;
        *reinterpret_cast<uint4*>(out + 8 * (OUT_BLOCKED ? c * plane + cell : cell * N8 + c)) =
            make_uint4(to[0], to[1], to[2], to[3]);
      }
#endif
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * CONSUMER_WARPS + 128, 1)
convolve(const bf16* x, const bf16* weight, const float* bias, bf16* pre, bf16* out, int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = smem_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (pixels + BM - 1) / BM;
  const int block_tiles = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  const int total = block_tiles * STEPS;

  clear_smem(memory, STAGES * STAGE_BYTES);  // also what is never copied
  Pipeline pipeline;
  pipeline.init(stages + STAGES * STAGE_BYTES + CONSUMER_WARPS * 8 * ROW);

  if (warp >= CONSUMER_WARPS) {
    warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
    for (int i = 0; i < (warp == CONSUMER_WARPS ? total : 0); i++) {
      const int ky = i % STEPS / CHUNKS, c8 = i % CHUNKS * CHUNK;  // its first channel block
      const int x_blocks = min(CHUNK, X8 - c8), w_blocks = INPUT_GRADIENT ? x_blocks : W8;
      const unsigned stage = stages + i % STAGES * STAGE_BYTES;
      const long long first = (long long)(blockIdx.x + i / STEPS * gridDim.x) * BM;
      const bf16* from = x + 8 * (first + (ky - P) * WIDTH - P);
      const int row = (INPUT_GRADIENT ? K - 1 - ky : ky) * W8 + (INPUT_GRADIENT ? c8 : 0);
      const bf16* weights = weight + 8 * RUN * row;
      pipeline.producer_acquire(i, 16 * ((BM + 8) * x_blocks + RUN * w_blocks));
      for (int c = lane; c < x_blocks + w_blocks; c += 32)
        if (c < x_blocks)
          pipeline.copy(i, stage + 16 * XP * c, from + 8ll * (c8 + c) * pixels, 16 * (BM + 8));
        else
          pipeline.copy(i, stage + X_BYTES + 16 * WP * (c - x_blocks),
                        weights + 8 * RUN * (c - x_blocks), 16 * RUN);
    }
  } else {
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    Epilogue epilogue{bias, pre, out, memory + STAGES * STAGE_BYTES, pixels};
    float sum[1][SUMS];
    for (int i = 0; i < total;) {
      const int start = (blockIdx.x + i / STEPS * gridDim.x) * BM;
      for (int ky = 0; ky < K; ky++) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++, i++) {
          const unsigned stage = stages + i % STAGES * STAGE_BYTES;
          pipeline.consumer_wait(i);
          wgmma_fence();
          const bool add = ky || chunk;
          if (chunk < CHUNKS - 1)
            multiply<CHUNK>(sum, stage + 16 * 64 * (warp / 4), stage + X_BYTES, add);
          else
            multiply<X8 - (CHUNKS - 1) * CHUNK>(sum, stage + 16 * 64 * (warp / 4), stage + X_BYTES,
                                                add);
          wgmma_commit_group();
          wgmma_wait_group<1>();
          if (add) pipeline.consumer_release(i - 1);
        }
      }
      wgmma_wait_all(sum);
      pipeline.consumer_release(i - 1);
      epilogue.store(sum[0], start);
    }
  }
}
