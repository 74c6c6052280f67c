// A Hopper GPU's multiprocessor (SM) on a CPU: stands in for `hopper/ptx.cu`, and runs a thread
// block's threads in turns, so that the other sources can be tested without a GPU.
//
// It is unkind where the GPU may be: copies arrive late and in any order, products are made when
// they are waited for and not before, threads take turns at random, and shared memory begins as
// NaN. It does not know registers or time, and of memory fences only the one between loads from a
// stage and the arrival that lets TMA overwrite it. Given as macros besides the sources' own:
// COLUMNS of a wgmma, and B_K_MAJOR, see `hopper._wgmma_macros`.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)

using std::min;
typedef unsigned short bf16;
typedef unsigned long long u64;
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct { unsigned x; } threadIdx, blockIdx, gridDim, blockDim;
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

alignas(128) unsigned char memory[SHARED];

// A product that was started: a thread's two rows of the first operand, where they are registers
struct Product {
  float* sum;
  bool registers, add;
  float rows[2][16];
  u64 a, b;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false, loaded = false;  // since its last fence
  std::vector<Product> started;
  std::deque<std::vector<Product>> groups;
};
struct Meeting { int arrived = 0; long turn = 0; };  // of threads that wait for each other
struct Barrier { int arrivals, left, phase; long bytes; };
struct Copy { unsigned to; const bf16* from; int bytes; unsigned barrier; };

std::vector<Thread> threads;
std::vector<Meeting> warps;
Meeting all;
std::map<unsigned, Barrier> barriers;
std::vector<Copy> copies;
std::vector<std::pair<const char*, const char*>> readable;
ucontext_t scheduler;
std::mt19937 chance;
long progress;
unsigned exchanged[64][32][4];
char complaint[200];

inline void fail(const char* what, long value) {
  if (!complaint[0]) snprintf(complaint, sizeof complaint, "%s: %ld", what, value);
}
inline void yield() { swapcontext(&threads[threadIdx.x].context, &scheduler); }
inline void meet(Meeting& meeting, int count) {
  const long turn = meeting.turn;
  if (++meeting.arrived == count)
    meeting.arrived = 0, meeting.turn++, progress++;
  else
    while (meeting.turn == turn) yield();
}
inline void __syncthreads() { meet(all, blockDim.x); }
inline void __syncwarp() { meet(warps[threadIdx.x / 32], 32); }
inline float __shfl_xor_sync(unsigned, float value, int other) {
  auto& values = exchanged[threadIdx.x / 32];
  memcpy(&values[threadIdx.x % 32][0], &value, 4);
  __syncwarp();
  memcpy(&value, &values[(threadIdx.x % 32) ^ other][0], 4);
  __syncwarp();
  return value;
}

inline unsigned smem_address(const void* p) { return (const unsigned char*)p - memory; }
inline u64 make_smem_desc(unsigned address, int leading, int stride) {
  if (address % 16) fail("an operand that is not aligned", address);
  return (u64)(address >> 4) | (u64)leading << 16 | (u64)stride << 32;
}
inline unsigned load_bf16x2(const unsigned char* p) {
  threads[threadIdx.x].loaded = true;
  unsigned both;
  memcpy(&both, p, 4);
  return both;
}
inline float low(unsigned both) { return __uint_as_float(both << 16); }
inline float high(unsigned both) { return __uint_as_float(both & 0xffff0000u); }
inline unsigned pack_bf16x2(float low, float high) {
  unsigned bits[2];
  memcpy(&bits[0], &low, 4), memcpy(&bits[1], &high, 4);
  for (unsigned& b : bits) b = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return bits[0] | bits[1] << 16;
}

inline float shared_value(unsigned at) {
  if (at + 2 > SHARED) return fail("a product reads beyond shared memory", at), 0;
  bf16 bits;
  memcpy(&bits, memory + at, 2);
  return low(bits);
}
// Value (row, k) of an operand; `across`: its rows lie side by side, not k
inline float value_of(u64 where, int row, int k, bool across) {
  const unsigned start = (where & 0x3fff) << 4, leading = (where >> 16 & 0x3fff) << 4,
                 stride = (where >> 32 & 0x3fff) << 4;
  const int line = across ? k % 8 : row % 8, column = across ? row % 8 : k % 8;
  return shared_value(start + k / 8 * leading + row / 8 * stride + line * 16 + column * 2);
}
inline void multiply_now(const Product& product) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  for (int half = 0; half < 2; half++) {
    float row[16];
    for (int k = 0; k < 16; k++)
      row[k] = product.registers ? product.rows[half][k]
                                 : value_of(product.a, warp * 16 + lane / 4 + 8 * half, k, false);
    for (int j = 0; j < COLUMNS / 8; j++)
      for (int c = 0; c < 2; c++) {
        float& sum = product.sum[4 * j + 2 * half + c];
        float total = product.add ? sum : 0;
        for (int k = 0; k < 16; k++)
          total += row[k] * value_of(product.b, 8 * j + lane % 4 * 2 + c, k, !B_K_MAJOR);
        sum = total;
      }
  }
}
inline void WGMMA(float* sum, u64 a, u64 b, bool add) {
  threads[threadIdx.x].started.push_back({sum, false, add, {}, a, b});
}
inline void WGMMA_REGISTERS(float* sum, const unsigned (&a)[4], u64 b, bool add) {
  Product product{sum, true, add, {}, 0, b};
  auto& values = exchanged[threadIdx.x / 32];
  memcpy(values[threadIdx.x % 32], a, 16);
  __syncwarp();
  for (int k = 0; k < 16; k++)
    for (int half = 0; half < 2; half++) {
      const unsigned both = values[threadIdx.x % 32 / 4 * 4 + k % 8 / 2][k / 8 * 2 + half];
      product.rows[half][k] = k % 2 ? high(both) : low(both);
    }
  __syncwarp();
  threads[threadIdx.x].started.push_back(product);
}
inline void wgmma_fence() {}
inline void wgmma_commit_group() {
  Thread& own = threads[threadIdx.x];
  own.groups.push_back(std::move(own.started));
  own.started.clear();
}
template <int PENDING>
inline void wgmma_wait_group() {
  Thread& own = threads[threadIdx.x];
  for (int n = own.groups.size() > PENDING ? chance() % 8 : 0; n; n--) yield();
  for (; own.groups.size() > PENDING; own.groups.pop_front())
    for (const Product& product : own.groups.front()) multiply_now(product);
  __syncwarp();  // a warp's threads wait together
}
inline void fence_operand(float&) {}
template <int COUNT>
inline void warpgroup_reg_alloc() {}
template <int COUNT>
inline void warpgroup_reg_dealloc() {}
inline void fence_proxy_async() { threads[threadIdx.x].loaded = false; }

inline void ldmatrix_x4_trans(unsigned (&to)[4], unsigned row) {
  auto& values = exchanged[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  threads[threadIdx.x].loaded = true;
  values[lane][0] = row;
  __syncwarp();
  for (int m = 0; m < 4; m++) {
    bf16 both[2];
    for (int k = 0; k < 2; k++) {
      const unsigned at = values[m * 8 + lane % 4 * 2 + k][0] + lane / 4 * 2;
      if (at + 2 > SHARED) return fail("a matrix beyond shared memory", at);
      memcpy(&both[k], memory + at, 2);
    }
    to[m] = both[0] | (unsigned)both[1] << 16;
  }
  __syncwarp();
}

inline void complete_phase(Barrier& barrier) {
  if (barrier.left || barrier.bytes) return;
  barrier.phase++, barrier.left = barrier.arrivals, progress++;
}
inline void mbarrier_init(unsigned at, int arrivals) { barriers[at] = {arrivals, arrivals, 0, 0}; }
inline void mbarrier_arrive(unsigned at) {
  const unsigned first = threadIdx.x / 32 * 32;
  for (unsigned i = first; i < first + 32; i++)
    if (threads[i].loaded) fail("a stage released before its loads were fenced, thread", i);
  Barrier& barrier = barriers.at(at);
  barrier.left--;
  complete_phase(barrier);
}
inline void mbarrier_arrive_expect_tx(unsigned at, int bytes) {
  barriers.at(at).bytes += bytes;
  mbarrier_arrive(at);
}
inline void mbarrier_wait(unsigned at, int phase) {
  while (barriers.at(at).phase % 2 == phase % 2) yield();
}
inline void cp_async_bulk(unsigned to, const bf16* from, int bytes, unsigned barrier) {
  const char* first = (const char*)from;
  const bool known = std::any_of(readable.begin(), readable.end(), [&](auto& range) {
    return first >= range.first && first + bytes <= range.second;
  });
  if (!known) return fail("a copy from outside of the arrays, bytes", bytes);
  if (to % 16 || bytes % 16 || (size_t)from % 16) return fail("a copy that is not aligned", to);
  if (to + bytes > SHARED) return fail("a copy beyond shared memory", to);
  copies.push_back({to, from, bytes, barrier});
}
inline void finish_copies() {
  std::shuffle(copies.begin(), copies.end(), chance);
  for (int n = copies.empty() ? 0 : chance() % (copies.size() + 1); n; n--) {
    const Copy copy = copies.back();
    copies.pop_back();
    memcpy(memory + copy.to, copy.from, copy.bytes);
    barriers.at(copy.barrier).bytes -= copy.bytes;
    complete_phase(barriers.at(copy.barrier));
    progress++;
  }
}

#include "sources.cu"

void** arguments;
template <class... A, size_t... N>
void call(void (*kernel)(A...), std::index_sequence<N...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[N])...);
}
template <class... A>
void call(void (*kernel)(A...)) {
  call(kernel, std::index_sequence_for<A...>());
}
void body() {
  call(convolve);
  threads[threadIdx.x].done = true, progress++;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

// Runs the thread blocks of a grid one after the other; what was wrong, or "".
//   given: where each of the kernel's values lies; ranges [count][2]: arrays that may be copied from
extern "C" const char* run(int grid, int count, void** given, char** ranges, int range_count,
                           int seed) {
  complaint[0] = 0, arguments = given, chance.seed(seed);
  readable.clear();
  for (int i = 0; i < range_count; i++) readable.push_back({ranges[2 * i], ranges[2 * i + 1]});
  gridDim.x = grid, blockDim.x = count;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid && !complaint[0]; blockIdx.x++) {
    memset(memory, 0xff, SHARED);
    threads = std::vector<Thread>(count), warps.assign(count / 32, {}), all = {};
    barriers.clear(), copies.clear();
    std::vector<int> order(count);
    for (int i = 0; i < count; i++) {
      order[i] = i;
      threads[i].stack.reset(new char[1 << 16]);
      getcontext(&threads[i].context);
      threads[i].context.uc_stack.ss_sp = threads[i].stack.get();
      threads[i].context.uc_stack.ss_size = 1 << 16;
      makecontext(&threads[i].context, body, 0);
    }
    for (int idle = 0, left = count; left && !complaint[0];) {
      const long before = progress;
      if (chance() % 4 == 0) std::shuffle(order.begin(), order.end(), chance);
      left = 0;
      for (int i : order) {
        if (threads[i].done) continue;
        threadIdx.x = i, left++;
        swapcontext(&scheduler, &threads[i].context);
        if (complaint[0]) break;
      }
      finish_copies();
      idle = progress == before && copies.empty() ? idle + 1 : 0;
      if (idle > 20) fail("threads that wait for each other for ever", left);
    }
    for (auto& thread : threads)
      if (!complaint[0] && (!thread.groups.empty() || !thread.started.empty()))
        fail("products that nothing waited for", thread.groups.size());
    if (!complaint[0] && !copies.empty()) fail("copies that nothing waited for", copies.size());
  }
  return complaint;
}
