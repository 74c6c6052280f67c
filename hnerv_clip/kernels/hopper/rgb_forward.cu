// The RGB head: a 3×3 convolution, and its loss or frames.
//
// A thread block goes down a band of lines, BM pixels wide. Each line is copied and read once: its
// products with the kernel's rows belong to K neighbouring lines of the result. Macros: HEAD,
// OFFSET and MODE as in `rgb_head.rgb_forward`.

constexpr int STRIPS = (WIDTH - 2 * P + BM - 1) / BM, STAGE_BYTES = X_BYTES;
static_assert(STAGES * (STAGE_BYTES + 16) + W_BYTES == SHARED, "hopper.shared_bytes");

// Where a strip begins, and where the pixels end that it may write
struct Tile {
  int image, first, end;
};

// error [images, thread blocks, CONSUMER_WARPS] and dbias [.., 4]: partial sums; a thread block
// that has no tile of an image leaves its own alone, which are 0
struct Epilogue {
  static constexpr int H = HEIGHT - 2 * P, W = WIDTH - 2 * P;
  const float* bias;
  const unsigned char* video;
  const long long* index;
  void* pred;
  bf16* dout;
  float *error, *dbias, scale;
  float squared_error = 0, bias_sum[2] = {}, target[2][2];
  int image = -1;

  __device__ inline void flush() {
    if (MODE != L2 || image < 0) return;
    const int lane = threadIdx.x % 32;
    const int sums = (image * gridDim.x + blockIdx.x) * CONSUMER_WARPS + threadIdx.x / 32;
#pragma unroll
    for (int other = 16; other; other /= 2) {
      squared_error += __shfl_xor_sync(~0u, squared_error, other);
      if (other >= 4)
        for (int k = 0; k < 2; k++) bias_sum[k] += __shfl_xor_sync(~0u, bias_sum[k], other);
    }
    if (lane == 0) error[sums] = squared_error;
    if (lane < 2)
      for (int k = 0; k < 2; k++) dbias[sums * 4 + 2 * lane + k] = bias_sum[k];
    squared_error = bias_sum[0] = bias_sum[1] = 0;
  }
  // A warp has 16 pixels; a thread two of them, with two of 8 channels, of which 3 are used
  __device__ inline int pixel(const Tile& tile, int half) {
    return tile.first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
  }
  // Reads the frame while the products are under way
  __device__ inline void prefetch(const Tile& tile) {
    if (MODE != L2) return;
    const unsigned char* frame = video + index[tile.image] * 3 * H * W;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Position at(pixel(tile, half), tile.end);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int channel = threadIdx.x % 4 * 2 + k;
        if (at.inside && channel < 3) target[half][k] = frame[(channel * H + at.y) * W + at.x];
      }
    }
  }
  __device__ inline void store(const float (&sum)[4], const Tile& tile) {
    const int lane = threadIdx.x % 32;
    if (tile.image != image) flush(), image = tile.image;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Position at(pixel(tile, half), tile.end);
      if (!at.inside || lane % 4 > 1) continue;
      float gradient[2] = {};
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int channel = lane % 4 * 2 + k;
        if (channel == 3) continue;
        const float v = sum[2 * half + k] + bias[channel];
        float rgb = v + OFFSET, derivative = 1;
        if (HEAD != ADD) {
          rgb = __fdividef(1.f, 1.f + __expf(HEAD == TANH ? -2 * v : -v));  // tanh(v)/2 + 1/2
          derivative = (HEAD == TANH ? 2 : 1) * rgb * (1 - rgb);
        }
        const long long value = ((long long)channel * H + at.y) * W + at.x;
        if (MODE == L2) {
          const float difference = rgb - target[half][k] / 255.f;
          squared_error += difference * difference;
          gradient[k] = 2 * scale * difference * derivative;
          bias_sum[k] += gradient[k];
        } else if (MODE == PRED) {
          reinterpret_cast<float*>(pred)[image * 3ll * H * W + value] = rgb;
        } else {
          reinterpret_cast<unsigned char*>(pred)[image * 3ll * H * W + value] =
              floorf(fminf(fmaxf(rgb * 255, 0.f), 255.f) + 0.5f);
        }
      }
      if (MODE == L2)
        *reinterpret_cast<unsigned*>(dout + 8ll * pixel(tile, half) + lane % 4 * 2) =
            pack_bf16x2(gradient[0], gradient[1]);
    }
  }
};
// Into how many bands an image is cut, so that thread blocks end together; tries rounds of bands
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

extern "C" __global__ void __launch_bounds__(32 * CONSUMER_WARPS + 128, 1)
convolve(const bf16* x, const bf16* weight, const float* bias, const unsigned char* video,
         const long long* index, void* pred, bf16* dout, float* error, float* dbias, float scale,
         int pixels) {
  extern __shared__ __align__(128) unsigned char memory[];
  const unsigned stages = smem_address(memory), weights = stages + STAGES * STAGE_BYTES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int images = pixels / (WIDTH * HEIGHT);
  const Bands bands(images);

  clear_smem(memory, STAGES * STAGE_BYTES + W_BYTES);  // also what is never copied
  __syncthreads();
  for (int i = threadIdx.x; i < W8 * RUN; i += blockDim.x)
    reinterpret_cast<uint4*>(memory + STAGES * STAGE_BYTES)[i / RUN * WP + i % RUN] =
        reinterpret_cast<const uint4*>(weight)[i];
  Pipeline pipeline;
  pipeline.init(weights + W_BYTES);

  Epilogue epilogue{bias, video, index, pred, dout, error, dbias, scale};
  int i = 0;
  for (int item = blockIdx.x; item < images * STRIPS * bands.count; item += gridDim.x) {
    const int image = item / STRIPS / bands.count;
    const int top = item / STRIPS % bands.count * bands.height;
    const int lines = min(bands.height, HEIGHT - 2 * P - top) + 2 * P;  // of x
    const int first = (image * HEIGHT + top) * WIDTH + P + item % STRIPS * BM;
    if (lines <= 2 * P) continue;
    if (warp == CONSUMER_WARPS) {
      for (int line = 0; line < lines; line++, i++) {
        pipeline.producer_acquire(i, 16 * XP * X8);
        for (int c = lane; c < X8; c += 32)
          pipeline.copy(i, stages + i % STAGES * STAGE_BYTES + 16 * XP * c,
                    x + 8 * (c * (long long)pixels + first + line * WIDTH - P), 16 * XP);
      }
    } else if (warp < CONSUMER_WARPS) {
      float sum[1][SUMS], pending[K][4] = {};  // lines of the result that wait for more
      for (int line = 0; line < lines; line++, i++) {
        const int from = first + (line - P) * WIDTH;
        const Tile tile{image, from, (from / WIDTH + 1) * WIDTH};
        if (line >= 2 * P) epilogue.prefetch(tile);
        pipeline.consumer_wait(i);
        wgmma_fence();
        multiply<X8>(sum, stages + i % STAGES * STAGE_BYTES + 16 * 64 * (warp / 4), weights, false);
        wgmma_commit_group();
        wgmma_wait_all(sum);
        pipeline.consumer_release(i);
#pragma unroll
        for (int ky = K - 1; ky >= 0; ky--)
#pragma unroll
          for (int n = 0; n < 4; n++)
            pending[ky][n] = (ky ? pending[ky - 1][n] : 0) + sum[0][4 * ky + n];
        if (line >= 2 * P) epilogue.store(pending[K - 1], tile);
      }
    }
  }
  if (warp < CONSUMER_WARPS) epilogue.flush();
}
