// The operations of an NVIDIA GPU that recurrence.cu uses. tools/gpu/emulator.h implements the same
// interface on a CPU. The file includes no header, because NVRTC has none.
#pragma once

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")  // unrolling would take registers from the loop over time

using Barrier = unsigned long long;

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }

DEVICE unsigned as_word(float x) { return __float_as_uint(x); }
DEVICE float as_float(unsigned word) { return __uint_as_float(word); }
// Packs two bfloat16 into a word, the first into its lower half.
DEVICE unsigned bf16_pair(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
DEVICE unsigned tf32(float x) {
  unsigned word;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

// Rounds a number to TF32 in two instructions, because sm_90 has no instruction for it. `volatile`
// prevents the compiler from keeping the rounded weights in registers, of which there are too few.
// A NaN may become 0.
DEVICE unsigned tf32_of_number(unsigned word) {
  unsigned rounded;
  asm volatile("{\n.reg .b32 sum;\nadd.u32 sum, %1, 0x1000;\nand.b32 %0, sum, 0xffffe000;\n}"
               : "=r"(rounded)
               : "r"(word));
  return rounded;
}

// c += A B, [16, k] x [k, 8], with the fragments of PTX's mma.m16n8k16 and mma.m16n8k8.
DEVICE void mma_bf16(float *c, const unsigned *a, const unsigned *b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_tf32(float *c, const unsigned *a, const unsigned *b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void load16(unsigned *to, const unsigned *from) {
  const uint4 v = *(const uint4 *)from;
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// Synchronizes `threads` threads, in whole warps, that pass the same barrier, 1 to 15.
DEVICE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// The fast variants have relative errors of about 2^-22, less than the rounding of the products.
// Exact products require the slower variants.
template <bool Exact>
DEVICE float sigmoid(float x) {
  return Exact ? 1.f / (1.f + expf(-x)) : __fdividef(1.f, 1.f + __expf(-x));
}
template <bool Exact>
DEVICE float tanh_of(float x) {
  return Exact ? tanhf(x) : __fdividef(2.f, 1.f + __expf(-2.f * x)) - 1.f;
}

// Clusters, whose blocks store into each other's shared memory, exist since sm_90. A barrier waits
// for one arrival, which declares the expected bytes, and for these bytes.
DEVICE unsigned address_of(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
#if __CUDA_ARCH__ >= 900
DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" : : : "memory");
}
DEVICE void barrier_init(Barrier *b) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
               :
               : "r"(address_of(b))
               : "memory");
}
DEVICE void barrier_expect(Barrier *b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               :
               : "r"(address_of(b)), "r"(bytes)
               : "memory");
}
DEVICE void barrier_wait(Barrier *b, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra WAIT;\nDONE:\n}"
      :
      : "r"(address_of(b)), "r"(parity)
      : "memory");
}
// Stores a word at the same address in every block of the cluster and signals the barrier of each.
template <int C>
DEVICE void put(unsigned *to, unsigned word, Barrier *b) {
  UNROLL for (int rank = 0; rank < C; ++rank) {
    unsigned at, there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(address_of(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address_of(b)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
        :
        : "r"(at), "r"(word), "r"(there)
        : "memory");
  }
}
#else
DEVICE int cluster_rank() { return 0; }
DEVICE void sync_cluster() {}
DEVICE void barrier_init(Barrier *) {}
DEVICE void barrier_expect(Barrier *, unsigned) {}
DEVICE void barrier_wait(Barrier *, int) {}
template <int C>
DEVICE void put(unsigned *, unsigned, Barrier *) {
  static_assert(C == 1, "no clusters before sm_90");
}
#endif
