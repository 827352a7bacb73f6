"""What the benchmarks on shared logits have in common: shapes, float64 references by row chunks, floors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import fusefeat
import torch
from torch import Tensor

from . import environment, gpu_targets
from . import shared_logits_peers as peers
from .case import Case, Contender, Inputs, Target, Work
from .floor import Floor
from .results import OURS, Row, best_peer, time_of

FORWARD_PRODUCT, BACKWARD_PRODUCTS = "mm", "mm backward"
# The same into memory in use already: new memory for all logits is nothing that has to be.
FORWARD_KEPT, BACKWARD_KEPT = "mm kept", "mm backward kept"

# name: who uses it, rows, channels, features. The first four carry the project's promises.
SHAPES = {
    "narrow": ("a small projection head", 8192, 64, 128),
    "medium": ("a thousand prototypes", 8192, 128, 1024),
    "wide": ("a codebook", 4096, 256, 8192),
    "widest": ("a large codebook, few rows", 1024, 256, 65536),
    "recipe": ("the published recipe, a batch of 32", 32, 10, 128),
    "recipe-1000": ("the published recipe, all rows at once", 1000, 10, 128),
    "swav": ("SwAV's 3000 prototypes", 512, 128, 3000),
    "msn": ("MSN's 1024 prototypes", 1024, 256, 1024),
    "dino": ("DINO's head", 512, 256, 65536),
    "sae": ("sparse autoencoder on a language model's width", 1024, 768, 32768),
    "ibq": ("LFQ and IBQ, 2^18 codes", 1024, 256, 262144),
}
PROMISED = tuple(SHAPES)[:4]
_QUICK = {
    "quick-narrow": ("a check of the harness", 33, 7, 20),
    "quick-wide": ("a check of the harness", 9, 12, 300),
}
Shapes = dict[str, tuple[str, int, int, int]]


def shapes(quick: bool) -> Shapes:
    return _QUICK if quick else SHAPES


def scaling_shapes(quick: bool) -> dict[str, Shapes]:
    """By axis, of a scaling plot: rows, channels and features, the other two as usual."""
    rows, channels, features = (9, 7, 20) if quick else (1024, 128, 1024)
    axes = {
        "N": [(n, channels, features) for n in ((5, 40) if quick else (64, 256, 1024, 4096, 16384))],
        "D": [(rows, d, features) for d in ((3, 40) if quick else (16, 64, 256, 1024))],
        "F": [(rows, channels, f) for f in ((6, 40) if quick else (128, 512, 2048, 8192, 32768))],
    }
    return {
        axis: {f"{axis}={sizes['NDF'.index(axis)]}": ("scaling", *sizes) for sizes in all_sizes}
        for axis, all_sizes in axes.items()
    }


def scaling(make: Callable[[Shapes], list[Case]], quick: bool) -> dict[str, list[tuple[int, Case]]]:
    """By axis: sizes and their cases."""
    found = {}
    for axis, shapes in scaling_shapes(quick).items():
        sizes = [shape["NDF".index(axis) + 1] for shape in shapes.values()]
        found[axis] = list(zip(sizes, make(shapes), strict=True))
    return found


def _chunks(inputs: Inputs) -> list[Tensor]:
    rows = max(1, 2**25 // inputs["weight"].shape[0])
    return list(inputs["x"].detach().split(rows))


def _row_entropies(z: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = z.log_softmax(1)
    probs = log_probs.exp()
    return -(probs * log_probs).sum(1), probs


def _reference(penalty: bool, reg: bool, inputs: Inputs, grad_out: Tensor | None) -> Inputs:
    """Penalty or regulariser, or the sum of both, in float64. The mean assignment is taken in a first pass, so that
    the second one can go by rows: no more than a few logits at a time."""
    weight = inputs["weight"].detach().double()
    rows, features = inputs["x"].shape[0], weight.shape[0]
    out = torch.zeros((), dtype=torch.float64, device=weight.device)
    total = weight.new_zeros(features)
    for x in _chunks(inputs):
        z = peers.MARGIN * (x.double() @ weight.T)
        if penalty:
            entropy, probs = _row_entropies(z)
            out += entropy.sum() / rows
            total += probs.sum(0) / rows
        if reg:
            out += z.clamp(min=peers.MARGIN).sum() / (rows * features)
    log_ratio = torch.where(total > 0, total, 1.0).log() + math.log(features)
    if penalty:
        out += (total * log_ratio).sum()
    if grad_out is None:
        return {"out": out}
    grads_x, grad_weight = [], torch.zeros_like(weight)
    for x in _chunks(inputs):
        leaves = [x.double().requires_grad_(), weight.clone().requires_grad_()]
        z = peers.MARGIN * (leaves[0] @ leaves[1].T)
        local = z.new_zeros(())
        if penalty:
            entropy, probs = _row_entropies(z)
            local = local + entropy.sum() + (probs * (log_ratio + 1)).sum()
        if reg:
            local = local + torch.where(z > peers.MARGIN, z, 0.0).sum() / features
        grad_x, grad = torch.autograd.grad(local / rows, leaves, grad_out.double())
        grads_x.append(grad_x)
        grad_weight += grad
    return {"out": out, "grad x": torch.cat(grads_x), "grad weight": grad_weight}


def penalty_reference(inputs: Inputs, grad_out: Tensor | None) -> Inputs:
    return _reference(True, False, inputs, grad_out)


def reg_reference(inputs: Inputs, grad_out: Tensor | None) -> Inputs:
    return _reference(False, True, inputs, grad_out)


def objective_reference(inputs: Inputs, grad_out: Tensor | None) -> Inputs:
    return _reference(True, True, inputs, grad_out)


def penalty(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    return fusefeat.shared_penalty(x, None, weight, margin=peers.MARGIN, backend=backend)


def _floors(inputs: Inputs) -> dict[str, Floor]:
    """The bare products that no implementation can do without; the gradient of the logits is any matrix."""
    x, weight = inputs["x"].detach(), inputs["weight"].detach()
    rows, features, channels = x.shape[0], weight.shape[0], x.shape[1]
    grad, logits = (torch.empty(rows, features, dtype=x.dtype, device=x.device).normal_() for _ in range(2))
    kept = torch.empty_like(x), torch.empty_like(weight)
    product = 2 * rows * features * channels
    traffic = x.element_size() * (x.numel() + weight.numel() + grad.numel())

    def backward(out: tuple[Tensor | None, Tensor | None]) -> Tensor:
        torch.mm(grad.t(), x, out=out[1])
        return torch.mm(grad, weight, out=out[0])

    return {
        FORWARD_PRODUCT: Floor(lambda: torch.mm(x, weight.t()), traffic, product),
        FORWARD_KEPT: Floor(lambda: torch.mm(x, weight.t(), out=logits), traffic, product),
        BACKWARD_PRODUCTS: Floor(lambda: backward((None, None)), 2 * traffic, 2 * product),
        BACKWARD_KEPT: Floor(lambda: backward(kept), 2 * traffic, 2 * product),
    }


def _work(rows: int, channels: int, features: int, item: int) -> dict[str, Work]:
    operands, product = (rows + features) * channels * item, 2 * rows * channels * features
    forward = Work(operands, product, ((FORWARD_PRODUCT, FORWARD_KEPT),))
    backward = Work(2 * operands, 2 * product, ((BACKWARD_PRODUCTS, BACKWARD_KEPT),))
    both = Work(3 * operands, 3 * product, forward.floors + backward.floors)
    return {"forward": forward, "backward": backward, "both": both}


def _ours(function: Callable[[Tensor, Tensor, str | None], Tensor], device: torch.device) -> list[Contender]:
    def contender(name: str, backend: str | None) -> Contender:
        return Contender(name, None, lambda inputs: peers.bind(partial(function, backend=backend), inputs))

    named = [contender(f"{OURS} {name}", name) for name in environment.explicit_backends(device)]
    return [contender(OURS, None), *named]


def cases(
    family: str,
    ours: Callable[[Tensor, Tensor, str | None], Tensor],
    plain: peers.Function,
    reference: Callable[[Inputs, Tensor | None], Inputs],
    others: list[Contender],
    device: torch.device,
    dtype: torch.dtype,
    shapes: Shapes,
) -> list[Case]:
    def case(name: str, used_by: str, rows: int, channels: int, features: int) -> Case:
        def inputs() -> Inputs:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(rows, channels, generator=generator)
            weight = torch.randn(features, channels, generator=generator) * channels**-0.5
            return {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}

        # Half precision products on a CPU go element by element in torch: minutes for what others do in a second.
        limit = 2e9 if dtype == torch.float16 else 5e10
        return Case(
            family=family,
            name=name,
            shape=f"{rows}x{channels}->{features}",
            used_by=used_by,
            inputs=inputs,
            leaves=("x", "weight"),
            reference=reference,
            contenders=[*_ours(ours, device), *peers.plain(plain, device), *others],
            work=_work(rows, channels, features, dtype.itemsize),
            # Logits rounded to half types fall on the other side of the clamp, where the gradient has a step.
            peer_slack=10.0 if dtype.itemsize == 2 and reference is not penalty_reference else 1.0,
            floors=_floors,
            slow=device.type == "cpu" and rows * channels * features > limit,
        )

    return [case(name, *shape) for name, shape in shapes.items()]


def shape_of(name: str) -> str:
    _, rows, channels, features = SHAPES[name]
    return f"{rows}x{channels}->{features}"


def _over_products(rows: list[Row], name: str, dtype: str, wanted: float) -> Target:
    text = f"{dtype} {shape_of(name)} forward+backward at most {wanted}x the three bare products"
    ours = time_of(rows, name, "both", OURS)
    products = [time_of(rows, name, "both", floor) for floor in (FORWARD_PRODUCT, BACKWARD_PRODUCTS)]
    if ours is None or products[0] is None or products[1] is None:
        return Target(text, None, False)
    total = products[0] + products[1]
    return Target(text, f"{ours / total:.2f}x ({ours:.3g} ms over {total:.3g} ms)", ours / total <= wanted)


def _over_peer(rows: list[Row], name: str, dtype: str, peer: str, wanted: float) -> Target:
    text = f"{dtype} {shape_of(name)} forward+backward at least {wanted}x {peer}"
    ours, best = time_of(rows, name, "both", OURS), best_peer(rows, name, "both", (peer,))
    if ours is None or best is None or best.median_ms is None:
        return Target(text, None, False)
    factor = best.median_ms / ours
    return Target(text, f"{factor:.2f}x ({ours:.3g} ms against {best.median_ms:.3g} ms)", factor >= wanted)


def targets(family: str, rows: list[Row]) -> list[Target]:
    """The project's promises for two CPU threads and for a GPU, of the types that were run."""
    rows = [row for row in rows if row.family == family]
    found = gpu_targets.products(rows, {name: shape[1:] for name, shape in SHAPES.items()})
    rows = [row for row in rows if row.device == "cpu"]
    for dtype in ("fp32", "bf16", "fp16"):
        of_type = [row for row in rows if row.dtype == dtype]
        if not of_type:
            continue
        if dtype == "fp32":
            found.append(_over_peer(of_type, PROMISED[0], dtype, "compile", 1.2))
            found += [_over_products(of_type, name, dtype, 1.0) for name in PROMISED[1:]]
            found += [_over_peer(of_type, name, dtype, "eager", 1.0) for name in ("recipe", "recipe-1000")]
        elif dtype == "bf16":
            found += [_over_products(of_type, name, dtype, 1.5) for name in PROMISED]
            found += [_over_peer(of_type, name, dtype, "compile", 1.0) for name in PROMISED]
        else:
            found += [_over_peer(of_type, name, dtype, "eager", 1.0) for name in PROMISED]
    return found
