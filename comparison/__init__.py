"""The parts of compare.py: what sees both frameworks."""

import common  # noqa: F401  before what takes long: see there, Ctrl-C
