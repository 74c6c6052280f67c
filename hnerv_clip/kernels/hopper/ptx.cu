// PTX instructions that C++ has no words for: wgmma, mbarrier, TMA copies, registers, ldmatrix.

typedef unsigned short bf16;
typedef unsigned long long u64;

__device__ inline unsigned smem_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
// The shared memory descriptor of a wgmma operand, without swizzle: its address, and as multiples
// of 16 bytes the leading dimension offset, to the other 8 of its 16 values of k, and the stride
// dimension offset, to the next 8 rows
__device__ inline u64 make_smem_desc(unsigned address, int leading, int stride) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)leading << 16 | (u64)stride << 32;
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ inline void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler moves no use of an accumulator before this
__device__ inline void fence_operand(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

template <int COUNT>
__device__ inline void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Four 8×8 matrices, transposed; each lane gives the address of a row
__device__ inline void ldmatrix_x4_trans(unsigned (&to)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

// mbarriers in shared memory, 8 bytes each
__device__ inline void mbarrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void mbarrier_wait(unsigned barrier, int phase) {
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again; }"
      ::"r"(barrier), "r"(phase & 1) : "memory");
}
// What threads wrote to and read from shared memory comes before what the async proxy (wgmma, TMA)
// does there later
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// A copy by TMA, one run of bytes; it counts them at the mbarrier
__device__ inline void cp_async_bulk(unsigned to, const bf16* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Two values of shared memory
__device__ inline unsigned load_bf16x2(const unsigned char* p) {
  return *reinterpret_cast<const unsigned*>(p);
}
__device__ inline float low(unsigned both) { return __uint_as_float(both << 16); }
__device__ inline float high(unsigned both) { return __uint_as_float(both & 0xffff0000u); }
__device__ inline unsigned pack_bf16x2(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
