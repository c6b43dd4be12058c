// Runs the GPU's kernel in the emulator for the sanitizers: see test_gpu_sanitizers.py. Every array is
// its own piece of the heap, exactly as large as call.h says. Checks that no result is left unwritten
// and that none depends on the schedule.
#include "emulator.h"

#include <cstdio>

#include "../../common/kernels/cuda/recurrence.cu"

struct Problem {
  int steps, batch, beyond;  // units that the instance has and the problem has not
  bool tokens, resets, outputs, saves;
  int empty;  // rows from the first on, a whole block where there are 8
};

const Problem problems[] = {{3, 11, 3, true, true, true, true, 1},
                            {2, 11, 0, false, false, false, true, 8},
                            {2, 8, 1, true, false, true, false, 0},
                            {2, 3, 5, false, true, true, true, 0}};

template <class T>
using Arrays = std::vector<std::vector<T>>;

// All that forward and backward write.
template <class Factors, int H, int C, int G, int P, bool ResetAfter>
Arrays<float> run(const Problem &p, unsigned seed) {
  using Forward = Kernel<Factors, H, C, G, P, ResetAfter, false>;
  using Backward = Kernel<Factors, H, C, G, P, ResetAfter, true>;
  const int T = p.steps, B = p.batch, K = p.tokens ? 4 : T * B, R = 2, S = H - p.beyond;
  std::mt19937 random(1);
  Arrays<float> in, out;
  in.reserve(20), out.reserve(20);  // pointers into them must stay
  auto input = [&](int count) {
    in.emplace_back(count);
    for (float &x : in.back()) x = float(random() % 2001) / 1000 - 1;
    return in.back().data();
  };
  auto output = [&](int count) { return out.emplace_back(count, NAN).data(); };
  std::vector<int> tokens(T * B), lengths(B);
  std::vector<unsigned char> resets(T * B);
  for (int &token : tokens) token = random() % K;
  for (unsigned char &reset : resets) reset = random() % 3 == 0;
  for (int b = 0; b < B; ++b) lengths[b] = b < p.empty ? 0 : b == B - 1 ? T : random() % (T + 1);

  Call a = {};
  a.steps = T, a.batch = B, a.hidden = S, a.distinct = K, a.directions = R, a.reverse[1] = 1;
  a.projections = input(R * K * 3 * S), a.bias_hh = input(R * 3 * S), a.h0 = input(R * B * S);
  float *const weights = input(R * 3 * H * H);
  for (int i = 0; i < R * 3 * H * H; ++i)
    if (i / H % H >= S || i % H >= S) weights[i] = 0;
  a.weight_hh = weights, a.lengths = lengths.data();
  a.tokens = p.tokens ? tokens.data() : nullptr, a.resets = p.resets ? resets.data() : nullptr;
  a.h_reset = p.resets ? input(R * B * S) : nullptr;
  a.outputs = p.outputs ? output(T * B * R * S) : nullptr, a.h_last = output(R * B * S);
  std::vector<float> saved(p.saves ? R * T * B * Forward::record * S : 0, NAN);
  a.saved = p.saves ? saved.data() : nullptr;
  auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    for (int block = 0; block < R * ((B + 7) / 8) * C; block += C)
      emulator::run_cluster(C, block, Kernel::threads, Kernel::shared_bytes,
                            [&] { Kernel().run(a, emulator::current->block->shared); }, seed);
  };
  launch(Forward());
  for (size_t i = 0; i < saved.size(); ++i)  // of the padding, the others are not looked at
    if (int k = i / S % Forward::record; (k == 1 || k == 3) && std::isnan(saved[i])) out[0][0] = NAN;
  if (p.saves) {
    a.d_outputs = p.outputs ? input(T * B * R * S) : nullptr, a.d_h_last = input(R * B * S);
    a.d_a = output(R * T * B * 3 * S), a.d_q = ResetAfter ? output(R * T * B * S) : nullptr;
    a.d_h0 = output(R * B * S), a.d_h_reset = p.resets ? output(R * B * S) : nullptr;
    launch(Backward());
  }
  return out;
}

template <class Factors, int H, int C, int G, int P, bool ResetAfter>
void check(const char *name, int from) {
  for (int i = from; i < 4; ++i) {
    const Problem &p = problems[i];
    const auto first = run<Factors, H, C, G, P, ResetAfter>(p, 0);
    for (const auto &array : first)
      for (float x : array)
        if (std::isnan(x)) throw std::runtime_error(std::string(name) + ": a result is missing");
    for (unsigned seed : {1, 2})
      if (run<Factors, H, C, G, P, ResetAfter>(p, seed) != first)
        throw std::runtime_error(std::string(name) + ": results depend on the schedule");
  }
}

#define CHECK(from, ...) check<__VA_ARGS__>(#__VA_ARGS__, from)
int main() try {
  CHECK(0, Bf16, 32, 1, 2, 1, false);
  CHECK(0, Bf16, 64, 2, 2, 2, true);
  CHECK(3, Bf16, 128, 4, 2, 4, false);  // many threads: the last problem only
  CHECK(0, Tf32, 32, 1, 2, 2, true);
  CHECK(0, Tf32, 64, 4, 1, 1, false);
  CHECK(3, Tf32, 64, 4, 1, 4, true);
  CHECK(0, Float32, 32, 2, 1, 2, false);
  CHECK(0, Float32, 16, 1, 1, 1, true);
  std::puts("ok");
} catch (const std::runtime_error &error) {
  std::puts(error.what());
  return 1;
}
