// Emulates the matrix unit of Intel's processors (AMX) in plain loops, for tests of tiles.h on other
// processors. Every source of the kernel is compiled with `-include` of this file, and the instruction
// set "amx" with -D__AMX_BF16__ (see emulation.py). The first operation for which the hardware would
// raise a signal, or that is a misuse by the kernel, is recorded as a fault; its result is NaN.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace emulated_tiles {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

union Tile {
  uint8_t bytes[16][64];
  uint16_t numbers[16][32];
  float sums[16][16];
};

struct Unit {
  Config config;
  Tile tiles[8];
  bool in_use;  // the kernel has configured it
};

inline thread_local Unit unit;
inline std::atomic<const char *> first_fault{nullptr};
inline std::atomic<int> threads{0};            // threads that have not released the tiles
inline std::atomic<int> products{0};
inline std::atomic<bool> has_other_user{false};  // leaves its configuration in the threads

inline bool require(bool condition, const char *fault) {
  const char *none = nullptr;
  if (!condition) first_fault.compare_exchange_strong(none, fault);
  return condition;
}

inline void load_config(const void *from) {
  Config config;
  memcpy(&config, from, sizeof config);
  bool valid = config.palette == 1 && config.start_row == 0;
  for (uint8_t each : config.reserved) valid = valid && each == 0;
  for (int i = 0; i < 16; ++i)
    valid = valid && config.rows[i] <= (i < 8 ? 16 : 0) && config.row_bytes[i] <= (i < 8 ? 64 : 0) &&
            !config.rows[i] == !config.row_bytes[i];
  require(valid, "LDTILECFG: invalid configuration");
  threads += !unit.in_use;
  unit = {};
  unit.config = config;
  unit.in_use = true;
}

inline void release() {
  threads -= unit.in_use;
  unit = {};
  if (!has_other_user) return;
  unit.config.palette = 1;
  for (int i = 0; i < 8; ++i) unit.config.rows[i] = 1, unit.config.row_bytes[i] = 4;
}

inline bool configured(int tile) { return unit.config.palette && unit.config.rows[tile]; }

inline void load(int tile, const void *from, int64_t stride) {
  if (!require(configured(tile), "TILELOADD: the tile is not configured")) return;
  unit.tiles[tile] = {};
  for (int i = 0; i < unit.config.rows[tile]; ++i)
    memcpy(unit.tiles[tile].bytes[i], (const char *)from + i * stride, unit.config.row_bytes[tile]);
}

inline void store(int tile, void *to, int64_t stride) {
  if (!require(configured(tile), "TILESTORED: the tile is not configured")) return;
  for (int i = 0; i < unit.config.rows[tile]; ++i)
    memcpy((char *)to + i * stride, unit.tiles[tile].bytes[i], unit.config.row_bytes[tile]);
}

inline void zero(int tile) {
  if (require(configured(tile), "TILEZERO: the tile is not configured")) unit.tiles[tile] = {};
}

inline float number(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// Adds the first and the second products of the pairs separately, then both sums to the tile.
inline void multiply(int sum, int left, int right) {
  const Config &c = unit.config;
  const bool fits = configured(sum) && configured(left) && configured(right) &&
                    c.rows[sum] == c.rows[left] && c.row_bytes[left] == 4 * c.rows[right] &&
                    c.row_bytes[sum] == c.row_bytes[right];
  if (!require(fits, "TDPBF16PS: the shapes of the tiles do not fit")) {
    for (auto &row : unit.tiles[sum].sums)
      for (float &x : row) x = __builtin_nanf("");
    return;
  }
  ++products;
  for (int i = 0; i < c.rows[sum]; ++i) {
    float sums[2][16] = {};
    for (int k = 0; k < c.rows[right]; ++k)
      for (int half = 0; half < 2; ++half) {
        const float x = number(unit.tiles[left].numbers[i][2 * k + half]);
        for (int j = 0; j < 16; ++j)
          sums[half][j] += x * number(unit.tiles[right].numbers[k][2 * j + half]);
      }
    for (int j = 0; j < c.row_bytes[sum] / 4; ++j)
      unit.tiles[sum].sums[i][j] += sums[0][j] + sums[1][j];
  }
}

inline long system_call(long number, long first = 0, long second = 0) {
  if (number != SYS_arch_prctl || first != 0x1023) return syscall(number, first, second);
  return getenv("EMULATED_TILES_REFUSED") || second != 18 ? -1 : 0;
}

// Whether a feature of the processor is visible. EMULATED_TILES_ALONE hides AVX-512 BF16.
inline bool allows(const char *feature) {
  return strcmp(feature, "avx512bf16") || !getenv("EMULATED_TILES_ALONE");
}

}  // namespace emulated_tiles

#define EMULATED extern "C" __attribute__((used, visibility("default"))) inline
EMULATED const char *emulated_tiles_fault() {
  return emulated_tiles::threads ? "tiles are not released" : emulated_tiles::first_fault.load();
}
EMULATED int emulated_tiles_products() { return emulated_tiles::products; }
EMULATED void emulated_tiles_have_other_user(int yes) {
  emulated_tiles::has_other_user = yes;
  emulated_tiles::release();
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tiles::load_config
#define _tile_release emulated_tiles::release
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_zero emulated_tiles::zero
#define _tile_dpbf16ps emulated_tiles::multiply
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = 1 << 5, *(d) = 1 << 22 | 1 << 24)
#define __builtin_cpu_supports(name) (emulated_tiles::allows(name) && __builtin_cpu_supports(name))
#define syscall emulated_tiles::system_call
