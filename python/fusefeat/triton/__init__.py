"""Triton backend, one module per op family. Triton is optional: only the family modules import it."""
