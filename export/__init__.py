"""What tfkit exports, it measures: convert, verify, pack, measure.

Importing this package does not import TensorFlow; only `convert` and `verify` need it, when first used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfkit.export.convert import ConversionError, convert
    from tfkit.export.measure import LatencyRatio, MeasureError, Measurement, compare_latency, measure
    from tfkit.export.mixed_precision import NarrowRow, PrecisionRow, mixed_precision, narrow_weights
    from tfkit.export.pack import PackError, PackResult, pack, pack_bytes, unpack, unpack_bytes
    from tfkit.export.runner import Runner, RunnerError
    from tfkit.export.sparse_storage import SparsifyError, SparsifyResult, sparsify
    from tfkit.export.verify import OutputParity, ParityError, ParityReport, verify

_HOMES = {
    "convert": ("ConversionError", "convert"),
    "measure": ("LatencyRatio", "MeasureError", "Measurement", "compare_latency", "measure"),
    "mixed_precision": ("NarrowRow", "PrecisionRow", "mixed_precision", "narrow_weights"),
    "pack": ("PackError", "PackResult", "pack", "pack_bytes", "unpack", "unpack_bytes"),
    "runner": ("Runner", "RunnerError"),
    "sparse_storage": ("SparsifyError", "SparsifyResult", "sparsify"),
    "verify": ("OutputParity", "ParityError", "ParityReport", "verify"),
}

__all__ = [
    "ConversionError",
    "LatencyRatio",
    "MeasureError",
    "Measurement",
    "NarrowRow",
    "OutputParity",
    "PackError",
    "PackResult",
    "ParityError",
    "ParityReport",
    "PrecisionRow",
    "Runner",
    "RunnerError",
    "SparsifyError",
    "SparsifyResult",
    "compare_latency",
    "convert",
    "measure",
    "mixed_precision",
    "narrow_weights",
    "pack",
    "pack_bytes",
    "sparsify",
    "unpack",
    "unpack_bytes",
    "verify",
]


class _Package(types.ModuleType):
    """Keeps `tfkit.export.convert` and its like the function, though a submodule of that name exists.

    Importing a submodule binds it on its package; without this, `from tfkit.export.convert import ...` anywhere would
    turn the function into a module for everybody.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and name in _HOMES.get(name, ()):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
