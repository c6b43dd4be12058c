"""Builds the CPU kernel (common/kernels) along with the package, where there is a compiler."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from common.kernels import LIBRARY, build


class BuildKernel(build_ext):
    """Puts libgru.so beside common/kernels/*.py: a plain shared library, no Python module."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        build.build(folder)  # without a compiler it says so and goes on: scan takes over

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)


setup(
    ext_modules=[Extension("common.kernels.libgru", [], optional=True)],
    cmdclass={"build_ext": BuildKernel},
)
