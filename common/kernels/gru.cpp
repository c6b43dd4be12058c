// The functions of gru.h. One thread computes all time steps of a row block (rows of the batch in one
// direction) without waiting for another, and the recurrent weights stay in that core's cache. The
// input projections x W' + b of a few steps at a time come before these steps, so that they stay in
// the cache too; those of token rows, of an inference in float32 or float64, or if row blocks are
// fewer than threads, before all steps.
// Backward, the recurrence comes first. The order of summation depends only on the sizes, so
// results do not depend on the number of threads.
//
// gru.h           the C interface                cells.h, cell_*.h  the cells: pointwise mathematics
// execution.h     one call                       recurrence.h       time steps and row blocks
// schedule.h      how its work is divided        input_product.h    x W' + b and its gradients
// threads.h       the threads                     products.h         products of matrices
// weights_cache.h packed weights, kept           tiles.h            the same on the matrix unit
// memory.h        aligned memory                 packing.h          the factors of products
//                                                vectors.h, cell.h  vectors, and the interface of cells
//
// instruction_set.cpp compiles the right column once for each instruction set; the processor is
// queried for the one to use.
#include "gru.h"

#include <string.h>
#ifdef GRU_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <memory>
#include <new>

#include "execution.h"

#if defined(__x86_64__) || defined(__i386__)
DECLARE_KERNELS(avx512, float)
DECLARE_KERNELS(avx512, double)
DECLARE_KERNELS(avx512, Pair)
DECLARE_KERNELS(avx512bf16, Pair)
DECLARE_KERNELS(amx, Pair)
DECLARE_KERNELS(avx2, float)
DECLARE_KERNELS(avx2, double)
DECLARE_KERNELS(avx2, Pair)
#endif
DECLARE_KERNELS(baseline, float)
DECLARE_KERNELS(baseline, double)
DECLARE_KERNELS(baseline, Pair)

namespace {

struct InstructionSet {
  const char *name;
  bool (*supported)();
  const Kernels<float> &of_float;
  const Kernels<double> &of_double;
  const Kernels<float> &of_pairs;
  template <class T>
  const Kernels<T> &of(bool bfloat16) const {
    if constexpr (std::is_same_v<T, double>)
      return of_double;
    else
      return bfloat16 ? of_pairs : of_float;
  }
};

#if defined(__x86_64__) || defined(__i386__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("fma");
}
#endif

#ifdef GRU_AMX
// Whether the processor has the tiles and AVX-512 BF16, which rounds their factors, and Linux grants
// the tiles to the process (ARCH_REQ_XCOMP_PERM; 18 is the tiles' data). Without the grant, the first
// instruction raises a signal. Children inherit it.
bool has_amx() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & d >> 24 & 1) &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) &&
         !syscall(SYS_arch_prctl, 0x1023, 18);
}
#endif

const InstructionSet instruction_sets[] = {
// best first
#ifdef GRU_AMX
    {"amx", has_amx, avx512::kernels_of_float, avx512::kernels_of_double, amx::kernels_of_Pair},
#endif
#if defined(__x86_64__) || defined(__i386__)
    {"avx512bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
     avx512::kernels_of_float, avx512::kernels_of_double, avx512bf16::kernels_of_Pair},
    {"avx512", has_avx512, avx512::kernels_of_float, avx512::kernels_of_double,
     avx512::kernels_of_Pair},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::kernels_of_float, avx2::kernels_of_double, avx2::kernels_of_Pair},
#endif
    {"baseline", [] { return true; }, baseline::kernels_of_float, baseline::kernels_of_double,
     baseline::kernels_of_Pair},
};

const InstructionSet *find_instruction_set(const char *name) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#endif
  for (const InstructionSet &set : instruction_sets)
    if ((!name || !strcmp(name, set.name)) && set.supported()) return &set;
  return nullptr;
}

std::atomic<const InstructionSet *> chosen{nullptr};

const InstructionSet &instruction_set() {
  if (!chosen) chosen = find_instruction_set(nullptr);
  return *chosen;
}

// A problem whose lengths, tokens and resets are copies of the caller's. Another thread may write
// to the caller's arrays during the call (a data loader that reuses one buffer, a NumPy array that
// XLA reads in place), so every index is read once, here, and the copy is validated.
struct OwnIndices {
  gru_problem problem;
  int status = GRU_OK;

  explicit OwnIndices(const gru_problem &original) : problem(original) {
    const int64_t B = problem.batch, cells = problem.steps * B;
    memory.reset(new char[(B + cells) * sizeof(int32_t) + cells]);
    char *at = memory.get();
    copy(problem.lengths, B, at);
    copy(problem.tokens, cells, at);
    copy(problem.resets, cells, at);
    if (!in_range(problem.lengths, B, problem.steps)) status = GRU_BAD_LENGTH;
    else if (!in_range(problem.tokens, cells, problem.distinct - 1)) status = GRU_BAD_TOKEN;
  }

 private:
  std::unique_ptr<char[]> memory;

  template <class Index>
  static void copy(const Index *&array, int64_t count, char *&at) {
    if (!array) return;
    array = (const Index *)memcpy(at, array, count * sizeof(Index));
    at += count * sizeof(Index);
  }

  static bool in_range(const int32_t *array, int64_t count, int64_t limit) {
    int32_t lowest = 0, highest = -1;
    for (int64_t i = 0; array && i < count; ++i) {
      lowest = std::min(lowest, array[i]);
      highest = std::max(highest, array[i]);
    }
    return lowest == 0 && highest <= limit;
  }
};

template <class T>
void execute(const gru_problem &problem, const gru_direction *directions, bool backward) {
  Execution<T>(instruction_set().of<T>(problem.bfloat16), problem, directions, backward).run();
}

int compute(const gru_problem &problem, const gru_direction *directions, bool backward) try {
  const OwnIndices own(problem);
  if (own.status != GRU_OK) return own.status;
  (problem.is_double ? execute<double> : execute<float>)(own.problem, directions, backward);
  return GRU_OK;
} catch (const std::bad_alloc &) {
  return GRU_OUT_OF_MEMORY;
}

const CellShape &shape_of(int32_t cell, int32_t reset_after) {
  return baseline::kernels_of_float.cells[cell][reset_after != 0].shape;
}

}  // namespace

extern "C" {

int gru_forward(const gru_problem *problem, const gru_direction *directions) {
  return compute(*problem, directions, false);
}

int gru_backward(const gru_problem *problem, const gru_direction *directions) {
  return compute(*problem, directions, true);
}

int64_t gru_saved_size(int64_t steps, int64_t batch, int64_t hidden, int32_t cell,
                       int32_t reset_after) {
  return steps * batch * hidden * shape_of(cell, reset_after).saved;
}

int32_t gru_gates(int32_t cell) { return shape_of(cell, 0).gates; }

int gru_bfloat16(void) { return find_instruction_set("avx512bf16") || find_instruction_set("amx"); }

const char *gru_instruction_set(const char *name) {
  if (name) {
    const InstructionSet *set = find_instruction_set(name);
    if (!set) return nullptr;
    chosen = set;
  }
  return instruction_set().name;
}

}  // extern "C"
