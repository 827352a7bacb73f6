"""`python -m fusefeat.info`."""

from __future__ import annotations

import json
import subprocess
import sys

import fusefeat
import pytest
import torch
from fusefeat import _library, backends, info


def test_report_says_what_is_there() -> None:
    facts = info.report()
    assert facts["versions"]["fusefeat"] == fusefeat.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["build"] == _library.STATE.build_info
    assert facts["isa"]["current"] == _library.isa()["current"]
    assert facts["backends"].keys() == backends.BACKENDS.keys()
    assert facts["backends"]["reference"] is None
    for family in backends.FAMILIES:
        for device in ("cpu", "cuda"):
            choice = facts["dispatch"][family][device]
            assert choice["order"] == backends.order(family, device)
            assert backends.BACKENDS[choice["backend"]].why_unavailable() is None


def test_a_backend_without_its_device_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    only_cuda = backends.Backend("triton", ("cuda",), lambda: None)
    monkeypatch.setitem(backends.BACKENDS, "triton", only_cuda)
    for there, reason in ((False, "no CUDA device here"), (True, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert info.report()["backends"]["triton"] == reason


def test_dispatch_of_the_report_is_the_real_one() -> None:
    reported = info.report()["dispatch"]["attention_pool"]["cpu"]["backend"]
    assert reported == backends.choose("attention_pool", None, torch.zeros(1, 1, 1))


def test_unavailable_backend_is_explained() -> None:
    facts = info.report()
    facts["backends"]["triton"] = "triton is away today"
    facts["dispatch"]["attention_pool"]["cuda"] = {"order": ["triton", "reference"], "backend": "reference"}
    text = info.text(facts)
    assert "attention_pool on cuda  reference  (not triton: triton is away today)" in text


def test_text_and_json_of_the_command() -> None:
    command = [sys.executable, "-m", "fusefeat.info"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for word in (torch.__version__, _library.STATE.build_info["compiler"], "instruction set", *backends.BACKENDS):
        assert word in text
    facts = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    assert facts == json.loads(json.dumps(info.report()))
