// One call of gru.h: its memory, and the order in which the threads compute its parts.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "schedule.h"
#include "threads.h"
#include "weights_cache.h"

namespace {

// The progress of a row block that threads share: they claim its tasks atomically, and wait until
// all tasks of the previous part are done. On a busy machine, where waiting takes long, one thread
// continues alone.
struct Progress {
  alignas(64) std::atomic<int64_t> claimed{0};
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<bool> busy{false};
};

template <class T>
class Execution {
 public:
  Execution(const Kernels<T> &kernels, const gru_problem &problem, const gru_direction *directions,
            bool backward)
      : kernels(kernels),
        p(problem),
        directions(directions),
        backward(backward),
        threads(std::max(1, std::min(p.threads, count_cores()))),
        pool(Pool::lock(threads)),
        lock(pool.in_use, std::adopt_lock),
        schedule(p, count_blocks(p.batch), backward),
        row_blocks(schedule.row_blocks) {
    describe();
    choose_threads();
    allocate();
  }

  void run() {
    do {
      changed = false;
      pack();
      if (!backward && !projects_while_walking()) project();
      walk();
    } while (changed);
    if (backward) reduce_gradients();
    pool.finish();
  }

 private:
  const Kernels<T> &kernels;
  const gru_problem &p;
  const gru_direction *const directions;
  const bool backward;
  const int threads;
  Pool &pool;
  const std::lock_guard<std::mutex> lock;
  Schedule schedule;
  std::vector<RowBlock> &row_blocks;
  Call call = {};
  bool inference = false;
  std::vector<PackedWeights *> cached;             // inference only: one entry per direction
  std::atomic<bool> packed_before[2] = {};         // whether the entry holds valid weights
  std::atomic<bool> changed{false};                // whether weights of an entry have changed
  std::vector<Scratch<T>> scratch;                 // of each thread
  int64_t panels = 0, panels_of_x = 0;

  int share(int64_t work, int64_t worth) const { return work > worth ? threads : 1; }

  int64_t rows() const { return call.cell.gates * p.hidden; }  // of the weights

  int64_t multiplications() const { return p.directions * call.live * rows() * p.inputs; }

  void describe() {
    const int64_t H = p.hidden, V = kernels.width;
    call.problem = &p;
    call.directions = directions;
    call.cell = kernels.cells[p.cell][p.reset_after != 0].shape;
    call.row_blocks = row_blocks.data();
    call.blocks = (int64_t)row_blocks.size() / p.directions;
    call.chunk = std::max((p.batch + call.blocks - 1) / call.blocks, chunk_rows);
    call.gate_stride = round_up(H, V);
    call.weight_stride = round_up(H, 2 * V);
    call.state_stride = odd_stride(call.weight_stride, V);
    call.gates_stride = odd_stride(round_up(call.columns(), 2 * V), V);
    call.input_stride = odd_stride(round_up(p.inputs, V), V);
    call.live = schedule.place.empty() ? p.distinct : (int64_t)schedule.live_rows.size();
    if (!schedule.place.empty())
      call.live_rows = schedule.live_rows.data(), call.place = schedule.place.data();
    panels = panels_of(call.columns(), V);
    // Without inputs there is one empty panel, because b has a gradient, although the weights have
    // none.
    panels_of_x = std::max<int64_t>(panels_of(p.inputs, V), 1);
    inference = !backward;
    for (int i = 0; i < p.directions; ++i) inference = inference && !directions[i].saved;
    // Inference in float32 and float64 is limited by the products, not by memory, and would have to
    // copy inputs that the product can read where they are.
    const int64_t block_rows = std::max<int64_t>(row_blocks[0].rows, 1);
    if (!p.tokens && !(inference && !p.bfloat16) && block_rows * p.steps >= input_rows)
      call.projected_steps = input_rows / block_rows;
  }

  void choose_threads() {
    const int64_t most =
        p.directions * rows() * (p.distinct * p.inputs + p.steps * p.batch * p.hidden);
    const bool is_spinning = p.openmp == GRU_WHILE_SPINNING && share(most, worth_testing) > 1 &&
                             pool.openmp_spins();
    pool.openmp = p.openmp == GRU_ALWAYS || is_spinning ? find_openmp() : nullptr;
    pool.team = p.threads;
  }

  int step_threads() const {
    const int64_t verified = inference ? p.directions * rows() * (p.hidden + p.inputs) : 0;
    const int64_t states = p.directions * p.steps * p.batch * rows() * p.hidden;
    return share(states + verified * 8, worth_multiplying);
  }

  // Whether threads share the tasks of the steps of the only row block.
  bool shares_steps() const {
    return !backward && row_blocks.size() == 1 && step_threads() > 1 && p.hidden >= 2 * task_units;
  }

  // Whether the thread of a row block projects the inputs of its next steps, whose projections then
  // stay in the second-level cache. All threads must be busy with row blocks of their own.
  bool projects_while_walking() const {
    const int busy = share(multiplications(), worth_multiplying);
    return !backward && !shares_steps() && call.projected_steps && busy <= step_threads() &&
           row_blocks.size() % busy == 0;
  }

  // The number of elements of a direction's packed weights.
  int64_t packed_size() const {
    const int64_t of_input =
        backward ? p.d_x ? panels_of_x * call.columns() : 0 : panels * (p.inputs + 1);
    return rows() * call.weight_stride + of_input * 2 * kernels.width;
  }

  void allocate() {
    for (int i = 0; inference && i < p.directions; ++i) {
      const gru_direction &d = directions[i];
      cached.push_back(&pool.weights.find(
          {(int64_t)d.weight_ih, (int64_t)d.weight_hh, p.hidden, p.inputs, i, p.is_double,
           p.bfloat16, p.reset_after, p.nn_order, kernels.width, p.cell}));
      call.packed[i] = cached[i]->memory.reserve(packed_size() * sizeof(T));
      packed_before[i] = cached[i]->filled;
    }
    lay_out(Arena{(uintptr_t)pool.memory.reserve(lay_out(Arena{}))});
    const size_t saved = p.steps * p.batch * p.hidden * call.cell.saved * sizeof(T);
    for (int i = 0; !backward && i < p.directions; ++i)
      if (directions[i].saved) want_huge_pages(directions[i].saved, saved);
  }

  // Divides the memory; returns the end of the used part.
  size_t lay_out(Arena arena) {
    const bool in_walk = projects_while_walking();
    scratch.clear();
    for (int i = 0; i < p.directions; ++i) {
      if (!inference) call.packed[i] = arena.take<T>(packed_size());
      call.packed_inputs[i] = (T *)call.packed[i] + rows() * call.weight_stride;
      if (!in_walk) call.projections[i] = arena.take<T>(call.live * call.gates_stride);
    }
    call.inputs = arena.take<T>(backward ? panels_of_x * call.live * 2 * kernels.width : 0);
    for (int thread = 0; thread < threads; ++thread) scratch.push_back(lay_out_scratch(arena));
    for (size_t i = 0; backward && i < row_blocks.size(); ++i) {
      row_blocks[i].d_weights = arena.take<T>(call.columns() * call.weight_stride);
      row_blocks[i].d_bias = arena.take<T>(call.columns());
      row_blocks[i].d_projections = arena.take<T>(d_projections_size(i));
    }
    return arena.at;
  }

  int64_t d_projections_size(int64_t block) const {
    return schedule.distinct[block % call.blocks] * call.columns();
  }

  Scratch<T> lay_out_scratch(Arena &arena) const {
    const int64_t rows = (p.batch + call.blocks - 1) / call.blocks, V = kernels.width;
    const int64_t states = rows * call.state_stride, forward_only = backward ? 0 : states;
    const int64_t gathered = backward ? call.chunk : 0;
    Scratch<T> s;
    s.h = arena.take<T>(states);
    s.after = arena.take<T>(forward_only);
    s.between[0] = arena.take<T>(states);
    s.between[1] = arena.take<T>(forward_only);
    s.operand = arena.take<T>(forward_only);
    s.tile = arena.take<T>(rows * 2 * V);
    s.gates = arena.take<T>(gathered * call.gates_stride);
    s.states = arena.take<T>(gathered * call.state_stride);
    s.operands = arena.take<T>(gathered * call.state_stride);
    s.inputs = arena.take<T>((backward ? gradient_rows : input_rows * call.input_stride) + V);
    s.sums = arena.take<T>(backward ? gradient_rows * gradient_bytes / sizeof(T) : 0);
    s.factor = arena.take<T>(p.bfloat16 ? p.directions * input_rows * call.gates_stride : 0);
    s.projections = arena.take<T>(projects_while_walking() ? input_rows * call.gates_stride : 0);
    s.projected_before = 0;
    s.source = arena.take<const T *>(rows);
    s.next = arena.take<const T *>(rows);
    return s;
  }

  // Packs the weights, unless an earlier inference did.
  void pack() {
    bool complete = true;
    for (int i = 0; i < p.directions; ++i) complete = complete && packed_before[i];
    if (complete) return;
    const int pack_threads = share(p.directions * rows() * (p.hidden + p.inputs), worth_sharing);
    gru_direction sources[2] = {};
    std::copy_n(directions, p.directions, sources);
    if (inference) copy_weights(sources, pack_threads);
    Call from = call;
    from.directions = sources;
    pool.run(2 * p.directions, pack_threads, [&](int64_t i, int) {
      const int direction = (int)i / 2;
      if (packed_before[direction]) return;
      if (i % 2 && (!backward || p.d_x)) kernels.pack_input_weights(from, direction, backward);
      if (i % 2 == 0) kernels.pack_weights(from, direction, backward);
    });
    for (PackedWeights *each : cached) each->filled = true;
  }

  // Another thread may write to the weights at the same time. The weights that an inference keeps
  // are therefore packed from a copy, whose fingerprint is kept with them.
  void copy_weights(gru_direction *sources, int pack_threads) {
    const int64_t H = p.hidden, D = p.inputs;
    const size_t size = (rows() * (D + H + 2) * sizeof(T) + 4 * 64) * p.directions;
    Arena arena{(uintptr_t)pool.copies.reserve(size)};
    for (int i = 0; i < p.directions; ++i) {
      sources[i].weight_ih = arena.take<T>(rows() * D);
      sources[i].weight_hh = arena.take<T>(rows() * H);
      sources[i].bias_ih = arena.take<T>(rows());
      sources[i].bias_hh = arena.take<T>(rows());
    }
    pool.run(2 * p.directions, pack_threads, [&](int64_t i, int) {
      const int direction = (int)i / 2, piece = (int)i % 2;
      if (packed_before[direction]) return;
      copy_piece<T>(p, call.cell.gates, directions[direction], sources[direction], piece);
      cached[direction]->fingerprint[piece] =
          fingerprint(kernels, p, call.cell.gates, sources[direction], piece);
    });
  }

  // Verifies a piece of the packed weights of an earlier inference. This takes place during the
  // recurrence; if the weights have changed, run() packs them and starts the recurrence again.
  void verify(int direction, int piece) {
    if (packed_before[direction] &&
        fingerprint(kernels, p, call.cell.gates, directions[direction], piece) !=
            cached[direction]->fingerprint[piece])
      packed_before[direction] = false, changed = true;
  }

  // Distributes work items among threads.
  template <class Item>
  void distribute(int64_t count, int item_threads, const Item &item) {
    pool.run(count, item_threads, [&](int64_t i, int thread) {
      item(i, thread);
      kernels.release_tiles();
    });
  }

  template <class Product>
  void multiply(const std::vector<Part> &parts, const Product &product) {
    distribute((int64_t)parts.size(), share(multiplications(), worth_multiplying),
               [&](int64_t i, int thread) { product(call, scratch[thread], parts[i]); });
  }

  // Computes the projections before the recurrence.
  void project() {
    if (!call.projected_steps)
      return multiply(cut(p.directions, call.live, panels, input_rows, input_panels),
                      kernels.project);
    std::vector<Part> parts;
    for (const RowBlock &block : row_blocks)
      for (int64_t step = 0; step < p.steps; step += call.projected_steps)
        for (int64_t panel = 0; panel < panels; panel += input_panels)
          parts.push_back(projection(block, step, panel, std::min(panel + input_panels, panels)));
    multiply(parts, kernels.project);
  }

  // The part that projects the inputs of a row block from this step on, in its direction.
  Part projection(const RowBlock &block, int64_t step, int64_t first, int64_t last) const {
    const int64_t end = std::min(step + call.projected_steps, p.steps);
    if (directions[block.direction].reverse)
      return {block.direction, p.steps - end, p.steps - step, first, last, &block};
    return {block.direction, step, end, first, last, &block};
  }

  // Computes all time steps of all row blocks; an inference also verifies the packed weights.
  void walk() {
    const int step_threads = this->step_threads();
    const bool shared = shares_steps();
    const int64_t tasks = shared ? p.hidden / task_units : 1;
    // The work items after the row blocks verify the packed weights, one piece each. If threads
    // share a row block, such an item verifies both pieces of a direction and then joins the block.
    const int64_t verifications = inference ? 2 * p.directions : 0, pieces = shared ? 2 : 1;
    const int64_t helpers = std::min<int64_t>(tasks, step_threads) - 1;
    const int64_t count = (int64_t)row_blocks.size() + std::max(verifications / pieces, helpers);
    Progress progress;
    if (shared) begin(row_blocks[0], scratch[0]);
    distribute(count, step_threads, [&](int64_t i, int thread) {
      const int64_t verifier = i - (int64_t)row_blocks.size();
      for (int64_t j = verifier * pieces;
           verifier >= 0 && j < (verifier + 1) * pieces && j < verifications; ++j)
        verify((int)j / 2, (int)j % 2);
      if (shared)
        return walk_forward(row_blocks[0], scratch[0], scratch[thread], progress, tasks, i == 0);
      if (verifier >= 0) return;
      if (backward) return walk_backward(i, scratch[thread]);
      Progress own;
      begin(row_blocks[i], scratch[thread]);
      walk_forward(row_blocks[i], scratch[thread], scratch[thread], own, 1, true);
      finish(row_blocks[i], scratch[thread]);
    });
    if (shared) finish(row_blocks[0], scratch[0]);
  }

  // begin sets the initial states of a row block; finish writes the last states to h_last.
  void begin(const RowBlock &block, const Scratch<T> &all) {
    const gru_direction &d = directions[block.direction];
    const int64_t H = p.hidden, steps = p.steps;
    for (int64_t i = 0; i < block.rows; ++i) {
      const bool begins = p.resets && steps && resets_at(p, d, block, d.reverse ? steps - 1 : 0, i);
      T *const h = all.h + i * call.state_stride;
      for (int64_t u = 0; u < call.state_stride; ++u) {
        const int64_t at = block.row[i] * H + u;
        h[u] = u >= H ? T(0) : begins ? reset_state<T>(d, at) : d.h0 ? ((const T *)d.h0)[at] : T(0);
      }
    }
  }

  void finish(const RowBlock &block, const Scratch<T> &all) {
    for (int64_t i = 0; i < block.rows; ++i)
      memcpy((T *)directions[block.direction].h_last + block.row[i] * p.hidden,
             state_of(all, p.steps) + i * call.state_stride, p.hidden * sizeof(T));
  }

  void walk_forward(const RowBlock &block, const Scratch<T> &all, Scratch<T> &own,
                    Progress &progress, int64_t tasks, bool is_owner) {
    const auto forward = kernels.cells[p.cell][p.reset_after != 0].forward;
    const int64_t V = kernels.width, pairs = call.weight_stride / (2 * V);
    const int parts = call.cell.parts(), phases = call.cell.phases;
    while (is_owner || !progress.busy) {
      const int64_t task = progress.claimed.fetch_add(1), before = task / tasks, i = task % tasks;
      if (before >= p.steps * parts) return;
      if (Pool::wait([&] { return progress.done >= before * tasks; })) progress.busy = true;
      const int part = (int)(before % parts);
      if (!call.projections[block.direction] && before % (call.projected_steps * parts) == 0) {
        const Part steps = projection(block, before / parts, 0, panels);
        own.projected_before = block.before[steps.from];
        kernels.project(call, own, steps);
      }
      forward(call, block, all, own,
              {before / parts, part, parts == 1 ? phases : part + 1, pairs * i / tasks * 2 * V,
               pairs * (i + 1) / tasks * 2 * V});
      progress.done.fetch_add(1);
    }
  }

  void walk_backward(int64_t i, const Scratch<T> &own) {
    const RowBlock &block = row_blocks[i];
    memset(block.d_weights, 0, call.columns() * call.weight_stride * sizeof(T));
    memset(block.d_bias, 0, call.columns() * sizeof(T));
    memset(block.d_projections, 0, d_projections_size(i) * sizeof(T));
    kernels.cells[p.cell][p.reset_after != 0].backward(call, block, own);
  }

  void reduce_gradients() {
    const int64_t D = p.inputs, V = kernels.width;
    const int64_t piece = 128, of_weights = (rows() + piece - 1) / piece;
    const int64_t of_rows = (call.live + piece - 1) / piece;
    const int64_t of_tokens = p.tokens ? of_rows : 0, each = of_weights + of_tokens;
    const int64_t elements =
        p.directions * call.blocks * rows() * (p.hidden + call.live) + call.live * D;
    pool.run(of_rows + p.directions * each, share(elements, worth_sharing), [&](int64_t i, int) {
      auto up_to = [&](int64_t from, int64_t end) { return std::min(from + piece, end); };
      if (i < of_rows) return kernels.pack_inputs(call, i * piece, up_to(i * piece, call.live));
      const int direction = (int)((i - of_rows) / each);
      const int64_t part = (i - of_rows) % each, at = part * piece, row = at - of_weights * piece;
      if (row < 0) return kernels.reduce_weights(call, direction, at, up_to(at, rows()));
      kernels.reduce_projections(call, direction, row, up_to(row, call.live));
    });
    const int64_t most = gradient_bytes / (int64_t)(2 * V * sizeof(T));
    const int product_threads = share(multiplications(), worth_multiplying);
    multiply(cut(p.directions, call.columns(), panels_of_x,
                 gradient_rows, most, 2 * product_threads),
             kernels.input_weight_gradient);
    if (p.d_x && !schedule.place.empty()) memset(p.d_x, 0, p.distinct * D * sizeof(T));
    if (p.d_x)
      multiply(cut(1, call.live, panels_of_x, input_rows, input_panels), kernels.input_gradient);
  }
};

}  // namespace
