"""Run under one torch against an installed wheel: import, load, compute, describe. Prints one line of JSON."""

import json
import subprocess
import sys
from pathlib import Path

import fusefeat
import torch
from fusefeat import _library
from torch import Tensor


def results(backend: str, dtype: torch.dtype, queries: int | None) -> list[Tensor]:
    """Outputs and gradients of both pools, padded and packed, with a masked NaN and an empty bag."""
    torch.manual_seed(0)
    tail = () if queries is None else (queries,)
    found = []
    for packed in (False, True):
        x = torch.randn(67, 19, dtype=dtype) if packed else torch.randn(4, 17, 19, dtype=dtype)
        query, scores = torch.randn(*tail, 19, dtype=dtype) / 4, torch.randn(*x.shape[:-1], *tail, dtype=dtype)
        if packed:
            options = {"cu_seqlens": torch.tensor([0, 3, 3, 60, 67])}
        else:
            options = {"mask": torch.rand(4, 17) < 0.7}
            options["mask"][1] = False
            x[~options["mask"]] = float("nan")
        for name, other in (("attention_pool", query), ("softmax_pool", scores)):
            leaves = [x.clone().requires_grad_(), other.clone().requires_grad_()]
            out, weights = getattr(fusefeat, name)(*leaves, return_weights=True, backend=backend, **options)
            loss = out.square().sum() + weights.square().sum()
            found += [out, weights, *torch.autograd.grad(loss, leaves)]
    return found


def main() -> None:
    where = Path(fusefeat.__file__).resolve().parent
    assert where == Path(sys.argv[1]).resolve() / "fusefeat", f"imported from {where}"
    state = _library.STATE
    assert state.cpu_loaded, state.cpu_reason
    assert state.bindings is not None, state.reasons
    built_cuda, torch_cuda = state.build_info["cuda"], torch.version.cuda
    expect_cuda = bool(built_cuda and torch_cuda) and built_cuda.split(".")[0] == torch_cuda.split(".")[0]
    assert state.cuda_loaded == expect_cuda, state.cuda_reason
    isas = []
    for isa in ("generic", "avx2", "avx512"):
        if isa not in state.build_info["isas"]:
            continue
        isas.append(isa)
        with _library.use_isa(isa):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
                for queries in (None, 2):
                    ours, theirs = results("cpu", dtype, queries), results("reference", dtype, queries)
                    for got, want in zip(ours, theirs, strict=True):
                        limit = tolerance * max(1.0, want.abs().max().item())
                        torch.testing.assert_close(got, want, atol=limit, rtol=0)
        if isa == _library.isa()["best"]:
            break
    command = [sys.executable, "-m", "fusefeat.info", "--json"]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert facts["dispatch"]["attention_pool"]["cpu"]["backend"] == "cpu", facts["dispatch"]
    cuda = "loaded" if state.cuda_loaded else state.cuda_reason
    print(json.dumps({"torch": torch.__version__, "isas": isas, "cuda": cuda}))


if __name__ == "__main__":
    main()
