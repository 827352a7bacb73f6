"""A small sweep of every GPU backend for compute-sanitizer: each layout, type and edge once, forward and backward.

Every size is small because the tools slow kernels down a hundredfold; sizes are odd so that every tail is met.
Results are held to the reference too: a sweep that computes nonsense proves nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

# Torch's caching allocator hands out parts of large blocks, inside which an overrun is not seen.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import fusefeat
import torch
from fusefeat import backends
from torch import Tensor

# A few roundings of each type, relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def padded(dtype: torch.dtype, bags: int, tokens: int, channels: int) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(bags, tokens, channels).to(dtype)
    mask = torch.rand(bags, tokens) < 0.7
    mask[0] = False
    return x, {"mask": mask}


def packed(dtype: torch.dtype, lengths: list[int], channels: int) -> tuple[Tensor, dict[str, Tensor]]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(int(offsets[-1]), channels).to(dtype), {"cu_seqlens": offsets}


def cases() -> Iterator[tuple[str, Tensor, dict[str, Tensor], int | None, int]]:
    """Name, tokens, layout, number of queries, and the step between the channels that are used."""
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        yield f"padded {name}", *padded(dtype, 3, 37, 33), None, 1
        yield f"packed {name} K=3", *packed(dtype, [5, 0, 131, 1], 24), 3, 1
    yield "bag of many blocks", *packed(torch.float32, [3, 2500, 2], 40), None, 1
    yield "every second channel", *padded(torch.float32, 2, 65, 64), 2, 2
    yield "one token", *padded(torch.float32, 2, 1, 1), None, 1


def outcome(
    name: str, inputs: tuple[Tensor, Tensor], options: dict[str, Tensor], step: int, backend: str, device: str
) -> list[Tensor]:
    function: Any = getattr(fusefeat, name)
    x, other = (tensor.to(device).requires_grad_() for tensor in inputs)
    options = {key: tensor.to(device) for key, tensor in options.items()}
    out, weights = function(x[..., ::step], other, return_weights=True, backend=backend, **options)
    loss = (out * out).sum() + (weights * weights).sum()
    return [out, weights, *torch.autograd.grad(loss, (x, other))]


def shared_cases() -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Name, and input, context, weight, bias and row weights of the shared objective."""
    for dtype in TOLERANCE:
        for channels, features in ((33, 150), (48, 1100)):
            sizes = (70, channels), (65, channels), (features, channels), (features,)
            tensors = [torch.randn(*size) / channels**0.5 for size in sizes]
            row_weight = torch.rand(135) * (torch.rand(135) < 0.8)
            name = f"{str(dtype).removeprefix('torch.')} {channels} {features}"
            yield name, tuple(tensor.to(dtype) for tensor in (*tensors, row_weight))


def shared_outcome(inputs: tuple[Tensor, ...], backend: str, device: str) -> list[Tensor]:
    x, context, weight, bias, row_weight = (tensor.to(device).requires_grad_() for tensor in inputs)
    out = fusefeat.shared_objective(x, context, weight, bias, row_weight=row_weight, backend=backend)
    return [*out, *torch.autograd.grad(out[0] + out[1], (x, weight))]


def check(label: str, got: list[Tensor], want: list[Tensor], tolerance: float) -> int:
    wrong = 0
    for part, ours, theirs in zip(("out", "weights", "grad 0", "grad 1"), got, want, strict=True):
        error = (ours.cpu().double() - theirs.double()).abs().amax().item()
        scale = max(1.0, theirs.double().abs().amax().item())
        if not error <= tolerance * scale:
            print(f"{label}: {part} differs by {error:.3g}", flush=True)
            wrong += 1
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    wrong = ran = 0
    for backend in arguments.backends:
        reason = backends.BACKENDS[backend].why_unavailable()
        if reason is not None:
            print(f"{backend}: {reason}", flush=True)
            wrong += 1
            continue
        torch.manual_seed(0)
        for label, x, options, queries, step in cases():
            tail = () if queries is None else (queries,)
            channels = x.shape[-1] // step
            query = torch.randn(*tail, channels).to(x.dtype) / channels**0.5
            scores = torch.randn(*x.shape[:-1], *tail).to(x.dtype)
            for name, other in (("attention_pool", query), ("softmax_pool", scores)):
                got = outcome(name, (x, other), options, step, backend, arguments.device)
                want = outcome(name, (x.double(), other.double()), options, step, "reference", "cpu")
                wrong += check(f"{backend} {name} {label}", got, want, TOLERANCE[x.dtype])
                ran += 1
        for label, inputs in shared_cases():
            got = shared_outcome(inputs, backend, arguments.device)
            want = shared_outcome(tuple(tensor.double() for tensor in inputs), "reference", "cpu")
            wrong += check(f"{backend} shared_objective {label}", got, want, TOLERANCE[inputs[0].dtype])
            ran += 1
    print(f"{ran} cases ran, {wrong} were wrong", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
