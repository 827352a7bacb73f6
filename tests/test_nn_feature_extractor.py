"""nn.AutoFeatureExtractor: features by hand, and an objective that a plain list of earlier inputs confirms."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import fusefeat
import pytest
import torch
from pool_cases import rand
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

MARGIN = 0.8


def make(context_size: int = 0, **keywords: Any) -> fusefeat.AutoFeatureExtractor:
    torch.manual_seed(0)
    return fusefeat.AutoFeatureExtractor(3, 5, MARGIN, context_size=context_size, dtype=torch.float64, **keywords)


def by_hand(module: fusefeat.AutoFeatureExtractor, x: Tensor, earlier: list[Tensor]) -> Tensor:
    """Penalty + regulariser of x and the rows that came before it."""
    rows = torch.cat([*earlier, x]) if earlier else x
    z = MARGIN * module.linear(rows)
    p = z.softmax(1)
    used = p.mean(0)
    penalty = -(p * p.log()).sum(1).mean() + (used * (used * len(used)).log()).sum()
    return penalty + torch.where(z > MARGIN, z, MARGIN).mean()


def latest(batches: list[Tensor], count: int) -> list[Tensor]:
    rows = torch.cat(batches) if batches else torch.zeros(0, 3, dtype=torch.float64)
    rows = rows[max(0, len(rows) - count) :]
    return [rows] if len(rows) else []


@pytest.mark.parametrize("floor", [None, 0.0, 0.2, MARGIN])
def test_features(floor: float | None) -> None:
    module, x = make(floor=floor), rand(6, 3).requires_grad_()
    want = (MARGIN * module.linear(x)).softmax(1)
    if floor is not None:
        want = want.clamp(min=floor)
    got = module(x)
    torch.testing.assert_close(got, want)
    incoming = rand(6, 5)
    leaves = [x, *module.parameters()]
    for mine, truth in zip(
        torch.autograd.grad(got, leaves, incoming), torch.autograd.grad(want, leaves, incoming), strict=True
    ):
        torch.testing.assert_close(mine, truth)
    if floor == MARGIN:
        assert (got == MARGIN).all(), "the published clamp leaves nothing of so even an assignment"


def test_the_floor_lets_a_nan_through() -> None:
    x = rand(2, 3)
    x[0, 0] = float("nan")
    features = make(floor=0.1)(x)
    assert features[0].isnan().all() and not features[1].isnan().any()


@pytest.mark.parametrize("context_size", [0, 1, 4, 6, 50])
def test_objective_against_a_list_of_earlier_inputs(context_size: int) -> None:
    """Batches smaller than, as large as, and larger than the queue, and an empty one."""
    module = make(context_size)
    batches: list[Tensor] = []
    for rows in (4, 1, 6, 0, 9, 2, 4):
        x = rand(rows, 3).requires_grad_()
        module(x)
        earlier = latest(batches, context_size)
        if rows or earlier:
            leaves = [x, *module.parameters()]
            got, want = module.objective(), by_hand(module, x, earlier)
            torch.testing.assert_close(got, want)
            for mine, truth in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
                torch.testing.assert_close(mine, truth)
        batches.append(x.detach())
    if context_size:
        assert torch.equal(module.queue[module.filled], latest(batches, context_size)[0])
        assert int(module.filled.sum()) == min(context_size, sum(map(len, batches)))


def test_weights_of_the_terms() -> None:
    module, x = make(), rand(6, 3)
    module(x)
    got = module.objective(entropy_weight=0.3, balance_weight=2.0, reg_weight=0.5)
    penalty, reg = fusefeat.shared_objective(
        x, None, module.linear.weight, module.linear.bias, margin=MARGIN, entropy_weight=0.3, balance_weight=2.0
    )
    torch.testing.assert_close(got, penalty + 0.5 * reg)


def test_the_queue_moves_out_of_place_and_in_training_mode_only() -> None:
    module, first, second = make(4), rand(2, 3), rand(2, 3)
    before = module.queue
    module(first)
    assert not before.any() and torch.equal(module.queue[2:], first)
    held = module.queue
    loss = module.objective()
    assert not module.queue.requires_grad
    module(second)
    assert torch.equal(held[2:], first) and torch.equal(module.queue, torch.cat([first, second]))
    loss.backward()  # nothing it saved has changed
    first.fill_(7)
    large = rand(9, 3)
    module(large)
    kept = module.queue.clone()
    large.zero_()
    assert torch.equal(module.queue, kept) and module.queue.untyped_storage().nbytes() == 4 * 3 * 8
    module.eval()
    module(second)
    torch.testing.assert_close(module.objective(), by_hand(module, second, [kept]))
    assert torch.equal(module.queue, kept)
    module.train()
    with torch.no_grad():
        module(second)
    assert torch.equal(module.queue[2:], second)
    kept = module.queue
    with torch.inference_mode():
        module(second)
    assert module.queue is kept


def test_objective_is_that_of_one_forward() -> None:
    module = make(2)
    with pytest.raises(RuntimeError, match=r"objective\(\) is that of the last forward"):
        module.objective()
    x, y = rand(3, 3), rand(3, 3)
    module(x)
    module(y)
    for _ in range(2):  # to be logged and to be minimised
        torch.testing.assert_close(module.objective(), by_hand(module, y, [x[1:]]))


def test_nothing_of_the_graph_is_kept_after_the_next_forward() -> None:
    module = make(2)
    leaf = rand(3, 3).requires_grad_()
    hidden = leaf * 2
    gone = weakref.ref(hidden)
    module(hidden)
    module.objective().backward()
    assert leaf.grad is not None
    del hidden
    module(rand(3, 3))
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_copies_with_a_forward_pending(copied: Callable[[Any], Any]) -> None:
    module = make(4)
    x = rand(3, 3).requires_grad_()
    module(x * 2)  # an inner node of a graph, which can be neither copied nor pickled
    twin = copied(module)
    with pytest.raises(RuntimeError, match=r"objective\(\)"):
        twin.objective()
    module.objective().backward()
    assert x.grad is not None and torch.equal(twin.queue, module.queue) and twin.queue is not module.queue
    twin(x)
    module(x)
    assert torch.equal(twin.objective(), module.objective())


def test_state_dict_and_to() -> None:
    module, x = make(4), rand(3, 3)
    module(x)
    state = module.state_dict()
    assert list(state) == ["queue", "filled", "linear.weight", "linear.bias"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = make(4)
    other.load_state_dict(torch.load(file))
    for twin in (module, other):
        twin(x)
    assert torch.equal(module.objective(), other.objective())
    assert list(make().state_dict()) == ["linear.weight", "linear.bias"]
    module.to(torch.bfloat16)
    assert module.queue.dtype == torch.bfloat16 and module.filled.dtype == torch.bool
    features = module(x.bfloat16())
    assert features.dtype == torch.bfloat16 and module.objective().dtype == torch.float32
    with torch.device("meta"):
        assert fusefeat.AutoFeatureExtractor(3, 5, context_size=2).queue.is_meta


def test_autocast_queues_in_the_parameters_type() -> None:
    module, x = make(4).float(), torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            module(x.bfloat16())
            loss = module.objective()
    assert loss.dtype == torch.float32 and module.queue.dtype == torch.float32
    want = by_hand(copy.deepcopy(module).double(), x.double(), [x.double()])
    torch.testing.assert_close(loss.double(), want, rtol=0.03, atol=0.03)
    loss.backward()
    assert module.linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_moves_the_queue_once(reentrant: bool) -> None:
    module = make(8)
    plain = copy.deepcopy(module)
    x = rand(3, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    features = checkpoint(module, x, use_reentrant=reentrant)
    (features.square().sum() + module.objective()).backward()
    (plain(y).square().sum() + plain.objective()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(module.linear.weight.grad, plain.linear.weight.grad)
    assert int(module.filled.sum()) == 3
    # Still that of the forward, against the queue before it.
    torch.testing.assert_close(module.objective(), plain.objective())


@pytest.mark.parametrize("context_size", [0, 4])
def test_compiled(context_size: int) -> None:
    module = make(context_size)
    plain = copy.deepcopy(module)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(module, fullgraph=True, backend=counter)

    def step(model: Any, x: Tensor) -> Tensor:
        return model(x).square().sum() + model.objective()

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = rand(3, 3)
        y, z = fast(x * 1), plain(x * 1)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(module.objective(), plain.objective())
    assert counter.frame_count == 1
    x = rand(3, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    whole(module, x * 2).backward()
    step(plain, y * 2).backward()
    torch.testing.assert_close(x.grad, y.grad)
    if context_size:
        torch.testing.assert_close(module.queue, plain.queue)


def test_meta_and_fake() -> None:
    module = make(2, device="meta")
    assert module(rand(4, 3).to("meta")).shape == (4, 5) and module.objective().is_meta
    with FakeTensorMode():
        module = make(2)
        assert module(rand(4, 3)).shape == (4, 5) and module.objective().shape == ()


def test_transforms_leave_the_state_alone() -> None:
    module, x = make(4), rand(5, 3)
    queue = module.queue
    batched = torch.func.vmap(lambda row: module(row[None])[0])(x)
    torch.func.grad(lambda x: module(x).square().sum())(x)
    assert module.queue is queue
    with pytest.raises(RuntimeError, match=r"objective\(\)"):
        module.objective()
    torch.testing.assert_close(batched, module(x))


def test_learns_one_feature_per_cluster() -> None:
    torch.manual_seed(0)
    centres = 4 * torch.randn(4, 8)
    module = fusefeat.AutoFeatureExtractor(8, 4, context_size=64)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)

    def batch() -> Tensor:
        return centres[torch.randint(4, (32,))] + torch.randn(32, 8) / 4

    assert len(module(centres).argmax(1).unique()) < 4
    for _ in range(60):
        module(batch())
        optimizer.zero_grad()
        module.objective(reg_weight=0.01).backward()
        optimizer.step()
    assert len(module(centres).argmax(1).unique()) == 4 and module(centres).amax(1).min() > 0.9


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input_dim must be an int", {"input_dim": 3.0}),
        (ValueError, "input_dim must be at least 1", {"input_dim": 0}),
        (TypeError, "num_features must be an int", {"num_features": None}),
        (ValueError, "num_features must be at least 1", {"num_features": -1}),
        (ValueError, "margin must be greater than 0", {"margin": -1.0}),
        (TypeError, "margin must be a real number", {"margin": True}),
        (TypeError, "context_size must be an int", {"context_size": 4.0}),
        (TypeError, "context_size must be an int", {"context_size": True}),
        (ValueError, "context_size must not be negative", {"context_size": -1}),
        (TypeError, "floor must be a real number", {"floor": "margin"}),
        (ValueError, "floor must be finite", {"floor": float("inf")}),
        (ValueError, "floor must not be negative", {"floor": -0.1}),
    ],
)
def test_bad_arguments(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"AutoFeatureExtractor: {match}"):
        fusefeat.AutoFeatureExtractor(**{"input_dim": 3, "num_features": 4, **arguments})


def test_bad_inputs() -> None:
    module = nn.Sequential(make(2))
    for error, match, bad in (
        (TypeError, "a torch.Tensor", None),
        (TypeError, "float16, bfloat16", torch.ones(2, 3, dtype=torch.int32)),
        (TypeError, "torch.float64 as the parameters are", torch.randn(2, 3)),
        (ValueError, r"2-D \[N,input_dim\]", rand(3)),
        (ValueError, r"2-D \[N,input_dim\]", rand(2, 2, 3)),
        (ValueError, "input_dim = 3 columns", rand(2, 4)),
        (ValueError, "on the weight's device", rand(2, 3).to("meta")),
    ):
        with pytest.raises(error, match=f"AutoFeatureExtractor: x must .*{match}"):
            module(bad)
    assert not module[0].filled.any()
    module(rand(2, 3))
    for error, arguments in ((TypeError, {"reg_weight": "1"}), (TypeError, {"process_group": 1})):
        with pytest.raises(error, match=next(iter(arguments))):
            module[0].objective(**arguments)
    module[0].objective()
