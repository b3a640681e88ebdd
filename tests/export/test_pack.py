"""pack and unpack: the same bytes back, never longer than general compressors, and no harm from hostile files."""

from __future__ import annotations

import gzip
import lzma
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.pack_models import deep_compressed, tflite
from tfkit.export.pack import PackError, pack, pack_bytes, unpack, unpack_bytes
from tfkit.export.packing.bits import write_varint
from tfkit.export.packing.container import pack_parts


def _weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    dense = _weights((300, 784))
    pruned = np.where(np.abs(dense) > 0.1, dense, np.float32(0))
    clustered = deep_compressed(300, 784)
    scale = np.abs(dense).max(axis=1, keepdims=True) / 127
    return {
        "deep_compressed": tflite(clustered, deep_compressed(100, 300, seed=1), _weights((300,)), _weights((100,))),
        "negative_zeros": tflite(clustered * np.sign(dense)),
        "pruned": tflite(pruned, _weights((300,))),
        "float32": tflite(dense, _weights((300,))),
        "float16": tflite(dense.astype(np.float16), _weights((300,))),
        "int8": tflite(np.round(dense / scale).astype(np.int8), np.arange(-150, 150, dtype=np.int32) * 37),
        "twins": tflite(clustered[:50], _weights((64,)), clustered[:50]),
    }


def _best_general(data: bytes) -> int:
    zstandard = pytest.importorskip("zstandard")
    return min(
        len(gzip.compress(data, 9)),
        len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        len(zstandard.ZstdCompressor(level=19).compress(data)),
    )


NAMES = ["deep_compressed", "negative_zeros", "pruned", "float32", "float16", "int8", "twins"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_and_is_shorter_than_any_general_compressor_makes_it(
    name: str, files: dict[str, bytes]
) -> None:
    packed = pack_bytes(files[name])
    assert unpack_bytes(packed) == files[name]
    limit = 0.9 if name in ("deep_compressed", "negative_zeros") else 1.0
    assert len(packed) <= limit * _best_general(files[name])


def test_positions_and_values_cost_little_more_than_their_entropy(files: dict[str, bytes]) -> None:
    (part,) = (p for p in pack_parts(files["deep_compressed"]).parts if p.buffer.name == "weights0")
    weights = deep_compressed(300, 784)
    kept = weights != 0
    share = kept.mean()
    iid = -weights.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    _, counts = np.unique(weights[kept], return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum()
    assert part.coded.coded == kept.sum()
    assert part.coded.distinct == len(counts)
    assert part.coded.classes > 1  # columns of different density
    # A class is worth its while: positions cost less than any code that thinks them alike everywhere.
    assert part.coded.index_bits < 0.92 * iid
    assert entropy <= part.coded.value_bits < 1.02 * entropy + 8
    assert part.coded.table_bits < 0.06 * (iid + entropy)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 63, 64, 127, 128, 255, 256, 1000, 70000])
def test_random_bytes_grow_by_eight(size: int) -> None:
    data = random.Random(size).randbytes(size)
    packed = pack_bytes(data)
    assert len(packed) == size + 8
    assert unpack_bytes(packed) == data
    if size:
        assert len(packed) <= _best_general(data)


@pytest.mark.parametrize("data", [bytes(300), bytes(10**6), b"tensor " * 40, np.arange(4000).tobytes()])
def test_plain_files_are_not_longer_than_by_general_compressors(data: bytes) -> None:
    packed = pack_bytes(data)
    assert unpack_bytes(packed) == data
    assert len(packed) <= _best_general(data)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=2000))
def test_any_bytes_come_back(data: bytes) -> None:
    assert unpack_bytes(pack_bytes(data)) == data


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2**31))
def test_a_damaged_model_file_comes_back(noise: bytes, seed: int) -> None:
    data = bytearray(tflite(deep_compressed(8, 30, density=0.3, seed=1)))
    draw = random.Random(seed)
    for byte in noise[:20]:
        data[draw.randrange(len(data))] = byte
    cut = bytes(data[: draw.randrange(8, len(data) + 1)])
    for file in (bytes(data), cut):
        assert unpack_bytes(pack_bytes(file)) == file


def test_files_with_offsets_behind_the_flatbuffer_come_back() -> None:
    from ai_edge_litert import schema_py_generated as schema

    data = tflite(_weights((8,)))
    buffer = schema.ModelT.InitFromPackedBuf(data, 0).buffers[1]
    assert bytes(buffer.data) == _weights((8,)).tobytes()
    tail = deep_compressed(20, 50).tobytes()
    assert unpack_bytes(pack_bytes(data + tail)) == data + tail


# --- files ------------------------------------------------------------------------------------------------------------


def test_pack_and_unpack_files(tmp_path: Path, files: dict[str, bytes]) -> None:
    source = tmp_path / "model.tflite"
    source.write_bytes(files["deep_compressed"])
    result = pack(source)
    assert result.path == tmp_path / "model.tflite.tfk"
    assert result.size_bytes == result.path.stat().st_size
    assert result.raw_size_bytes == len(files["deep_compressed"])
    assert result.ratio == result.raw_size_bytes / result.size_bytes
    assert unpack(result.path, tmp_path / "again.tflite").read_bytes() == files["deep_compressed"]
    assert not list(tmp_path.glob(".*"))  # no temporary files stay


def test_outputs_are_not_overwritten_unless_forced(tmp_path: Path) -> None:
    source = tmp_path / "model.tflite"
    source.write_bytes(b"weights" * 30)
    pack(source)
    with pytest.raises(FileExistsError, match="force=True"):
        pack(source)
    with pytest.raises(FileExistsError, match="force=True"):
        unpack(tmp_path / "model.tflite.tfk")
    with pytest.raises(FileExistsError, match="give another out"):
        pack(source, source, force=True)
    pack(source, force=True)
    assert unpack(tmp_path / "model.tflite.tfk", force=True) == source
    assert source.read_bytes() == b"weights" * 30
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "absent.tflite")
    with pytest.raises(ValueError, match="out must be given"):
        unpack(source)


def test_a_damaged_file_leaves_no_output(tmp_path: Path, files: dict[str, bytes]) -> None:
    packed = bytearray(pack_bytes(files["twins"]))
    packed[-5] ^= 1
    (tmp_path / "x.tfk").write_bytes(packed)
    with pytest.raises(PackError):
        unpack(tmp_path / "x.tfk")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tfk"]


def test_rows_account_for_every_byte(tmp_path: Path, files: dict[str, bytes]) -> None:
    rows = {}
    for name in ("deep_compressed", "negative_zeros", "int8", "twins"):
        source = tmp_path / f"{name}.tflite"
        source.write_bytes(files[name])
        result = pack(source)
        rows |= {(name, row.name): row for row in result.buffers}
        for row in result.buffers:
            if row.packed_bytes is None:
                assert row.coding == "rest"
                continue
            streams = row.value_bytes + row.index_bytes + row.table_bytes + row.zero_sign_bytes
            assert row.packed_bytes - 1 < streams <= row.packed_bytes
        coded = [row for row in result.buffers if row.coding != "rest"]
        assert result.rest_bytes == result.raw_size_bytes - sum(row.size_bytes for row in coded)
        assert 8 < result.overhead_bytes < 16 + 10 * len(coded)
    first = rows["deep_compressed", "weights0"]
    weights = deep_compressed(300, 784)
    assert (first.name, first.shape, first.coding) == ("weights0", (300, 784), "sparse")
    assert first.density == np.count_nonzero(weights) / weights.size
    assert (first.distinct, first.fixed_value_bits) == (16, 4)
    assert first.packed_bytes is not None and first.packed_bytes < first.fixed_bytes
    assert rows["int8", "weights0"].coding == "dense"
    assert {rows["twins", "weights0"].coding, rows["twins", "weights2"].coding} == {"sparse", "copy"}
    zeros = np.count_nonzero(weights == 0)
    assert rows["negative_zeros", "weights0"].zero_sign_bytes == zeros / 8


# --- hostile input ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_packed() -> list[tuple[bytes, bytes]]:
    """Small files of every kind, so that thousands of corruptions are quick."""
    signed = deep_compressed(20, 30, density=0.2, seed=3) * np.sign(_weights((20, 30)))
    channels = np.concatenate([np.full((16, 60), 3, np.int8), np.arange(960, dtype=np.int64).reshape(16, 60) % 7 - 3])
    originals = [
        tflite(deep_compressed(60, 40, density=0.2), _weights((40,))),
        tflite(signed.astype(np.float32)),
        tflite(_weights((20, 30)).astype(np.float16)),
        tflite(channels.astype(np.int8), np.arange(-50, 50, dtype=np.int32) * 91),
        tflite(*[deep_compressed(20, 30, seed=5)] * 2),
        b"whole file, " * 30,
        random.Random(1).randbytes(90),
    ]
    return [(data, pack_bytes(data)) for data in originals]


def test_the_small_files_cover_the_format(small_packed: list[tuple[bytes, bytes]]) -> None:
    assert {packed[3] & 15 for _, packed in small_packed} == {0, 1, 2}
    parts = [part for data, _ in small_packed for part in pack_parts(data).parts]
    assert {part.kind for part in parts} == {0, 1}
    assert {part.coded.sparse for part in parts} == {True, False}
    assert any(part.coded.classes > 1 for part in parts)
    assert any(part.coded.zero_sign_bits for part in parts)


def _corrupt(packed: bytes, others: list[bytes], draw: random.Random) -> bytes:
    data = bytearray(packed)
    kind = draw.randrange(6)
    if kind == 0:
        return bytes(data[: draw.randrange(len(data))])
    if kind == 1:
        start = draw.randrange(len(data))
        del data[start : start + draw.randrange(1, 20)]
    elif kind == 2:
        other = draw.choice(others)
        start, source = draw.randrange(len(data)), draw.randrange(len(other))
        data[start : start + 16] = other[source : source + 16]
    elif kind == 3:
        data[draw.randrange(len(data))] = draw.choice([0, 0x7F, 0x80, 0xFF])
    elif kind == 4:
        start = draw.randrange(8, max(9, min(40, len(data))))  # absurd sizes in header and directory
        data[start:start] = write_varint(draw.choice([2**20, 2**31, 2**40, 2**62]))
    else:
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def test_ten_thousand_corruptions_are_noticed_quickly_and_in_little_memory(
    small_packed: list[tuple[bytes, bytes]],
) -> None:
    draw = random.Random(0)
    packed = [p for _, p in small_packed]
    limit = 1 << 20
    for data, p in small_packed:
        assert unpack_bytes(p) == data  # compiles the kernels before the clock starts
    refused = 0
    slowest = 0.0
    tracemalloc.start()
    for i in range(10_000):
        original, source = small_packed[i % len(small_packed)]
        bad = _corrupt(source, packed, draw)
        started = time.process_time()
        try:
            assert unpack_bytes(bad, max_bytes=limit) == original
        except PackError:
            refused += 1
        slowest = max(slowest, time.process_time() - started)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 8_000  # a flipped bit may hit padding, and a splice may change nothing
    assert slowest < 2.0
    assert peak < 12 * limit


def test_every_truncation_is_refused(small_packed: list[tuple[bytes, bytes]]) -> None:
    for data, packed in small_packed:
        for size in range(len(packed)):
            try:
                assert unpack_bytes(packed[:size]) == data  # LZMA may not need its last byte
            except PackError:
                continue


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2), st.binary(max_size=200))
def test_arbitrary_content_behind_a_good_header_is_refused(mode: int, body: bytes) -> None:
    packed = b"TFK" + bytes([0x10 | mode]) + b"\x01\x02\x03\x04" + body
    with pytest.raises(PackError):
        unpack_bytes(packed, max_bytes=1 << 20)


def test_sizes_beyond_the_limit_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    bomb = b"TFK\x11" + bytes(4) + write_varint(2**62) + b"\x01" + bytes(20)
    part = b"TFK\x12" + bytes(4) + write_varint(2**40) + b"\x01\x00" + write_varint(2**40) + b"\x01\x04" + bytes(9)
    tracemalloc.start()
    for packed in (bomb, part):
        with pytest.raises(PackError, match="max_bytes"):
            unpack_bytes(packed)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    stored = pack_bytes(random.Random(0).randbytes(1000))
    with pytest.raises(PackError, match="max_bytes"):
        unpack_bytes(stored, max_bytes=999)
    assert len(unpack_bytes(stored, max_bytes=1000)) == 1000
    (tmp_path / "x.tfk").write_bytes(stored)
    with pytest.raises(PackError, match="max_bytes"):
        unpack(tmp_path / "x.tfk", max_bytes=900)


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep_compressed", "int8", "float32"])
def test_decoding_gives_20_megabytes_a_second(name: str, files: dict[str, bytes]) -> None:
    packed = pack_bytes(files[name])
    assert pack_parts(files[name]).parts  # the Huffman path, not LZMA
    unpack_bytes(packed)
    best = float("inf")
    for _ in range(7):
        started = time.thread_time()
        unpack_bytes(packed)
        best = min(best, time.thread_time() - started)
    assert len(files[name]) / 1e6 / best >= 20
