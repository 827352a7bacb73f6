"""What is installed, what runs here and what does not: `python -m fusefeat.info [--json]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from fusefeat import _library, backends
from fusefeat._version import __version__


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _not_here(backend: backends.Backend) -> str | None:
    """Why the backend runs nothing on this machine."""
    if backend.device_types == ("cuda",) and not torch.cuda.is_available():
        return backend.why_unavailable() or "no CUDA device here"
    return backend.why_unavailable()


def _dispatch(family: str, device_type: str, unavailable: dict[str, str | None]) -> dict[str, Any]:
    order = backends.order(family, device_type)
    usable = [name for name in order if unavailable[name] is None]
    return {"order": order, "backend": usable[0] if usable else None}


def report() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    library = _library.STATE
    unavailable = {name: backend.why_unavailable() for name, backend in backends.BACKENDS.items()}
    isa: dict[str, Any] = {}
    if library.bindings is not None:
        isa["features"] = library.bindings.cpu_features()
        if library.cpu_loaded:
            isa |= _library.isa()
    return {
        "versions": {
            "fusefeat": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _triton_version(),
            "python": platform.python_version(),
        },
        "build": library.build_info,
        "not_loaded": library.reasons,
        "isa": isa,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {name: _not_here(backend) for name, backend in backends.BACKENDS.items()},
        "dispatch": {
            family: {device: _dispatch(family, device, unavailable) for device in ("cpu", "cuda")}
            for family in backends.FAMILIES
        },
    }


def _rows(title: str, rows: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _build_rows(build: dict[str, Any]) -> list[tuple[str, str]]:
    if not build:
        return [("compiled", "no")]
    rows = [
        ("compiled", f"{build['compiler']}, against torch {build['torch']} for torch >= {build['torch_target']}"),
        ("flags", build["cxx_flags"]),
        ("cpu", ", ".join(build["isas"])),
    ]
    if build["cuda"]:
        rows.append(("cuda", f"{build['cuda']}, architectures {', '.join(build['cuda_archs'])}"))
    return rows + [(name, f"not built: {reason}") for name, reason in build["not_built"].items() if reason]


def _dispatch_text(choice: dict[str, Any], unavailable: dict[str, str | None]) -> str:
    passed = []
    for name in choice["order"]:
        if name == choice["backend"]:
            break
        passed.append(f"{name}: {unavailable[name]}")
    return (choice["backend"] or "none") + (f"  (not {'; '.join(passed)})" if passed else "")


def text(facts: dict[str, Any]) -> str:
    versions = [(name, version or "none") for name, version in facts["versions"].items()]
    isa = facts["isa"]
    processor = [("in use", isa.get("current", "unknown")), ("best", isa.get("best", "unknown"))]
    if isa.get("features"):
        processor.append(("features", " ".join(name for name, there in isa["features"].items() if there) or "none"))
    parts = [
        _rows("versions", versions),
        _rows("build", _build_rows(facts["build"])),
        _rows("instruction set of the CPU kernels", processor),
        _rows("CUDA devices", [(str(i), name) for i, name in enumerate(facts["devices"])] or [("none", "")]),
        _rows("backends", [(name, reason or "available") for name, reason in facts["backends"].items()]),
        _rows(
            "automatic choice",
            [
                (f"{family} on {device}", _dispatch_text(choice, facts["backends"]))
                for family, devices in facts["dispatch"].items()
                for device, choice in devices.items()
            ],
        ),
    ]
    others = [(name, reason) for name, reason in facts["not_loaded"].items() if name not in facts["backends"]]
    if others:
        parts.append(_rows("not as wished", others))
    return "\n\n".join(part.rstrip() for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusefeat.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    arguments = parser.parse_args()
    facts = report()
    print(json.dumps(facts, indent=2) if arguments.json else text(facts))


if __name__ == "__main__":
    main()
