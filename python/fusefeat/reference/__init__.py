"""Plain PyTorch definitions of every op: what the compiled kernels are held to. Imports torch alone."""
