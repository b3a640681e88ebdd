"""Bytes and structure of a `.tflite` file, counted from the file itself."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import zstandard
from ai_edge_litert.interpreter import Interpreter

from tfkit import export

#: Smaller constants (biases, shapes, quantization parameters) are not what the methods compress.
LEAST_KERNEL = 200


def sizes(path: Path, scratch: Path) -> dict[str, int]:
    """Sizes in bytes: `raw`, `gzip` (-9), `xz` (-9e), `zstd` (-19) and `packed` by tfkit.

    Args:
        path: the `.tflite` file.
        scratch: folder for the packed file.

    Raises:
        RuntimeError: if the packed file does not unpack to the identical bytes.
    """
    content = path.read_bytes()
    packed = scratch / f"{path.stem}.packed"
    restored = scratch / f"{path.stem}.restored"
    export.pack(path, packed, force=True)
    export.unpack(packed, restored, force=True)
    if restored.read_bytes() != content:
        raise RuntimeError(f"{path.name}: unpacking its packed form gave other bytes")
    restored.unlink()
    return {
        "raw": len(content),
        "gzip": len(gzip.compress(content, 9)),
        "xz": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
        "zstd": len(zstandard.ZstdCompressor(level=19).compress(content)),
        "packed": packed.stat().st_size,
    }


def structure(path: Path) -> dict[str, float | int]:
    """Share of zeros over all kernels, and the most distinct values that a kernel has.

    Returns:
        `zeros` in 0..1 and `distinct`. For a file with folded batch normalization each channel scales its own
        values, so `distinct` counts more than the codebook of the network has.
    """
    interpreter = Interpreter(str(path))
    sizes_, nonzero, distinct = 0, 0, 0
    for detail in interpreter.get_tensor_details():
        if np.prod(detail["shape"]) < LEAST_KERNEL or len(detail["shape"]) not in (2, 4):
            continue
        try:
            value = interpreter.get_tensor(detail["index"])
        except ValueError:  # before allocation only constants have data
            continue
        sizes_ += value.size
        nonzero += np.count_nonzero(value)
        distinct = max(distinct, len(np.unique(value)))
    return {"zeros": 1.0 - nonzero / max(sizes_, 1), "distinct": distinct}
