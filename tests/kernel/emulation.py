"""The kernel with the matrix unit emulated in plain loops (emulated_tiles.h)."""

from pathlib import Path

HEADER = Path(__file__).with_name("emulated_tiles.h")
FLAGS = ["-include", str(HEADER)]
"""Flags of every source."""
AMX = ["-D__AMX_BF16__", "-O2"]
"""Flags of the instruction set that uses the tiles, as build() takes them."""
