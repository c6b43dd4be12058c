"""The compiled GPU kernels, the layouts of mma fragments, and driver.h. No GPU is needed.

    pytest -qs -n0 -m "long or not long" tests/gpu/test_gpu_compile.py -k "fit and sm_90"

prints what each kernel takes, and what one warp executes in a step: the code of the loop over time,
with branches that a step may skip.
"""

import ctypes
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from common.kernels.build import compiler
from common.kernels.cuda import CONFIGURATIONS, Arch, Instance, instance, nvrtc
from tools.gpu import rehearsal

ARCHS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}


def kernels(arch: Arch, factors: str, size: int) -> list[Instance]:
    """The kernels of a configuration: both resets, forward and backward; none if the architecture
    does not support it."""
    result = (instance(size, factors, *each, arch) for each in product((False, True), repeat=2))
    return [kernel for kernel in result if kernel and kernel.size == size]


CASES = [
    # By default, each configuration is compiled for the first architecture that supports it. For
    # the others, only the compilation differs; these cases are long.
    pytest.param(
        name, *key, marks=[pytest.mark.long] * (i > 0), id=f"{name}-{'-'.join(map(str, key))}"
    )
    for key in CONFIGURATIONS
    for i, name in enumerate(name for name, arch in ARCHS.items() if kernels(arch, *key))
]


def of_a_wheel(pattern: str) -> Path | None:
    """The first such file of NVIDIA's wheels."""
    nvidia = pytest.importorskip("nvidia", reason="needs NVIDIA's wheels")
    return next((path for each in nvidia.__path__ for path in Path(each).glob(pattern)), None)


def of_a_step(listing: str) -> list[str]:
    """The instructions of the loop over time: the shortest loop that contains every mma. After
    the function's EXIT, there are only loops that wait for a barrier."""
    code: list[str] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            code.append(instruction[1])
    products = [at for at, line in enumerate(code) if "HMMA" in line]
    end_of_all = next(at for at in range(products[-1], len(code)) if "EXIT" in code[at])
    loops = []
    for end, line in enumerate(code[:end_of_all]):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels[target[1]] <= products[0] and products[-1] <= end:
            loops.append(code[labels[target[1]] : end + 1])
    return min(loops, key=len)


@pytest.mark.parametrize(("name", "factors", "size"), CASES)
def test_kernels_fit(name: str, factors: str, size: int) -> None:
    """Weights and sums stay in registers, the loop over time is not unrolled, and has the products
    and barriers that the algorithm needs, no more."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
    nvdisasm = shutil.which("nvdisasm") or of_a_wheel("*/bin/nvdisasm")
    if nvdisasm is None:
        pytest.skip("needs nvdisasm")
    for kernel in kernels(ARCHS[name], factors, size):
        cluster, _, parts = kernel.configuration
        folder = nvrtc.compiled(kernel, ARCHS[name])
        output = re.findall(
            r"(\d+) (?:bytes stack|bytes spill|registers)", (folder / "log.txt").read_text()
        )
        *local, registers = map(int, output)  # local memory is the stack's, or spilled
        command = [str(nvdisasm), "-c", str(folder / "kernel.cubin")]
        step = of_a_step(subprocess.check_output(command, text=True))
        products, barriers, waits = (
            sum(word in line for line in step) for word in ("HMMA", "BAR.SYNC", "SYNCS.PHASECHK")
        )
        about = (
            f"{kernel.template:34} {registers} registers; a step has {len(step)} instructions, "
            f"{products} mma, {barriers} barriers of threads, {waits} waits for other blocks"
        )
        print(about)
        assert local == [0, 0, 0], about
        # Registers are allocated in units of 8 per thread.
        assert -(-registers // 8) * 8 * kernel.threads <= 65_536, about
        assert kernel.shared_bytes <= (163 if name == "sm_80" else 227) * 1024, about
        each = {"Bf16": 1 / 16, "Tf32": 1 / 8, "Float32": 3 / 8}[factors]
        assert products == 3 * size // parts * each, about
        exchanges = 1 if kernel.reset_after else 2
        assert waits == (exchanges if cluster > 1 else 0), about
        assert barriers == exchanges * ((cluster == 1) + (parts > 1)), about


def test_cluster_kernels_require_sm_90() -> None:
    result = [name for name, *_ in (case.values for case in CASES)]
    assert [result.count(name) for name in ARCHS] == [4, 11, 11]
    assert instance(64, "Bf16", False, False, (7, 5)) is None


def offsets(lane_strides: tuple[int, int], value_strides: tuple[int, ...]) -> np.ndarray:
    """[lane, value] -> offset, of the layout ((4, 8), (2, ...)):(lane_strides, value_strides)."""
    lane, value = np.arange(32)[:, None], np.arange(2 ** len(value_strides))
    of_lane = lane % 4 * lane_strides[0] + lane // 4 * lane_strides[1]
    return of_lane + sum((value >> i & 1) * stride for i, stride in enumerate(value_strides))


@pytest.mark.parametrize("bf16", [False, True])
def test_mma_fragment_layout_matches_cutlass(bf16: bool, tmp_path: Path) -> None:
    """The emulator's mma has the layouts of CUTLASS's SM80_16x8x16_F32BF16BF16F32_TN and
    SM80_16x8x8_F32TF32TF32F32_TN, whose offsets are column-major in (m, k), (n, k) and (m, n).
    So has the kernel, since its results in the emulator are right."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    k = 16 if bf16 else 8
    rng = np.random.default_rng(k)
    a, b, c = (
        rng.integers(-100, 100, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8))
    )
    of_a = offsets((32, 1), (16, 8, 128)) if bf16 else offsets((16, 1), (8, 64))
    of_b = offsets((16, 1), (8, 64)) if bf16 else offsets((8, 1), (32,))
    of_c = offsets((32, 1), (16, 8))

    def words(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values).view(np.uint32)  # integers this small are exact
        return bits[:, ::2] >> 16 | bits[:, 1::2] & 0xFFFF0000 if bf16 else bits

    of_each = zip((a, b.T, c), (of_a, of_b, of_c), strict=True)
    a_words, b_words, c_words = (each.flatten("F")[at] for each, at in of_each)
    arguments = np.hstack([words(a_words), words(b_words), c_words.view(np.uint32)])
    assert arguments.shape == (32, 10)
    actual = np.zeros((32, 4), np.float32)
    rehearsal.build(tmp_path, [])
    driver = ctypes.CDLL(str(tmp_path / rehearsal.LIBRARY))
    driver.mock_mma(*(ctypes.c_void_p(each.ctypes.data) for each in (arguments, actual)), int(bf16))
    np.testing.assert_array_equal(actual, (a @ b + c).flatten("F")[of_c])


SAME_AS_NVIDIA = """
#include <cuda.h>
#include <stddef.h>
#include <array>
#include <string_view>
namespace ours {
#include "ours.h"
}
template <class R, class... A>
constexpr std::array<size_t, sizeof...(A) + 1> sizes(R (*)(A...)) {
  return {sizeof(R), sizeof(A)...};
}
#define SAME(x, y) static_assert((x) == (y));
#define SIZE(type) SAME(sizeof(ours::type), sizeof(type))
#define PLACE(type, field) SAME(offsetof(ours::type, field), offsetof(type, field)) \
  SAME(sizeof(((ours::type *)0)->field), sizeof(((type *)0)->field))
// A macro of cuda.h may map a function to a newer version with another name.
#define TEXT(name) #name
#define FUNCTION(name) SAME(std::string_view(#name), TEXT(name)) \
  SAME(sizes(&ours::our_##name), sizes(&name))

SAME(ours::MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
SAME(ours::NON_PORTABLE_CLUSTER_SIZE_ALLOWED, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
SAME(ours::CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
SIZE(CUlaunchAttribute) PLACE(CUlaunchAttribute, id) PLACE(CUlaunchAttribute, value.clusterDim.z)
SIZE(CUlaunchConfig) PLACE(CUlaunchConfig, hStream) PLACE(CUlaunchConfig, sharedMemBytes)
PLACE(CUlaunchConfig, attrs) PLACE(CUlaunchConfig, numAttrs) PLACE(CUlaunchConfig, gridDimX)
PLACE(CUlaunchConfig, gridDimY) PLACE(CUlaunchConfig, gridDimZ) PLACE(CUlaunchConfig, blockDimX)
PLACE(CUlaunchConfig, blockDimY) PLACE(CUlaunchConfig, blockDimZ)
"""


def test_driver_declarations_match_nvidias(tmp_path: Path) -> None:
    installed = Path("/usr/local/cuda/include/cuda.h")
    header = installed if installed.exists() else of_a_wheel("*/include/cuda.h")
    cxx = compiler()
    if header is None or cxx is None:
        pytest.skip("needs NVIDIA's cuda.h and a C++ compiler")
    text = (Path(nvrtc.__file__).parent / "driver.h").read_text()
    functions = re.findall(r"\b(cu[A-Z]\w+)\(", text)
    assert len(functions) == 9
    (tmp_path / "ours.h").write_text(re.sub(r"\b(cu[A-Z]\w+)\(", r"our_\1(", text))
    source = tmp_path / "same.cpp"
    source.write_text(SAME_AS_NVIDIA + "".join(f"FUNCTION({name})\n" for name in functions))
    command = [cxx, "-std=c++20", "-fsyntax-only", "-I", str(header.parent), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
