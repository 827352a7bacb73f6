"""Operators as PyTorch sees them: fake kernels, autograd formulas and vmap rules, a module per family."""
