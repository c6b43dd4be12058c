// gru.h for JAX: XLA FFI handlers, built if the compiler finds jaxlib's headers.
//   gru_xla_forward:  weight_ih..., weight_hh..., bias_ih..., bias_hh..., x, h0, h_reset, tokens,
//                     lengths, resets -> outputs, h_last, saved
//   gru_xla_backward: weight_ih..., weight_hh..., x, d_outputs, d_h_last, saved, tokens, lengths,
//                     resets -> d_weight_ih..., d_weight_hh..., d_bias_ih..., d_bias_hh..., d_x,
//                     d_h0, d_h_reset
// where "..." is one array for each direction, the states [directions, B, H] and saved contain all
// directions, and an empty vector replaces an absent argument or, for d_x, an unneeded result. The sizes
// of all arrays are validated. A row with a length or a token out of range is NaN, and so are all
// gradients: an error would come too late, because XLA computes asynchronously, and would make
// everything after it fail.
#if __has_include("xla/ffi/api/ffi.h")
#include <string.h>

#include <list>

#include "gru.h"
#include "xla_arrays.h"

namespace {

// Changes a forward call so that a row with a length or a token out of range has all steps and
// starts from NaN. All results of such a row are then NaN.
class InvalidRowsAsNaN {
 public:
  InvalidRowsAsNaN(gru_problem &problem, gru_direction *directions)
      : lengths(problem.lengths, problem.lengths + problem.batch) {
    const int64_t T = problem.steps, B = problem.batch;
    if (problem.tokens) tokens.assign(problem.tokens, problem.tokens + T * B);
    std::vector<int64_t> rows;
    for (int64_t b = 0; b < B; ++b) {
      bool wrong = lengths[b] < 0 || lengths[b] > T;
      for (int64_t t = 0; t < T && !tokens.empty(); ++t)
        if (int32_t &token = tokens[t * B + b]; token < 0 || token >= problem.distinct)
          token = 0, wrong = true;
      if (wrong) rows.push_back(b), lengths[b] = (int32_t)T;
    }
    problem.lengths = lengths.data();
    problem.tokens = tokens.empty() ? nullptr : tokens.data();
    const size_t row = problem.hidden * (problem.is_double ? 8 : 4);
    for (int i = 0; i < problem.directions; ++i)
      for (const void **state : {&directions[i].h0, &directions[i].h_reset}) {
        if (!*state) continue;
        states.emplace_back((const char *)*state, (const char *)*state + B * row);
        for (int64_t b : rows) memset(&states.back()[b * row], 0xff, row);
        *state = states.back().data();
      }
  }

 private:
  std::vector<int32_t> lengths, tokens;
  std::list<std::vector<char>> states;
};

// One FFI call: its arrays, which are validated, and their description for gru.h.
template <bool backward>
struct XlaCall {
  ffi::RemainingArgs &args;
  ffi::RemainingRets &results;
  const ffi::Span<const int64_t> &reverse;
  const size_t R = reverse.size(), of_args = backward ? 2 * R + 7 : 4 * R + 6,
               of_results = backward ? 4 * R + 3 : 3;
  gru_problem problem = {};
  gru_direction directions[2] = {};

  ffi::AnyBuffer arg(size_t i) const { return *args.get<ffi::AnyBuffer>(i); }
  ffi::AnyBuffer result(size_t i) const { return **results.get<ffi::AnyBuffer>(i); }
  // Outputs or their gradient may be absent, and then have no time steps. The records of forward
  // and the gradient of x may be absent, too.
  ffi::AnyBuffer outputs() const { return backward ? arg(2 * R + 1) : result(0); }
  ffi::AnyBuffer saved() const { return backward ? arg(2 * R + 3) : result(2); }
  ffi::AnyBuffer x() const { return arg(backward ? 2 * R : 4 * R); }
  static size_t rank(const ffi::AnyBuffer &buffer) { return buffer.dimensions().size(); }
  static void *offset(const ffi::AnyBuffer &buffer, size_t direction, size_t directions) {
    return buffer.element_count()
               ? (char *)buffer.untyped_data() + buffer.size_bytes() / directions * direction
               : nullptr;
  }

  // Reads the sizes from the arrays, and validates the shapes and types of all arrays.
  ffi::Error describe() {
    if (R < 1 || R > 2 || args.size() != of_args || results.size() != of_results)
      return ffi::Error::InvalidArgument("GRU: wrong number of arrays");
    const auto tokens = arg(of_args - 3), lengths = arg(of_args - 2), resets = arg(of_args - 1);
    const auto weights = arg(R), x = this->x();
    const bool has_tokens = rank(tokens) == 2, has_resets = rank(resets) == 2;
    const ffi::DataType type = weights.element_type();
    if (problem.cell < 0 || problem.cell >= GRU_CELLS)
      return ffi::Error::InvalidArgument("GRU: no such cell");
    if (type != ffi::F32 && type != ffi::F64)
      return ffi::Error::InvalidArgument("GRU: float32 and float64 only");
    if (problem.bfloat16 && type != ffi::F32)
      return ffi::Error::InvalidArgument("GRU: products in bfloat16 are of float32 only");
    if (rank(weights) != 2 || rank(lengths) != 1 || rank(x) != (has_tokens ? 2 : 3))
      return ffi::Error::InvalidArgument("GRU: an array has the wrong number of dimensions");
    problem.steps = (has_tokens ? tokens : x).dimensions()[0];
    problem.batch = lengths.dimensions()[0];
    problem.inputs = x.dimensions().back();
    problem.hidden = weights.dimensions()[1];
    problem.distinct = has_tokens ? x.dimensions()[0] : problem.steps * problem.batch;
    problem.x = x.untyped_data();
    problem.tokens = has_tokens ? (const int32_t *)tokens.untyped_data() : nullptr;
    problem.lengths = (const int32_t *)lengths.untyped_data();
    problem.resets = has_resets ? (const uint8_t *)resets.untyped_data() : nullptr;
    problem.is_double = type == ffi::F64;
    problem.directions = (int32_t)R;
    return check(expected());
  }

  // The expected types and sizes of all arrays.
  std::vector<Expected> expected() const {
    const int64_t T = problem.steps, B = problem.batch, D = problem.inputs, H = problem.hidden;
    const int64_t both = (int64_t)R, gates = gru_gates(problem.cell);
    const ffi::DataType type = problem.is_double ? ffi::F64 : ffi::F32;
    const auto tokens = arg(of_args - 3), lengths = arg(of_args - 2), resets = arg(of_args - 1);
    const auto x = this->x(), outputs = this->outputs(), saved = this->saved();
    const bool has_tokens = rank(tokens) == 2, has_resets = rank(resets) == 2;
    const Sizes of_x = has_tokens ? Sizes{problem.distinct, D} : Sizes{T, B, D};
    const Sizes of_states = {both, B, H}, of_input = {gates * H, D}, of_hidden = {gates * H, H};
    const bool return_sequences = rank(outputs) != 3 || outputs.dimensions()[0] != 0;
    const bool saves = backward || rank(saved) != 2 || saved.dimensions()[1] != 0;
    const int64_t of_saved = gru_saved_size(T, B, H, problem.cell, problem.reset_after);
    std::vector<Expected> arrays = {
        {"x", x, of_x, type},
        {"tokens", tokens, has_tokens ? Sizes{T, B} : Sizes{0}, ffi::S32},
        {"lengths", lengths, {B}, ffi::S32},
        {"resets", resets, has_resets ? Sizes{T, B} : Sizes{0}, ffi::PRED},
        {"outputs", outputs, {return_sequences ? T : 0, B, both * H}, type},
        {"saved", saved, {both, saves ? of_saved : 0}, type},
        {"h_last", backward ? arg(2 * R + 2) : result(1), of_states, type},
        {"h0", backward ? result(4 * R + 1) : arg(4 * R + 1), of_states, type},
        {"h_reset", backward ? result(4 * R + 2) : arg(4 * R + 2),
         has_resets ? of_states : Sizes{0}, type}};
    if (backward)
      arrays.push_back({"d_x", result(4 * R), rank(result(4 * R)) > 1 ? of_x : Sizes{0}, type});
    for (size_t i = 0; i < R; ++i) {
      arrays.push_back({"weight_ih", arg(i), of_input, type});
      arrays.push_back({"weight_hh", arg(R + i), of_hidden, type});
      if (backward) arrays.push_back({"d_weight_ih", result(i), of_input, type});
      if (backward) arrays.push_back({"d_weight_hh", result(R + i), of_hidden, type});
      for (size_t at : {2 * R + i, 3 * R + i})
        arrays.push_back({"bias", backward ? result(at) : arg(at), {gates * H}, type});
    }
    return arrays;
  }

  // The addresses of each direction.
  void place() {
    const size_t size = problem.is_double ? 8 : 4;
    const int64_t H = problem.hidden, both = (int64_t)R;
    const auto outputs = this->outputs(), saved = this->saved();
    for (size_t i = 0; i < R; ++i) {
      gru_direction &d = directions[i];
      d.reverse = reverse[i] != 0;
      d.ld_outputs = both * H;
      d.weight_ih = arg(i).untyped_data();
      d.weight_hh = arg(R + i).untyped_data();
      char *const half = outputs.element_count() ? (char *)outputs.untyped_data() + i * H * size
                                                   : nullptr;
      if (backward) {
        d.d_outputs = half;
        d.d_h_last = offset(arg(2 * R + 2), i, R);
        d.saved = offset(saved, i, R);
        d.d_weight_ih = result(i).untyped_data();
        d.d_weight_hh = result(R + i).untyped_data();
        d.d_bias_ih = result(2 * R + i).untyped_data();
        d.d_bias_hh = result(3 * R + i).untyped_data();
        d.d_h0 = offset(result(4 * R + 1), i, R);
        d.d_h_reset = offset(result(4 * R + 2), i, R);
      } else {
        d.bias_ih = arg(2 * R + i).untyped_data();
        d.bias_hh = arg(3 * R + i).untyped_data();
        d.h0 = offset(arg(4 * R + 1), i, R);
        d.h_reset = offset(arg(4 * R + 2), i, R);
        d.outputs = half;
        d.h_last = offset(result(1), i, R);
        d.saved = offset(saved, i, R);
      }
    }
    if (backward && result(4 * R).element_count()) problem.d_x = result(4 * R).untyped_data();
  }
};

template <bool backward>
ffi::Error execute_xla(ffi::RemainingArgs args, ffi::RemainingRets results,
                       ffi::Span<const int64_t> reverse, bool reset_after, bool bfloat16,
                       int32_t cell, int32_t threads) {
  XlaCall<backward> call = {args, results, reverse};
  call.problem.reset_after = reset_after;
  call.problem.bfloat16 = bfloat16;
  call.problem.cell = cell;
  call.problem.threads = threads;
  if (ffi::Error error = call.describe(); error.failure()) return error;
  call.place();
  const auto compute = backward ? gru_backward : gru_forward;
  int status = compute(&call.problem, call.directions);
  if (!backward && (status == GRU_BAD_LENGTH || status == GRU_BAD_TOKEN)) {
    const InvalidRowsAsNaN invalid_rows(call.problem, call.directions);
    status = compute(&call.problem, call.directions);
  }
  if (status == GRU_OUT_OF_MEMORY)
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "GRU: out of memory");
  for (size_t i = 0; status != GRU_OK && i < call.of_results; ++i)  // all bits set: a NaN of either type
    memset(call.result(i).untyped_data(), 0xff, call.result(i).size_bytes());
  return ffi::Error::Success();
}

auto binding() {
  return ffi::Ffi::Bind()
      .RemainingArgs()
      .RemainingRets()
      .Attr<ffi::Span<const int64_t>>("reverse")
      .Attr<bool>("reset_after")
      .Attr<bool>("bfloat16")
      .Attr<int32_t>("cell")
      .Attr<int32_t>("threads");
}

}  // namespace

extern "C" GRU_API XLA_FFI_Error *gru_xla_forward(XLA_FFI_CallFrame *);
extern "C" GRU_API XLA_FFI_Error *gru_xla_backward(XLA_FFI_CallFrame *);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gru_xla_forward, execute_xla<false>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gru_xla_backward, execute_xla<true>, binding());
#endif
