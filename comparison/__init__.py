"""The parts of compare.py: what sees both frameworks."""
