// What the ways of a convolution on a Hopper GPU share; `__init__.py` puts the sources
// together and compiles them.
//
// Images lie in units of 16 bytes (8 channels), as [channels / 8][pixel], in memory and in shared
// memory; pixels count the images' edges, P zeros on each side. So a copy is one long run for each
// unit of channels, made by the GPU's copy engine, and a pixel further is a unit further: wgmma
// reads all K columns of the kernel from one copy. Weights lie as
// [kernel row][channels of y / 8][kernel column, channel of x][8].
//
// Given as macros: K, XC, YC (channels), WIDTH and HEIGHT (of an image with its edges), BM (pixels
// of a copy), STAGES (copies, one in use and the others under way), SHARED (the bytes of shared
// memory); WGMMA(d, a, b, add), with half as many sums a thread as the product has columns, and
// WGMMA_REGISTERS, whose `a` is 4 registers. Groups of four warps multiply; of one more, which
// gives them its registers, a warp starts the copies.

constexpr int P = K / 2, X8 = XC / 8, Y8 = YC / 8;  // units of a pixel
#ifdef WEIGHTS
constexpr int WARPS = 8;
#else
constexpr int WARPS = BM / 16;  // each with 16 pixels
#endif
// Registers of a thread that multiplies, and of one that copies: together what a program is given
constexpr int MANY = WARPS == 8 ? 232 : 112, FEW = WARPS == 8 ? 40 : 24;

template <int M, int N>
__device__ inline void finish_products(float (&sum)[M][N]) {
  wait_products<0>();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < N; j++) hold(sum[m][j]);
}

// Copies in shared memory, filled by one warp and read by the others
struct Ring {
  unsigned full, empty;  // barriers of each stage, 8 bytes apart

  __device__ inline void open(unsigned address) {
    full = address, empty = address + 8 * STAGES;
    if (threadIdx.x < STAGES) {
      open_barrier(full + 8 * threadIdx.x, 1);
      open_barrier(empty + 8 * threadIdx.x, WARPS);
    }
    publish_shared();
    __syncthreads();
  }
  __device__ inline void wait_full(int i) { wait_barrier(full + 8 * (i % STAGES), i / STAGES); }
  // By each warp that read it
  __device__ inline void leave(int i) {
    if (threadIdx.x % 32 == 0) arrive(empty + 8 * (i % STAGES));
  }
  __device__ inline void expect(int i, int bytes) {
    if (i >= STAGES) wait_barrier(empty + 8 * (i % STAGES), i / STAGES - 1);
    if (threadIdx.x % 32 == 0) arrive_and_expect(full + 8 * (i % STAGES), bytes);
    __syncwarp();
  }
  __device__ inline void copy(int i, unsigned to, const bf16* from, int bytes) {
    copy_to_shared(to, from, bytes, full + 8 * (i % STAGES));
  }
};
// Φ(x), and exp(−x²/2): as `kernels.normal`
__device__ inline float normal(float x, float& bell) {
  const float t = __fdividef(1.f, 1.f + 0.2316418882663604f * fabsf(x));
  bell = __expf(-0.5f * x * x);
  const float tail = 0.5f * bell * t * (0.254829592f + t * (-0.284496736f + t * (
      1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return x > 0 ? 1.f - tail : tail;
}
__device__ inline void clear(unsigned char* memory, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
}

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
