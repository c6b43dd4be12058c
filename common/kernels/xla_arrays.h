// Validation of the shapes and types of the arrays of an XLA FFI call. Requires jaxlib's headers.
#pragma once
#include "xla/ffi/api/ffi.h"

#include <string>
#include <vector>

namespace {

namespace ffi = xla::ffi;

using Sizes = std::vector<int64_t>;

// An array of a call, and its expected sizes and type.
struct Expected {
  const char *name;
  ffi::AnyBuffer array;
  Sizes sizes;
  ffi::DataType type;
};

inline std::string described(const Sizes &sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline ffi::Error check(const std::vector<Expected> &arrays) {
  for (const Expected &each : arrays) {
    const Sizes actual(each.array.dimensions().begin(), each.array.dimensions().end());
    if (actual != each.sizes)
      return ffi::Error::InvalidArgument(std::string("GRU: ") + each.name + ": expected shape " +
                                         described(each.sizes) + ", found " + described(actual));
    if (each.array.element_type() != each.type)
      return ffi::Error::InvalidArgument(std::string("GRU: ") + each.name + ": wrong dtype");
  }
  return ffi::Error::Success();
}

}  // namespace
