"""Peak memory of the pools, measured in a child process: no temporary tensor of the size of the tokens."""

from __future__ import annotations

import json
import subprocess
import sys

CHILD = """
import gc, json, torch, fusefeat

torch.set_num_threads(2)

def resident(field):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024

def peak(call):
    call()  # the first call brings in code and thread pools
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    result = call()
    gradients = sum(t.numel() * t.element_size() for t in result)
    return resident("VmHWM") - before - gradients

def pooled(x, need_x, layer=None, **options):
    x = x.detach().requires_grad_(need_x)
    if layer is None:
        query = torch.zeros(3, x.shape[-1], requires_grad=True)
        out, weights = fusefeat.attention_pool(x, query, return_weights=True, **options)
        variables = [query]
    else:
        out, weights = layer(x, return_weights=True, **options)
        variables = list(layer.parameters())
    return torch.autograd.grad(out.sum() + weights.square().sum(), [x] * need_x + variables)

x = torch.randn(16, 1024, 512)
layouts = {"plain": x, "transposed": x.mT.contiguous().mT, "half": x.bfloat16()}
layer = fusefeat.AttentionPool(512, 64)
offsets = torch.tensor([0, 5, 16384])
found = {}
for need_x in (False, True):
    for name, tokens in layouts.items():
        found[f"{name} {need_x}"] = peak(lambda: pooled(tokens, need_x))
    found[f"layer {need_x}"] = peak(lambda: pooled(x, need_x, layer))
    found[f"packed {need_x}"] = peak(lambda: pooled(x.flatten(0, 1), need_x, cu_seqlens=offsets))
scores = torch.randn(4, 16, 1024)
found["vmapped scores"] = peak(lambda: [torch.vmap(lambda s: fusefeat.softmax_pool(x, s))(scores)])
print(json.dumps({"tokens": x.numel() * 2, "found": found}))
"""


def test_peak_extra_memory() -> None:
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    # Half of the tokens in their narrowest type: scratch and the allocator's slack, and far from a copy.
    assert max(measured["found"].values()) < measured["tokens"] / 2, measured
