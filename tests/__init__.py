"""The tests. Their folders mirror the product's: see README.md here."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository: the working directory of the programs that tests start."""
