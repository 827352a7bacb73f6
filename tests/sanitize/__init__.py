"""Builds of the kernels under GCC's sanitizers; see run.py."""
