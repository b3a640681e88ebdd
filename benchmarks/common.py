"""What every benchmark shares: the machine's description, package versions and atomic result files.

Imports nothing but the standard library, so that a program in another virtual environment can use it too.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Describe the computer the figures come from.

    Returns:
        Keys `cpu` (model name), `cores` (usable logical ones), `memory_gib`, `system`, `python`.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    described: dict[str, Any] = {"cpu": cpu, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    described["python"] = platform.python_version()
    return described


def versions(*packages: str) -> dict[str, str]:
    """Versions of the named distributions in the running interpreter, `absent` where one is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def write_json(path: Path | str, payload: Mapping[str, Any]) -> Path:
    """Write `payload` to `path` whole or not at all (temporary file beside it, then `os.replace`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(payload, indent=2, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_result(path: Path | str, figures: Mapping[str, float], **rest: Any) -> Path:
    """Write a result file: a flat `figures` object of plain numbers, then whatever else the benchmark keeps.

    Args:
        path: The file, conventionally `benchmarks/results/<name>.json`.
        figures: Name to finite number.
        **rest: Tables and settings; `machine`, and `command` unless given, are added here.

    Returns:
        The path written.

    Raises:
        ValueError: If a figure is not a finite plain number.
    """
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"figures[{name!r}] must be a finite plain number; got {value!r}. Put tables beside it.")
    program = Path(sys.argv[0]).resolve()
    root = RESULTS.parents[1]
    name = str(program.relative_to(root)) if program.is_relative_to(root) else program.name
    # Where a user keeps his environments is nobody's business.
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    command = " ".join(["python", name, *words])
    return write_json(path, {"figures": dict(figures), "machine": machine(), "command": command, **rest})


def say(text: str) -> None:
    """Prints a line at once, so that who waits sees it."""
    print(text, flush=True)
