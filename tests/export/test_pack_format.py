"""The packed format: its page in docs/ against the code, Huffman codes against known answers and bounds."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.export import reference_decoder
from tests.export.pack_models import deep_compressed, tflite
from tfkit.export.packing import general, huffman
from tfkit.export.packing.bits import BitReader, BitWriter, PackError, read_varint, write_varint
from tfkit.export.packing.container import unpack_bytes
from tfkit.export.packing.dictionary import tflite_dictionary
from tfkit.export.packing.flatbuffer import weight_buffers
from tfkit.export.packing.gaps import GAP_CODES, MAX_GAP_BITS, GapCode, fixed_width_cost
from tfkit.export.packing.tensor import decode_tensor, encode_tensor

DOCUMENT = Path(__file__).parents[2] / "docs" / "pack_format.md"


def _example() -> np.ndarray:
    elements = np.zeros(160, np.int8)
    elements[[3, 10, 11, 30, 31, 47, 50, 59]] = [2, 2, -2, 2, 2, 5, -2, 2]
    return elements


def _hex(kind: str) -> bytes:
    found = re.search(rf"```{kind}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return bytes.fromhex(found[1])


def test_the_documents_example_is_what_the_code_writes_and_reads() -> None:
    data = _example().tobytes()
    coded = encode_tensor(data, 8, (160,))
    assert coded is not None and coded.payload == _hex("tensor")
    assert unpack_bytes(_hex("file")) == data
    assert _hex("file").endswith(coded.payload)
    bits = "".join(re.findall(r"`([01]+)`", DOCUMENT.read_text().split("| bits | meaning |")[1]))
    assert bits == "".join(f"{byte:08b}" for byte in coded.payload)


def test_the_documented_dictionary_is_the_codes() -> None:
    dictionary = tflite_dictionary()
    assert f"{len(dictionary)} bytes with CRC-32 {zlib.crc32(dictionary):08x}" in DOCUMENT.read_text()


def _decoded(payload: bytes, size: int) -> bytes:
    out = np.full(size, 0xA5, np.uint8)
    decode_tensor(payload, out)
    return out.tobytes()


CASES = {
    "classes": (deep_compressed(60, 40, density=0.2), 32),
    "signed zeros": (deep_compressed(30, 40) * np.random.default_rng(5).choice(np.float32([-1, 1]), (30, 40)), 32),
    "dense float": (np.random.default_rng(0).normal(size=(10, 30)).astype(np.float32), 32),
    "half": (np.random.default_rng(1).normal(size=(10, 30)).astype(np.float16), 16),
    "brain float": ((np.random.default_rng(2).normal(size=90).astype(np.float32).view(np.uint32) >> 16 << 16), 32),
    "bias": ((np.arange(-40, 40) ** 3).astype(np.int32), 32),
    "nibbles": (np.random.default_rng(3).choice([0] * 27 + [0x10, 0x01, 0x2F], 2000).astype(np.uint8), 4),
    "background": (np.where(np.arange(400) % 19, np.uint8(128), np.arange(400).astype(np.uint8)), 8),
    "constant": (np.full(50, 7, np.int8), 8),
    "one": (np.array([1.5], np.float32), 32),
    "long gaps": (np.where(np.arange(9000) % 2998, 0, np.arange(9000)).astype(np.int32), 32),
    "columns": (np.repeat(np.random.default_rng(4).random(80) < 0.3, 40).reshape(80, 40).T.astype(np.int8), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_written_from_the_document_agrees(name: str) -> None:
    array, width = CASES[name]
    coded = encode_tensor(array.tobytes(), width, array.shape)
    assert coded is not None
    assert reference_decoder.decode(coded.payload, array.nbytes) == array.tobytes()
    assert _decoded(coded.payload, array.nbytes) == array.tobytes()


def test_the_cases_cover_the_format() -> None:
    coded = {name: encode_tensor(array.tobytes(), width, array.shape) for name, (array, width) in CASES.items()}
    assert coded["classes"].classes > 1 and coded["classes"].sparse
    assert coded["signed zeros"].zero_sign_bits and coded["nibbles"].sparse and coded["background"].sparse
    assert not coded["dense float"].sparse and coded["constant"].value_bits == 0
    headers = {name: BitReader(c.payload) for name, c in coded.items()}
    assert any(reader.get(9) & 1 for name, reader in headers.items() if name in ("columns", "classes"))  # transposed
    # bfloat16 values: sixteen zero bits cost nothing.
    assert coded["brain float"].value_bits < 90 * 16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sparse_tensors_come_back(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=24))
    dtype, width = data.draw(st.sampled_from([(np.float32, 32), (np.float16, 16), (np.int8, 8), (np.int8, 4)]))
    seed, density = data.draw(st.integers(0, 2**31)), data.draw(st.floats(0, 1))
    draw = np.random.default_rng(seed)
    values = draw.integers(-60, 60, data.draw(st.integers(1, 70))).astype(dtype)
    array = np.where(draw.random(shape) < density, draw.choice(values, shape), data.draw(st.sampled_from([0, -0.0, 3])))
    content = array.astype(dtype).tobytes()
    coded = encode_tensor(content, width, shape)
    assert coded is not None
    assert _decoded(coded.payload, len(content)) == content


# --- parts ------------------------------------------------------------------------------------------------------------


def test_huffman_lengths_of_a_textbook_example() -> None:
    # Cormen et al., figure 16.4: a to f with 45, 13, 12, 16, 9, 5.
    lengths = huffman.code_lengths(np.array([45, 13, 12, 16, 9, 5]))
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    # RFC 1951, 3.2.2: lengths 3, 3, 3, 3, 3, 2, 4, 4 of A to H.
    codes = huffman.canonical_codes(np.array([3, 3, 3, 3, 3, 2, 4, 4]))
    assert codes.tolist() == [0b010, 0b011, 0b100, 0b101, 0b110, 0b00, 0b1110, 0b1111]


def test_huffman_is_within_a_bit_of_entropy_and_its_lengths_are_limited() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    for counts in (
        np.array(fibonacci),
        np.random.default_rng(0).zipf(1.3, 300).clip(max=10**6),
        np.array([0, 3, 0, 9]),
    ):
        lengths = huffman.code_lengths(counts).astype(np.int64)
        used = counts > 0
        assert (lengths[used] > 0).all() and not lengths[~used].any() and lengths.max() <= huffman.MAX_LENGTH
        assert (2.0 ** -lengths[used]).sum() == 1
        share = counts[used] / counts.sum()
        assert (share * lengths[used]).sum() < -(share * np.log2(share)).sum() + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=80))
def test_length_tables_come_back_and_their_cost_is_known(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts))
    single = huffman.single_symbol(np.array(counts))
    writer = BitWriter()
    huffman.write_lengths(writer, lengths, single)
    if lengths.any():
        assert writer.bits == huffman.length_table_bits(lengths)
    again, symbol = huffman.read_lengths(BitReader(writer.getvalue()), len(counts))
    assert again.tolist() == lengths.tolist()
    assert lengths.any() or symbol == single


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 2], [2, 2, 2], [1, 0, 0], [15] * 3])
def test_incomplete_and_oversubscribed_codes_are_refused(lengths: list[int]) -> None:
    with pytest.raises(PackError, match="prefix code"):
        huffman.decode_table(np.array(lengths), 0)


@pytest.mark.parametrize("code", GAP_CODES)
def test_gap_symbols_are_a_bijection(code: GapCode) -> None:
    gaps = np.concatenate([np.arange(5000), 2 ** np.arange(MAX_GAP_BITS), 2 ** np.arange(1, MAX_GAP_BITS) - 1])
    symbols, extra, bits = code.split(gaps)
    base, count = code.bases(code.symbols)
    assert symbols.max() < code.symbols
    assert (base[symbols] + extra == gaps).all() and (count[symbols] == bits).all() and (extra < 1 << bits).all()


def test_fixed_width_gaps_follow_the_papers_figure() -> None:
    # Deep Compression, figure 2: differences 1, 4, 3, 8 + 4 in three bits need one filler zero.
    gaps = np.array([0, 3, 2, 7 + 4])
    assert {w: len(gaps) + int((gaps >> w).sum()) for w in (3,)} == {3: 5}
    width, entries = fixed_width_cost(gaps, 32)
    assert entries == len(gaps) + int((gaps >> width).sum())
    assert fixed_width_cost(np.zeros(0, np.int64), 4) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 31)), max_size=30))
def test_numbers_come_back(numbers: list[tuple[int, int]]) -> None:
    writer = BitWriter()
    for value, order in numbers:
        writer.put_exp_golomb(value, order)
    reader = BitReader(writer.getvalue())
    assert [reader.get_exp_golomb(order) for _, order in numbers] == [value for value, _ in numbers]
    for value, _ in numbers:
        assert read_varint(write_varint(value), 0)[0] == value
    with pytest.raises(PackError):
        reader.get(8)
    with pytest.raises(PackError, match="longer than"):
        read_varint(b"\xff" * 10, 0)


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 16, 16 + (2 * 5 + 2) * 9, 16 + (4 * 5 + 1) * 9 + 3])
def test_general_streams_come_back(codec: int) -> None:
    for data in (b"x", b"MLIR Converted. " * 20, bytes(5000), np.arange(900, dtype=np.int16).tobytes()):
        stream = general.compress_with(data, codec)
        assert general.decompress(stream, codec, len(data)) == data
        with pytest.raises(PackError):
            general.decompress(stream, codec, len(data) + 1)
    with pytest.raises(PackError):
        general.decompress(b"abc", 9, 10)
    with pytest.raises(PackError):
        general.decompress(b"abc", 255, 10)


def test_weight_buffers_are_found() -> None:
    arrays = [deep_compressed(20, 30), np.arange(100, dtype=np.int32), np.zeros((7, 9, 2), np.int8)]
    data = tflite(*arrays)
    found = weight_buffers(data)
    assert {buffer.name for buffer in found} == {"weights0", "weights1", "weights2"}
    for buffer in found:
        array = arrays[int(buffer.name[-1])]
        assert data[buffer.start : buffer.start + buffer.size] == array.tobytes()
        assert (buffer.shape, buffer.dtype, buffer.width) == (array.shape, array.dtype.name, array.dtype.itemsize * 8)


def test_packing_needs_no_tensorflow_and_starts_without_numba() -> None:
    code = (
        "import sys; from tfkit.export.pack import pack_bytes, unpack_bytes; "
        "assert 'numba' not in sys.modules; "
        "assert unpack_bytes(pack_bytes(bytes(1000))) == bytes(1000); "
        "assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
