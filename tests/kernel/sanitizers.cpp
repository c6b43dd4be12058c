// Runs the kernel over many shapes for the sanitizers: see test_sanitizers.py. Every buffer is its own
// piece of the heap, exactly as large as gru.h asks for. Checks that results do not depend on the
// threads, and, under AddressSanitizer, that the kernel survives a caller whose other threads write to
// tokens, lengths and resets during the call. It is compiled with emulated_tiles.h, so "amx" runs
// everywhere that AVX-512 does, with the configuration of another user of the tiles in all threads.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "gru.h"

namespace {

struct Shape {
  int64_t steps, batch, inputs, hidden, distinct;  // distinct 0: no tokens
};

// The last three are so large that threads share the recurrence, the products and the packing.
const Shape shapes[] = {{5, 1, 1, 1, 0},      {7, 5, 4, 3, 4},      {4, 3, 33, 100, 0},
                        {3, 67, 9, 33, 20},   {2, 2, 401, 127, 5},  {9, 70, 130, 16, 9},
                        {0, 3, 2, 4, 2},      {3, 0, 2, 4, 2},      {40, 33, 7, 8, 30},
                        {1, 4, 31, 130, 0},   {20, 70, 40, 24, 0},  {12, 70, 40, 24, 600},
                        {2, 3, 300, 200, 0}};

template <class T>
using Buffers = std::vector<std::vector<T>>;

// Writes wild numbers to some elements of the arrays, and then their own again, until it is
// destroyed. Either stays for a time of the order of a small call.
class Disturbance {
 public:
  Disturbance(std::vector<int32_t> &tokens, std::vector<int32_t> &lengths,
              std::vector<uint8_t> &resets)
      : own_tokens(tokens), own_lengths(lengths), own_resets(resets), thread([&] {
          std::mt19937 random(1);
          for (bool wild = true; !ended || !wild; wild = !wild) {
            write(tokens, own_tokens, wild);
            write(lengths, own_lengths, wild);
            write(resets, own_resets, wild);
            for (volatile int i = random() % 10000; i > 0;) i = i - 1;
          }
        }) {}
  ~Disturbance() { ended = true, thread.join(); }

 private:
  const std::vector<int32_t> own_tokens, own_lengths;
  const std::vector<uint8_t> own_resets;
  std::atomic<bool> ended{false};
  std::thread thread;

  template <class Index>
  static void write(std::vector<Index> &array, const std::vector<Index> &own, bool wild) {
    for (size_t i = 0; i < array.size(); i += 1 + array.size() / 4)
      *(volatile Index *)&array[i] = wild ? (Index)(1 << 30 | 1) : own[i];
  }
};

// Everything that forward and backward write, for one shape, seeded so that calls can be compared.
template <class T>
Buffers<T> run(const Shape &shape, int cell, bool reset_after, bool optional, int threads,
               bool disturbed = false) {
  const auto [steps, batch, D, H, K] = shape;
  std::mt19937 random(1);
  const int64_t rows = K ? K : steps * batch, blocks = gru_gates(cell) * H;  // of the weights
  auto draw = [&](int64_t count) {
    std::vector<T> values(count);
    for (T &value : values) value = T(random() % 2001) / 1000 - 1;
    return values;
  };
  std::vector<int32_t> tokens(K ? steps * batch : 0), lengths(batch);
  tokens.reserve(1);  // or else, without steps, NULL would say that there are none
  std::vector<uint8_t> resets(steps * batch);
  for (uint8_t &reset : resets) reset = random() % 3 == 0;
  for (int32_t &token : tokens) token = (int32_t)(random() % K);
  for (int32_t &length : lengths) length = (int32_t)(random() % (steps + 1));

  Buffers<T> in, out;
  in.reserve(100), out.reserve(100);  // pointers into them must stay
  auto input = [&](int64_t count) { return in.emplace_back(draw(count)).data(); };
  auto output = [&](int64_t count) { return out.emplace_back(count).data(); };
  gru_direction directions[2] = {};
  for (gru_direction &d : directions) {
    d.reverse = &d != directions;
    d.ld_outputs = H;
    d.weight_ih = input(blocks * D);
    d.weight_hh = input(blocks * H);
    d.bias_ih = input(blocks);
    d.bias_hh = input(blocks);
    d.saved = input(gru_saved_size(steps, batch, H, cell, reset_after));
    d.h_last = output(batch * H);
    d.d_weight_ih = output(blocks * D);
    d.d_weight_hh = output(blocks * H);
    d.d_bias_ih = output(blocks);
    d.d_bias_hh = output(blocks);
    d.d_h0 = output(batch * H);
    if (!optional) continue;
    d.h0 = input(batch * H);
    d.h_reset = input(batch * H);
    d.d_h_reset = output(batch * H);
    d.outputs = output(steps * batch * H);
    d.d_outputs = input(steps * batch * H);
    d.d_h_last = input(batch * H);
  }
  const gru_problem problem = {steps,
                               batch,
                               D,
                               H,
                               rows,
                               input(rows * D),
                               K ? tokens.data() : nullptr,
                               optional ? lengths.data() : nullptr,
                               optional ? resets.data() : nullptr,
                               sizeof(T) == 8,
                               reset_after,
                               0,
                               2,
                               threads,
                               0,
                               sizeof(T) == 4 && (reset_after || cell == GRU_CELL_RNN),  // bfloat16
                               cell,
                               optional ? output(rows * D) : nullptr};
  if (disturbed) {
    const Disturbance disturbance(tokens, lengths, resets);
    for (int i = 0; i < 20; ++i) gru_forward(&problem, directions), gru_backward(&problem, directions);
    return {};
  }
  bool failed = gru_forward(&problem, directions);
  for (gru_direction &d : directions) d.bias_ih = d.bias_hh = nullptr;  // backward reads neither
  failed |= (bool)gru_backward(&problem, directions);
  if (failed) out.clear();
  return out;
}

template <class T>
bool check(const char *set) {
  for (const Shape &shape : shapes)
    for (int variant = 0; variant < 6; ++variant) {
      const int cell = variant < 4 ? GRU_CELL_GRU : GRU_CELL_RNN;
      const bool reset_after = variant & 2 && cell == GRU_CELL_GRU, optional = variant & 1;
      const Buffers<T> one = run<T>(shape, cell, reset_after, optional, 1),
                       many = run<T>(shape, cell, reset_after, optional, 64);
      if (one.empty() || one != many) {
        std::printf("%s, T %d, B %d, D %d, H %d: results depend on the threads\n", set,
                    (int)shape.steps, (int)shape.batch, (int)shape.inputs, (int)shape.hidden);
        return false;
      }
    }
  return true;
}

}  // namespace

int main() {
  emulated_tiles_have_other_user(true);
  for (const char *name : {"amx", "avx512bf16", "avx512", "avx2", "baseline"}) {
    const char *set = gru_instruction_set(name);
    if (!set) continue;
    bool ok[2];
    std::thread other([&] { ok[1] = check<double>(set); });  // calls from two threads at once
    ok[0] = check<float>(set);
    other.join();
    if (!ok[0] || !ok[1]) return 1;
#ifdef __SANITIZE_ADDRESS__  // to ThreadSanitizer, such a caller is the error
    for (const Shape &shape : shapes)
      for (bool reset_after : {false, true})
        run<float>(shape, GRU_CELL_GRU, reset_after, true, 2, true);
#endif
    if (const char *fault = emulated_tiles_fault()) {
      std::printf("%s: %s\n", set, fault);
      return 1;
    }
    std::printf("%s: ok\n", set);
  }
  return 0;
}
