// What all operations share: the pipeline from the producer warp to the consumer warpgroups.
// `__init__.py` puts the sources of an operation together and compiles them.
//
// Images are channel-blocked, [channels / 8][pixel][8], in global and in shared memory; pixels
// include the images' edges, P zeros on each side. So TMA copies one long run for each block of
// channels, and the next pixel is 16 bytes further: wgmma reads all K columns of the kernel from
// one copy. Weights are [kernel row][channels of y / 8][kernel column, channel of x][8].
//
// Given as macros: K, XC, YC (channels), WIDTH and HEIGHT (of an image with its edges), BM (pixels
// of a stage), STAGES (of the pipeline), SHARED (bytes of shared memory); WGMMA(d, a, b, add), with
// half as many accumulators a thread as the product has columns, and WGMMA_REGISTERS, whose `a` is
// 4 registers. Consumer warpgroups multiply; in one more, which deallocates registers for them, the
// producer warp starts the copies.

constexpr int P = K / 2, X8 = XC / 8, Y8 = YC / 8;  // channel blocks of a pixel
#ifdef WEIGHT_GRADIENT
constexpr int CONSUMER_WARPS = 8;
#else
constexpr int CONSUMER_WARPS = BM / 16;  // each with 16 pixels
#endif
// Of a thread; together what a thread block is given
constexpr int CONSUMER_REGISTERS = CONSUMER_WARPS == 8 ? 232 : 112;
constexpr int PRODUCER_REGISTERS = CONSUMER_WARPS == 8 ? 40 : 24;

template <int M, int N>
__device__ inline void wgmma_wait_all(float (&sum)[M][N]) {
  wgmma_wait_group<0>();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < N; j++) fence_operand(sum[m][j]);
}

// Stages in shared memory, filled by the producer warp and read by the consumers; i counts copies
struct Pipeline {
  unsigned full, empty;  // mbarriers of each stage, 8 bytes apart

  __device__ inline void init(unsigned address) {
    full = address, empty = address + 8 * STAGES;
    if (threadIdx.x < STAGES) {
      mbarrier_init(full + 8 * threadIdx.x, 1);
      mbarrier_init(empty + 8 * threadIdx.x, CONSUMER_WARPS);
    }
    fence_proxy_async();
    __syncthreads();
  }
  __device__ inline void consumer_wait(int i) {
    mbarrier_wait(full + 8 * (i % STAGES), i / STAGES);
  }
  // By each warp whose wgmma has read it
  __device__ inline void consumer_release(int i) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * (i % STAGES));
  }
  // By each warp whose lanes have loaded from it: their reads before the copy that overwrites it
  __device__ inline void consumer_release_loads(int i) {
    fence_proxy_async();
    __syncwarp();
    consumer_release(i);
  }
  __device__ inline void producer_acquire(int i, int bytes) {
    if (i >= STAGES) mbarrier_wait(empty + 8 * (i % STAGES), i / STAGES - 1);
    if (threadIdx.x % 32 == 0) mbarrier_arrive_expect_tx(full + 8 * (i % STAGES), bytes);
    __syncwarp();
  }
  __device__ inline void copy(int i, unsigned to, const bf16* from, int bytes) {
    cp_async_bulk(to, from, bytes, full + 8 * (i % STAGES));
  }
};
// Φ(x), and exp(−x²/2): as `activations.normal_cdf`
__device__ inline float normal_cdf(float x, float& density) {
  const float t = __fdividef(1.f, 1.f + 0.2316418882663604f * fabsf(x));
  density = __expf(-0.5f * x * x);
  const float tail = 0.5f * density * t * (0.254829592f + t * (-0.284496736f + t * (
      1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return x > 0 ? 1.f - tail : tail;
}
__device__ inline void clear_smem(unsigned char* memory, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
}

// A pixel's position in its image, without the edges
struct Position {
  int image, y, x;
  bool inside;
  __device__ inline Position(int pixel, int end) {
    int line = pixel / WIDTH;
    x = pixel % WIDTH - P, image = line / HEIGHT, y = line % HEIGHT - P;
    inside = pixel < end && x >= 0 && x < WIDTH - 2 * P && y >= 0 && y < HEIGHT - 2 * P;
  }
};
