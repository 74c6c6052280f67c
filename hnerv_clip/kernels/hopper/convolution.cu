// A convolution forward, with activation and pixel shuffle, or its input's gradient.
//
// A program takes BM neighbouring pixels of x and all YC channels of the result, and goes through
// the kernel's rows; of each it copies BM + 8 pixels and the row's weights, all channels of x or
// PART units of them at a time. Macros: BACK 0 or 1; PART; and for 0 ACT, SH, SW, CG, CN, EDGE as
// in `kernels.convolve`, and whether OUT_UNITS.

constexpr int STEPS = K * PARTS, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int ROW = 16 * Y8;  // bytes of a pixel's results on their way out
static_assert(STAGES * (STAGE_BYTES + 16) + WARPS * 8 * ROW == SHARED, "hopper.shared_bytes");

#ifdef ACT
__device__ inline float activate(float x) {
  float bell;
  if (ACT == GELU) return x * normal(x, bell);
  if (ACT == RELU) return fmaxf(x, 0.f);
  return ACT == SIN ? sinf(x) : __fdividef(x, 1.f + __expf(-x));
}
#endif

// pre [pixels][YC] and bias may be absent; out of the way back is [images, rows, columns][YC]
struct Result {
  const float* bias;
  bf16 *pre, *out;
  unsigned char* memory;  // 8 · ROW bytes of each warp
  int pixels;

  // 16 pixels of a warp, 8 at a time
  __device__ inline void write(const float (&sum)[SUMS], int start) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned char* row = memory + warp * 8 * ROW;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int first = start + warp * 16 + half * 8;
      __syncwarp();
#pragma unroll
      for (int j = 0; j < Y8; j++) {
        float a = sum[4 * j + 2 * half], b = sum[4 * j + 2 * half + 1];
        if (!BACK) {
          float2 add = *reinterpret_cast<const float2*>(bias + 8 * j + lane % 4 * 2);
          a += add.x, b += add.y;
        }
        *reinterpret_cast<unsigned*>(row + lane / 4 * ROW + 16 * j + lane % 4 * 4) = pack(a, b);
      }
      __syncwarp();
#if BACK  // the edges' results are left out
      for (int u = lane; u < 8 * Y8; u += 32) {
        const Place place(first + u / Y8, pixels);
        if (!place.inside) continue;
        long long to = ((long long)place.image * (HEIGHT - 2 * P) + place.y) * (WIDTH - 2 * P) +
                       place.x;
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
        const int c = OUT_UNITS ? u / (8 * SW * SH) : u % N8, j = (OUT_UNITS ? u : u / N8) % SW;
        const int i = OUT_UNITS ? u / (8 * SW) % SH : u / (N8 * SW) % SH;
        const int pixel = first + (OUT_UNITS ? u / SW % 8 : u / (N8 * SW * SH));
        const Place place(pixel, pixels);
        if (!place.inside || u >= 8 * SH * SW * N8) continue;
        const unsigned* from = reinterpret_cast<const unsigned*>(
            row + (pixel - first) * ROW + ((i * SW + j) * CG + c * 8) * 2);
        unsigned to[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
          to[k] = c * 8 + 2 * k < CG ? pack(activate(low(from[k])), activate(high(from[k]))) : 0;
        long long cell = ((long long)place.image * OUT_HEIGHT + place.y * SH + i + EDGE) *
                             OUT_WIDTH + place.x * SW + j + EDGE;
        *reinterpret_cast<uint4*>(out + 8 * (OUT_UNITS ? c * plane + cell : cell * N8 + c)) =
            make_uint4(to[0], to[1], to[2], to[3]);
      }
#endif
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS + 128, 1)
convolve(const bf16* x, const bf16* weight, const float* bias, bf16* pre, bf16* out, int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = shared_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (pixels + BM - 1) / BM;
  const int own_tiles = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  const int total = own_tiles * STEPS;

  clear(memory, STAGES * STAGE_BYTES);  // also what is never copied
  Ring ring;
  ring.open(stages + STAGES * STAGE_BYTES + WARPS * 8 * ROW);

  if (warp >= WARPS) {
    give_registers<FEW>();
    for (int i = 0; i < (warp == WARPS ? total : 0); i++) {
      const int ky = i % STEPS / PARTS, unit = i % PARTS * UNITS, units = min(UNITS, X8 - unit);
      const int w_units = BACK ? units : W8;
      const unsigned stage = stages + i % STAGES * STAGE_BYTES;
      const long long first = (long long)(blockIdx.x + i / STEPS * gridDim.x) * BM;
      const bf16* from = x + 8 * (first + (ky - P) * WIDTH - P);
      const bf16* weights = weight + 8 * RUN * ((BACK ? K - 1 - ky : ky) * W8 + (BACK ? unit : 0));
      ring.expect(i, 16 * ((BM + 8) * units + RUN * w_units));
      for (int c = lane; c < units + w_units; c += 32)
        if (c < units)
          ring.copy(i, stage + 16 * XP * c, from + 8ll * (unit + c) * pixels, 16 * (BM + 8));
        else
          ring.copy(i, stage + X_BYTES + 16 * WP * (c - units), weights + 8 * RUN * (c - units),
                    16 * RUN);
    }
  } else {
    take_registers<MANY>();
    Result result{bias, pre, out, memory + STAGES * STAGE_BYTES, pixels};
    float sum[1][SUMS];
    for (int i = 0; i < total;) {
      const int start = (blockIdx.x + i / STEPS * gridDim.x) * BM;
      for (int ky = 0; ky < K; ky++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++, i++) {
          const unsigned stage = stages + i % STAGES * STAGE_BYTES;
          ring.wait_full(i);
          begin_products();
          const bool more = ky || part;
          if (part < PARTS - 1)
            multiply<UNITS>(sum, stage + 16 * 64 * (warp / 4), stage + X_BYTES, more);
          else
            multiply<X8 - (PARTS - 1) * UNITS>(sum, stage + 16 * 64 * (warp / 4), stage + X_BYTES,
                                               more);
          commit_products();
          wait_products<1>();
          if (more) ring.leave(i - 1);
        }
      }
      finish_products(sum);
      ring.leave(i - 1);
      result.write(sum[0], start);
    }
  }
}
