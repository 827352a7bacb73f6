"""The layer that runs CUDA kernels on the CPU finds planted faults."""

import ctypes

import pytest
import torch
from cuda_on_cpu.build import HERE, build, compiler

THREADS = 64
FAULTS = [
    "none",
    "no barrier",
    "no barrier, seen in one order only",
    "unwritten tail",
    "divergent barrier",
    "two barriers",
    "past the end",
    "returned lane",
    "different shuffles",
    "misaligned",
    "past a tensor",  # this and the next are seen by the address sanitizer only: test_cuda_on_cpu_memory.py
    "past a local array",
]


@pytest.fixture(scope="session")
def planted(request):
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folder = request.config.cache.mkdir("cuda_on_cpu")
    library = ctypes.CDLL(str(build(folder, "planted", [HERE / "planted_faults.cu"])))
    library.run_planted.restype = ctypes.c_char_p
    return library


def run(library, fault: str, reverse: bool) -> tuple[str, bool]:
    """The error that was reported, and whether the result is right."""
    library.cuda_on_cpu_set_reverse(reverse)
    source = torch.arange(THREADS + 4, dtype=torch.float32)
    out = torch.full((THREADS,), float("nan"))
    message = library.run_planted(
        ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()), FAULTS.index(fault)
    )
    library.cuda_on_cpu_set_reverse(False)
    return message.decode(), torch.equal(out, source[:THREADS].flip(0))


@pytest.mark.parametrize("reverse", [False, True])
def test_sound_kernel(planted, reverse):
    assert run(planted, "none", reverse) == ("", True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("fault", ["no barrier", "unwritten tail"])
def test_wrong_result(planted, fault, reverse):
    assert run(planted, fault, reverse) == ("", False)


def test_wrong_result_in_one_order(planted):
    results = [run(planted, "no barrier, seen in one order only", reverse) for reverse in (False, True)]
    assert sorted(results) == [("", False), ("", True)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent barrier", "deadlock"),
        ("two barriers", "different barriers"),
        ("past the end", "past the end of dynamic shared memory"),
        ("returned lane", "a lane that has returned"),
        ("different shuffles", "different warp operations"),
        ("misaligned", "not aligned"),
    ],
)
def test_reported(planted, fault, message, reverse):
    assert message in run(planted, fault, reverse)[0]
    assert run(planted, "none", reverse) == ("", True), "the layer recovers from a fault"


def test_shuffles_out_of_range(planted):
    out = torch.empty(6, 32, dtype=torch.int32)
    planted.run_shuffles(ctypes.c_void_p(out.data_ptr()))
    lane = torch.arange(32, dtype=torch.int32)
    section = lane // 8 * 8
    assert torch.equal(out[0], torch.where(lane + 20 < 32, lane + 20, lane))
    assert torch.equal(out[1], torch.where(lane >= 20, lane - 20, lane))
    # Towards lower sections an exclusive or reaches outside its own; towards higher ones it does not.
    assert torch.equal(out[2], torch.where((lane ^ 12) < section + 8, lane ^ 12, lane))
    assert torch.equal(out[3], section + 1)
    assert torch.equal(out[4], torch.where(lane + 3 < section + 8, lane + 3, lane))
    assert (out[5] == sum(1 << i for i in range(0, 32, 3))).logical_or(out[5] < 0).all()


def test_barrier_after_early_exits(planted):
    out = torch.zeros(64, dtype=torch.int32)
    planted.run_early_exits(ctypes.c_void_p(out.data_ptr()))
    assert torch.equal(out, torch.arange(64, dtype=torch.int32))
