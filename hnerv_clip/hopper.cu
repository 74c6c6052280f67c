// A convolution of images on a Hopper GPU's tensor cores; `hopper.py` compiles it.
//
// Images lie in units of 16 bytes (8 channels), as [channels / 8][pixel], in memory and in shared
// memory; pixels count the images' edges, P zeros on each side. So a copy is one long run for each
// unit of channels, made by the GPU's copy engine, and a pixel further is a unit further: wgmma
// reads all K columns of the kernel from one copy. Weights lie as
// [kernel row][channels of y / 8][kernel column, channel of x][8].
//
// Given as macros: K, XC, YC (channels), WIDTH and HEIGHT (of an image with its edges), BM (pixels
// of a copy), STAGES (copies, one in use and the others under way), and the way. BACK 0 or 1: PART
// (units of x in a copy), and for 0 ACT, SH, SW, CG, CN, EDGE as in `kernels.convolve`, and whether
// OUT_UNITS; or RGB, with HEAD, OFFSET and MODE as in `kernels.rgb_forward`. WEIGHTS: BLOCK, FOLD.
// `hopper.py` makes SHARED (the bytes of shared memory), the names of ACT's, HEAD's and MODE's
// values, WGMMA(d, a, b, add), with half as many sums a thread as the product has columns, and
// WGMMA_REGISTERS, whose `a` is 4 registers. Groups of four warps multiply; of one more, which
// gives them its registers, a warp starts the copies.

typedef unsigned short bf16;
typedef unsigned long long u64;

constexpr int P = K / 2, X8 = XC / 8, Y8 = YC / 8;  // units of a pixel
#ifdef WEIGHTS
constexpr int WARPS = 8;
#else
constexpr int WARPS = BM / 16;  // each with 16 pixels
#endif
// Registers of a thread that multiplies, and of one that copies: together what a program is given
constexpr int MANY = WARPS == 8 ? 232 : 112, FEW = WARPS == 8 ? 40 : 24;

__device__ inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
// Where wgmma finds an operand: units to the other 8 of its 16 values, and to the next 8 rows
__device__ inline u64 operand(unsigned address, int other, int next) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)other << 16 | (u64)next << 32;
}
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
template <int M, int N>
__device__ inline void finish_products(float (&sum)[M][N]) {
  wait_products<0>();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < N; j++) asm volatile("" : "+f"(sum[m][j])::"memory");
}

__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
}
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
}

// Copies in shared memory, filled by one warp and read by the others
struct Ring {
  unsigned full, empty;  // barriers of each stage, 8 bytes apart

  __device__ inline void open(unsigned address) {
    full = address, empty = address + 8 * STAGES;
    if (threadIdx.x < STAGES) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(full + 8 * threadIdx.x) : "memory");
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(empty + 8 * threadIdx.x), "r"(WARPS)
                   : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }
  __device__ inline void wait(unsigned barrier, int turn) {
    asm volatile(
        "{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again; }"
        ::"r"(barrier), "r"(turn & 1) : "memory");
  }
  __device__ inline void wait_full(int i) { wait(full + 8 * (i % STAGES), i / STAGES); }
  // By each warp that read it
  __device__ inline void leave(int i) {
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(empty + 8 * (i % STAGES))
                   : "memory");
  }
  __device__ inline void expect(int i, int bytes) {
    if (i >= STAGES) wait(empty + 8 * (i % STAGES), i / STAGES - 1);
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                   ::"r"(full + 8 * (i % STAGES)), "r"(bytes) : "memory");
    __syncwarp();
  }
  __device__ inline void copy(int i, unsigned to, const bf16* from, int bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(full + 8 * (i % STAGES)) : "memory");
  }
};
__device__ inline void clear(unsigned char* memory, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
}

#ifndef WEIGHTS
// A program takes BM neighbouring pixels of x and all YC channels of the result, and goes through
// the kernel's rows; of each it copies BM + 8 pixels and the row's weights, all channels of x or
// PART units of them at a time. Each wgmma takes 16 values of the sum: two units, of one pixel or,
// where the number of units is odd, of two.
#ifdef RGB
constexpr int W8 = K * Y8;  // the kernel's rows are columns of the product
#else
constexpr int W8 = BACK ? X8 : Y8;
#endif
constexpr int RUN = K * (BACK ? YC : XC);  // weights [W8][RUN][8] a row
constexpr int UNITS = PART, PARTS = (X8 + UNITS - 1) / UNITS, STEPS = K * PARTS;
constexpr int XP = BM + 8, WP = RUN + (BACK ? 0 : 8);  // from unit to unit
constexpr int X_BYTES = 16 * XP * UNITS, W_BYTES = 16 * WP * (BACK ? UNITS : W8);
constexpr int ROW = 16 * Y8;  // bytes of a pixel's results on their way out
#ifdef RGB
constexpr int SUMS = 4 * W8, STAGE_BYTES = X_BYTES, REST = W_BYTES;
#else
constexpr int SUMS = YC / 2, STAGE_BYTES = X_BYTES + W_BYTES, REST = WARPS * 8 * ROW;
#endif
static_assert(STAGES * (STAGE_BYTES + 16) + REST == SHARED, "hopper.shared_bytes");

__device__ inline float low(unsigned both) { return __uint_as_float(both << 16); }
__device__ inline float high(unsigned both) { return __uint_as_float(both & 0xffff0000u); }
__device__ inline unsigned pack(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

#ifdef ACT
__device__ inline float activate(float x) {
  if (ACT == GELU) {  // as kernels.normal
    float t = __fdividef(1.f, 1.f + 0.2316418882663604f * fabsf(x));
    float tail = 0.5f * __expf(-0.5f * x * x) * t * (0.254829592f + t * (-0.284496736f + t * (
        1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return x * (x > 0 ? 1.f - tail : tail);
  }
  if (ACT == RELU) return fmaxf(x, 0.f);
  return ACT == SIN ? sinf(x) : __fdividef(x, 1.f + __expf(-x));
}
#endif

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

// Where a tile begins, and where the pixels end that it may write
struct Tile {
  int image, first, end;
};

// A pixel's place in its image, without the edges
struct Place {
  int image, y, x;
  bool inside;
  __device__ inline Place(int pixel, int end) {
    int line = pixel / WIDTH;
    x = pixel % WIDTH - P, image = line / HEIGHT, y = line % HEIGHT - P;
    inside = pixel < end && x >= 0 && x < WIDTH - 2 * P && y >= 0 && y < HEIGHT - 2 * P;
  }
};

#ifdef RGB
// error [images, programs, WARPS] and dbias [.., 4]: sums; a program that has no tile of an image
// leaves its places alone, which hold 0
struct Result {
  static constexpr int H = HEIGHT - 2 * P, W = WIDTH - 2 * P;
  const float* bias;
  const unsigned char* video;
  const long long* index;
  void* pred;
  bf16* dout;
  float *error, *dbias, scale;
  float wrong = 0, slope_sum[2] = {}, target[2][2];
  int image = -1;

  __device__ inline void flush() {
    if (MODE != L2 || image < 0) return;
    const int lane = threadIdx.x % 32;
    const int place = (image * gridDim.x + blockIdx.x) * WARPS + threadIdx.x / 32;
#pragma unroll
    for (int other = 16; other; other /= 2) {
      wrong += __shfl_xor_sync(~0u, wrong, other);
      if (other >= 4)
        for (int k = 0; k < 2; k++) slope_sum[k] += __shfl_xor_sync(~0u, slope_sum[k], other);
    }
    if (lane == 0) error[place] = wrong;
    if (lane < 2)
      for (int k = 0; k < 2; k++) dbias[place * 4 + 2 * lane + k] = slope_sum[k];
    wrong = slope_sum[0] = slope_sum[1] = 0;
  }
  // A warp has 16 pixels; a thread two of them, with two of 8 colours, of which 3 are used
  __device__ inline int pixel(const Tile& tile, int half) {
    return tile.first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
  }
  // Reads the frame while the products are under way
  __device__ inline void prepare(const Tile& tile) {
    if (MODE != L2) return;
    const unsigned char* frame = video + index[tile.image] * 3 * H * W;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Place place(pixel(tile, half), tile.end);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int colour = threadIdx.x % 4 * 2 + k;
        if (place.inside && colour < 3)
          target[half][k] = frame[(colour * H + place.y) * W + place.x];
      }
    }
  }
  __device__ inline void write(const float (&sum)[4], const Tile& tile) {
    const int lane = threadIdx.x % 32;
    if (tile.image != image) flush(), image = tile.image;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Place place(pixel(tile, half), tile.end);
      if (!place.inside || lane % 4 > 1) continue;
      float gradient[2] = {};
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int colour = lane % 4 * 2 + k;
        if (colour == 3) continue;
        const float v = sum[2 * half + k] + bias[colour];
        float rgb = v + OFFSET, slope = 1;
        if (HEAD != ADD) {
          rgb = __fdividef(1.f, 1.f + __expf(HEAD == TANH ? -2 * v : -v));  // tanh(v)/2 + 1/2
          slope = (HEAD == TANH ? 2 : 1) * rgb * (1 - rgb);
        }
        const long long at = ((long long)colour * H + place.y) * W + place.x;
        if (MODE == L2) {
          const float wrong_here = rgb - target[half][k] / 255.f;
          wrong += wrong_here * wrong_here;
          gradient[k] = 2 * scale * wrong_here * slope;
          slope_sum[k] += gradient[k];
        } else if (MODE == PRED) {
          reinterpret_cast<float*>(pred)[image * 3ll * H * W + at] = rgb;
        } else {
          reinterpret_cast<unsigned char*>(pred)[image * 3ll * H * W + at] =
              floorf(fminf(fmaxf(rgb * 255, 0.f), 255.f) + 0.5f);
        }
      }
      if (MODE == L2)
        *reinterpret_cast<unsigned*>(dout + 8ll * pixel(tile, half) + lane % 4 * 2) =
            pack(gradient[0], gradient[1]);
    }
  }
};
#else
// pre [pixels][YC] and bias may be absent; out of the way back is [images, rows, columns][YC]
struct Result {
  const float* bias;
  bf16 *pre, *out;
  unsigned char* memory;  // 8 · ROW bytes of each warp
  int pixels;

  // 16 pixels of a warp, 8 at a time
  __device__ inline void write(const float (&sum)[YC / 2], const Tile& tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned char* row = memory + warp * 8 * ROW;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int first = tile.first + warp * 16 + half * 8;
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
        const Place place(first + u / Y8, tile.end);
        if (!place.inside) continue;
        long long to = ((long long)place.image * (HEIGHT - 2 * P) + place.y) * (WIDTH - 2 * P) +
                       place.x;
        *reinterpret_cast<uint4*>(out + to * YC + u % Y8 * 8) =
            *reinterpret_cast<uint4*>(row + u / Y8 * ROW + u % Y8 * 16);
      }
#else
      if (pre)
        for (int u = lane; u < 8 * Y8; u += 32)
          if (first + u / Y8 < tile.end)
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
        const Place place(pixel, tile.end);
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
#endif

#ifdef RGB
// A program goes down a band of lines, BM pixels wide. Each line is copied and read once: its
// products with the kernel's rows belong to K neighbouring lines of the result.
constexpr int STRIPS = (WIDTH - 2 * P + BM - 1) / BM;

// Into how many bands an image is cut, so that programs end together; by trying rounds of bands
struct Bands {
  int count = 1, height = HEIGHT - 2 * P;
  __device__ inline Bands(int images) {
    int least = 1 << 30;
    for (int rounds = 1; rounds <= 8; rounds++) {
      const int n = rounds * gridDim.x / (images * STRIPS);
      const int lines = n ? (HEIGHT - 2 * P + n - 1) / n : 1 << 20;
      if (rounds * (lines + 2 * P) < least)
        least = rounds * (lines + 2 * P), count = n, height = lines;
    }
    if (!count) count = 1, height = HEIGHT - 2 * P;
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS + 128, 1)
convolve(const bf16* x, const bf16* weight, const float* bias, const unsigned char* video,
         const long long* index, void* pred, bf16* dout, float* error, float* dbias, float scale,
         int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = shared_address(memory), weights = stages + STAGES * STAGE_BYTES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int images = pixels / (WIDTH * HEIGHT);
  const Bands bands(images);

  clear(memory, STAGES * STAGE_BYTES + REST);  // also what is never copied
  __syncthreads();
  for (int i = threadIdx.x; i < W8 * RUN; i += blockDim.x)
    reinterpret_cast<uint4*>(memory + STAGES * STAGE_BYTES)[i / RUN * WP + i % RUN] =
        reinterpret_cast<const uint4*>(weight)[i];
  Ring ring;
  ring.open(weights + REST);

  Result result{bias, video, index, pred, dout, error, dbias, scale};
  int i = 0;
  for (int item = blockIdx.x; item < images * STRIPS * bands.count; item += gridDim.x) {
    const int image = item / STRIPS / bands.count;
    const int top = item / STRIPS % bands.count * bands.height;
    const int lines = min(bands.height, HEIGHT - 2 * P - top) + 2 * P;  // of x
    const int first = (image * HEIGHT + top) * WIDTH + P + item % STRIPS * BM;
    if (lines <= 2 * P) continue;
    if (warp == WARPS) {
      for (int line = 0; line < lines; line++, i++) {
        ring.expect(i, 16 * XP * X8);
        for (int c = lane; c < X8; c += 32)
          ring.copy(i, stages + i % STAGES * STAGE_BYTES + 16 * XP * c,
                    x + 8 * (c * (long long)pixels + first + line * WIDTH - P), 16 * XP);
      }
    } else if (warp < WARPS) {
      float sum[1][SUMS], open[K][4] = {};  // lines of the result that wait for more
      for (int line = 0; line < lines; line++, i++) {
        const int from = first + (line - P) * WIDTH;
        const Tile tile{image, from, (from / WIDTH + 1) * WIDTH};
        if (line >= 2 * P) result.prepare(tile);
        ring.wait_full(i);
        begin_products();
        multiply<X8>(sum, stages + i % STAGES * STAGE_BYTES + 16 * 64 * (warp / 4), weights, false);
        commit_products();
        finish_products(sum);
        ring.leave(i);
#pragma unroll
        for (int ky = K - 1; ky >= 0; ky--)
#pragma unroll
          for (int n = 0; n < 4; n++) open[ky][n] = (ky ? open[ky - 1][n] : 0) + sum[0][4 * ky + n];
        if (line >= 2 * P) result.write(open[K - 1], tile);
      }
    }
  }
  if (warp < WARPS) result.flush();
}
#else
extern "C" __global__ void __launch_bounds__(32 * WARPS + 128, 1)
convolve(const bf16* x, const bf16* weight, const float* bias, bf16* pre, bf16* out, int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = shared_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (pixels + BM - 1) / BM;
  const int own_tiles = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  const int total = own_tiles * STEPS;

  clear(memory, STAGES * STAGE_BYTES);  // also what is never copied
  Ring ring;
  ring.open(stages + STAGES * STAGE_BYTES + REST);

  if (warp >= WARPS) {
    give_registers();
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
    take_registers();
    Result result{bias, pre, out, memory + STAGES * STAGE_BYTES, pixels};
    float sum[1][SUMS];
    for (int i = 0; i < total;) {
      const Tile tile{0, (int)(blockIdx.x + i / STEPS * gridDim.x) * BM, pixels};
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
      result.write(sum[0], tile);
    }
  }
}
#endif
#else
// The weights' gradient: sums over pixels. A program takes BLOCK units of (kernel row, kernel
// column, channels of x), all channels of y and one share of the pixels. Its x comes through
// registers, so that each warp can take any two units.
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
    give_registers();
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
    take_registers();
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
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                       : "=r"(rows[m][0]), "=r"(rows[m][1]), "=r"(rows[m][2]), "=r"(rows[m][3])
                       : "r"(stage + from[m] + 256 * k) : "memory");
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
#endif
