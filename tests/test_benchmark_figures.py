"""What the benchmarks hold times against: work that must be done, floors, peers that need a GPU, promises for one."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import attention_pool, floor, memory, shared_penalty  # noqa: E402
from benchmarks import shared_logits_peers as peers  # noqa: E402
from benchmarks.case import MODES, Bound, Case, Contender, Inputs  # noqa: E402
from benchmarks.results import OURS, Row  # noqa: E402
from benchmarks.runner import Settings, run_case  # noqa: E402

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, 1, 1, 0.0005, "off", peers=())


def case_of(family: ModuleType, name: str) -> Case:
    return next(case for case in family.cases(CPU, torch.float32, quick=True) if case.name == name)


def queries_pool(x: Tensor, query: Tensor) -> Tensor:
    return torch.softmax(x @ query.T, 1).transpose(1, 2) @ x


def scored_pool(x: Tensor, scores: Tensor) -> Tensor:
    return torch.softmax(scores, 1).unsqueeze(1) @ x


def factorised_layer(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
    return queries_pool(x, weight_out @ weight_in).squeeze(1) @ weight_in.T + bias_in


def logits(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@pytest.mark.parametrize(
    ("family", "name", "function"),
    [
        (attention_pool, "quick-queries", queries_pool),
        (attention_pool, "quick-scored", scored_pool),
        (attention_pool, "quick-layer", factorised_layer),
        (shared_penalty, "quick-narrow", logits),
    ],
)
def test_work_is_what_has_to_be_done(family: ModuleType, name: str, function: Callable[..., Tensor]) -> None:
    """Operations as torch counts those of a direct implementation; bytes of what goes in and comes out."""
    case = case_of(family, name)
    inputs = {key: value.requires_grad_() for key, value in case.inputs().items() if key != "bias_out"}
    with FlopCounterMode(display=False) as forward:
        out = function(*inputs.values())
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    assert case.work["forward"].flops == forward.get_total_flops()
    assert case.work["backward"].flops == backward.get_total_flops()
    assert case.work["both"].flops == forward.get_total_flops() + backward.get_total_flops()
    tensors = sum(tensor.nbytes for tensor in inputs.values())
    # The logits of the shared families stay on the chip.
    result = 0 if function is logits else out.nbytes
    unread = inputs["bias_in"].nbytes if "bias_in" in inputs else 0
    assert case.work["forward"].bytes == tensors + result
    assert case.work["backward"].bytes == 2 * tensors + result - unread
    assert case.work["both"].bytes == case.work["forward"].bytes + case.work["backward"].bytes


def test_frozen_tokens_are_read_twice_and_never_written() -> None:
    work = attention_pool.packed_case("f", "", (3, 4), 8, CPU, torch.bfloat16, frozen=True).work
    assert [work[mode].bytes for mode in MODES] == [(56 + 8 + 16) * 2, (56 + 2 * 8 + 16) * 2, (112 + 3 * 8 + 32) * 2]
    assert [work[mode].flops for mode in MODES] == [2 * 2 * 56, 2 * 2 * 56, 4 * 2 * 56]


def test_the_fastest_of_each_group_of_floors_counts() -> None:
    medians = {"a": 3.0, "b": 2.0, "c": 5.0, "d": None}
    assert floor.bound_ms((("a", "b"), ("c", "d", "absent")), medians) == 7.0


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for as Linux has it")
def test_large_copies_go_into_huge_pages_too() -> None:
    """Or a gradient on huge pages would be compared with copies on small ones, and pass the floor."""
    large = torch.arange(2 << 20, dtype=torch.float32)
    found = floor.floors(large)
    assert torch.equal(found[floor.COPY_HUGE].call(), large)
    assert found[floor.COPY_HUGE].bytes == found[floor.COPY_FRESH].bytes == 2 * large.nbytes
    assert floor.COPY_HUGE not in floor.floors(large[:1000])
    assert (floor.COPY_FRESH, floor.COPY_HUGE) in case_of(attention_pool, "quick-padded").work["both"].floors


def test_a_gradient_left_out_is_wrong() -> None:
    case = case_of(attention_pool, "quick-padded")
    ours = case.contenders[0]

    def bind(inputs: Inputs) -> Bound:
        bound = ours.bind(inputs)
        return Bound(bound.forward, {"x": bound.leaves["x"]})

    case = dataclasses.replace(case, contenders=[Contender(OURS, None, bind)])
    rows = [row for row in run_case(case, "fp32", SETTINGS, lambda text: None) if row.contender == OURS]
    assert [(row.status, row.median_ms) for row in rows] == [("wrong", None)] * 3
    assert rows[0].reason == "gives gradients of x, not of x, query"


def test_a_forward_that_is_wrong_only_in_training_gets_no_time() -> None:
    case = case_of(attention_pool, "quick-padded")

    def bind(inputs: Inputs) -> Bound:
        x, query = inputs["x"], inputs["query"]

        def forward() -> Tensor:
            out = (torch.softmax(x @ query, 1).unsqueeze(1) @ x).squeeze(1)
            return out + 0.1 if torch.is_grad_enabled() else out

        return Bound(forward, {"x": x, "query": query})

    case = dataclasses.replace(case, contenders=[*case.contenders[1:2], Contender(OURS, None, bind)])
    rows = [row for row in run_case(case, "fp32", SETTINGS, lambda text: None) if row.contender == OURS]
    assert [(row.status, row.median_ms) for row in rows] == [("wrong", None)] * 3
    assert rows[0].reason.startswith("out of training is off by")


class LigerLoss:
    """As Liger-Kernel's: the weight comes first."""

    def __call__(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.cross_entropy(F.linear(_input, lin_weight, bias), target)


def cut_loss(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(e, c, bias), targets)


def fused_losses(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    compare = dataclasses.replace(SETTINGS, peers=("liger", "cce"))
    rows = run_case(case_of(shared_penalty, "quick-narrow"), "fp32", compare, lambda text: None)
    return [row for row in rows if row.peer in ("liger", "cce")]


def test_fused_losses_for_gpus_are_called_as_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, member, value in (
        ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", LigerLoss),
        ("cut_cross_entropy", "linear_cross_entropy", cut_loss),
    ):
        module = ModuleType(name)
        setattr(module, member, value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setattr(peers, "_TRITON_DEVICES", ("cpu",))
    rows = fused_losses(monkeypatch)
    assert len(rows) == 6
    assert {(row.kind, row.status, row.reason) for row in rows} == {("other", "ok", "")}
    assert all(row.speedup is None and row.error is not None and row.error < 1e-6 for row in rows)


def test_fused_losses_for_gpus_say_why_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {(row.status, row.reason) for row in fused_losses(monkeypatch)} == {
        ("skipped", "its kernels run on a GPU only")
    }
    monkeypatch.setattr(peers, "_TRITON_DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    reasons = {row.reason for row in fused_losses(monkeypatch)}
    assert {reason.rsplit("; ", 1)[1] for reason in reasons} == {
        "pip install liger-kernel",
        "pip install cut-cross-entropy",
    }


def test_absent_peers_cost_no_reference() -> None:
    """The float64 cross entropy of 2^18 features takes minutes."""
    asked: list[str] = []

    def reference(inputs: Inputs, grad_out: Tensor | None) -> Inputs:
        asked.append("reference")
        return peers.cross_entropy_reference(inputs, grad_out)

    case = case_of(shared_penalty, "quick-narrow")
    others = [dataclasses.replace(c, reference=reference) for c in case.contenders if c.kind == "other"]
    case = dataclasses.replace(case, contenders=[*case.contenders[:2], *others])
    run_case(case, "fp32", dataclasses.replace(SETTINGS, peers=("liger", "cce")), lambda text: None)
    assert asked == []


def test_cross_entropy_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"x": torch.randn(7, 5), "weight": torch.randn(2**21, 5) * 0.1}
    x, weight = (tensor.double().requires_grad_() for tensor in inputs.values())
    out = F.cross_entropy(x @ weight.T, peers._targets(inputs))
    grads = torch.autograd.grad(out, [x, weight], torch.tensor(3.0).double())
    found = peers.cross_entropy_reference(inputs, torch.tensor(3.0))
    for name, wanted in zip(("out", "grad x", "grad weight"), (out, *grads), strict=True):
        torch.testing.assert_close(found[name], wanted.detach())


def test_nested_tensors_have_a_backward() -> None:
    compare = dataclasses.replace(SETTINGS, peers=("nested",))
    rows = run_case(case_of(attention_pool, "quick-packed"), "fp32", compare, lambda text: None)
    assert all(row.status == "ok" for row in rows if row.contender == "nested, padded")
    assert sum(row.contender == "nested, padded" for row in rows) == 3


def test_every_mode_has_its_memory() -> None:
    rows = run_case(case_of(attention_pool, "quick-padded"), "fp32", SETTINGS, lambda text: None)
    peaks = [row.peak_mib for row in rows if row.contender == OURS]
    if memory.peak_bytes(lambda: None, CPU) is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert len(peaks) == 3 and all(peak is not None and peak >= 0 for peak in peaks)


def test_every_peer_and_shape_that_was_asked_for() -> None:
    """By the words of --compare, and by what their users have: rows, channels, features or tokens."""
    families = [importlib.import_module(f"benchmarks.{name}") for name in ("attention_pool", "shared_penalty")]
    cases = [case for family in families for case in family.cases(CPU, torch.float32, quick=False)]
    words = {contender.peer for case in cases for contender in case.contenders}
    assert {"eager", "compile", "sdpa", "pyg", "nested", "timm", "linear_cross_entropy", "liger", "cce"} <= words
    shapes = {case.name: case.shape for case in cases}
    wanted = {"recipe-1000": "1000x10->128", "siglip-map": "[16,729,1152] K=1", "swav": "512x128->3000"}
    wanted |= {"msn": "1024x256->1024", "dino": "512x256->65536", "ibq": "1024x256->262144"}
    wanted |= {"sae": "1024x768->32768"}
    assert wanted.items() <= shapes.items()
    for name, tokens in (("abmil-1k", 1_000), ("abmil-10k", 10_000), ("abmil-100k", 100_000)):
        assert shapes[name].startswith(f"[{tokens},512]")
    assert "ECAPA" in next(case.used_by for case in cases if case.name == "ecapa")
    assert math.prod((16, 729, 1152)) * 4 == sum(
        value.nbytes for name, value in next(c for c in cases if c.name == "siglip-map").inputs().items() if name == "x"
    )
