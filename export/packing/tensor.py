"""One weight buffer as one bit stream: gaps, codebook, canonical Huffman tables, data.

Han, Mao, Dally. Deep compression: compressing deep neural networks with pruning, trained quantization and Huffman
coding. https://arxiv.org/abs/1510.00149.
Differs: gaps have no fixed width (see `gaps`); lines of a tensor may fall into classes with tables of their own (see
`scan`); floats that share no values keep their low bits plain (see `values`); the background need not be
zero; the signs of zeros can be kept apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tfkit.export.packing import huffman
from tfkit.export.packing.bits import BitReader, BitWriter, PackError
from tfkit.export.packing.gaps import GAP_CODES, GapCode, fixed_width_cost
from tfkit.export.packing.scan import MAX_CLASSES, MAX_LINES, Scan, scans
from tfkit.export.packing.values import ValueCode, choose_value_code, entropy_bits

WIDTHS = (4, 8, 16, 32)


class CodedTensor(NamedTuple):
    """A coded buffer and where its bits went.

    Attributes:
        payload: the stream.
        sparse: whether positions were coded.
        coded: number of values in the stream.
        distinct: symbols of the codebook.
        classes: classes of lines.
        index_bits, value_bits: bits of gaps and of values.
        zero_sign_bits: bits that only tell -0.0 from 0.0.
        table_bits: bits of everything else.
        fixed_value_bits, fixed_index_bits, fixed_entries: the same before Huffman coding, as Deep Compression stores
            it: bits of a value, bits of a gap (0: dense), and how many such pairs, filler zeros included.
    """

    payload: bytes
    sparse: bool
    coded: int
    distinct: int
    classes: int
    index_bits: int
    value_bits: int
    zero_sign_bits: int
    table_bits: int
    fixed_value_bits: int
    fixed_index_bits: int
    fixed_entries: int


def to_elements(data: bytes | memoryview, width: int) -> np.ndarray:
    """The buffer's elements as unsigned patterns, int64, shape (elements,); 4-bit elements lie low half first."""
    if width == 4:
        packed = np.frombuffer(data, np.uint8)
        return np.stack([packed & 15, packed >> 4], axis=1).ravel().astype(np.int64)
    return np.frombuffer(data, np.dtype(f"<u{width // 8}")).astype(np.int64)


def encode_tensor(data: bytes | memoryview, width: int, shape: tuple[int, ...]) -> CodedTensor | None:
    """The shortest stream found for a buffer.

    Args:
        data: the buffer's bytes, a whole number of elements.
        width: bits of an element: 4, 8, 16 or 32.
        shape: the tensor's shape; one that does not match the number of elements is ignored.

    Returns:
        The coded tensor, or None when the values are too many for a codebook.
    """
    elements = to_elements(data, width)
    if int(np.prod(shape, dtype=np.float64)) != len(elements):
        shape = (len(elements),)
    drafts = [_best_draft(elements, None, width, shape)]
    sign = 1 << (width - 1)
    if width >= 16 and np.count_nonzero(elements == sign) > 16:
        # Masking by multiplication leaves zeros of either sign: noise, best kept away from the positions.
        plain = np.where(elements == sign, 0, elements)
        drafts.append(_best_draft(plain, elements[plain == 0] >> (width - 1), width, shape))
    found = [draft for draft in drafts if draft is not None]
    return min(found, key=lambda draft: draft.writer.bits).finish() if found else None


class _Draft(NamedTuple):
    writer: BitWriter
    code: ValueCode
    sparse: bool
    coded: int
    classes: int
    index_bits: int
    value_bits: int
    zero_sign_bits: int
    gaps: np.ndarray

    def finish(self) -> CodedTensor:
        fixed_value = (max(len(self.code.codebook), 1) - 1).bit_length() + self.code.low_bits
        fixed_index, entries = fixed_width_cost(self.gaps, fixed_value) if self.sparse else (0, self.coded)
        return CodedTensor(
            payload=self.writer.getvalue(),
            sparse=self.sparse,
            coded=self.coded,
            distinct=len(self.code.codebook),
            classes=self.classes,
            index_bits=self.index_bits,
            value_bits=self.value_bits,
            zero_sign_bits=self.zero_sign_bits,
            table_bits=self.writer.bits - self.index_bits - self.value_bits - self.zero_sign_bits,
            fixed_value_bits=fixed_value,
            fixed_index_bits=fixed_index,
            fixed_entries=entries,
        )


def _best_draft(
    elements: np.ndarray, zero_signs: np.ndarray | None, width: int, shape: tuple[int, ...]
) -> _Draft | None:
    patterns, inverse, counts = np.unique(elements, return_inverse=True, return_counts=True)
    common = int(counts.argmax())
    best: _Draft | None = None
    for sparse in (False, True):
        if sparse and counts[common] * 5 < len(elements):
            continue
        keep = np.arange(len(patterns)) != common if sparse else np.ones(len(patterns), bool)
        chosen = choose_value_code(patterns[keep], counts[keep], width)
        if chosen is None or (best is not None and chosen[1] > best.writer.bits):
            continue
        code = chosen[0]
        symbols = np.zeros(len(patterns), np.int64)
        low = np.zeros(len(patterns), np.int64)
        symbols[keep], low[keep] = code.split(patterns[keep])
        if sparse:
            symbols[keep] += 1
        background = int(patterns[common]) if sparse else None
        all_symbols, all_low = symbols[inverse], low[inverse]
        for scan in scans(all_symbols, shape, int(symbols.max()) + 1):
            draft = _draft(all_symbols, all_low, code, scan, background, zero_signs)
            if best is None or draft.writer.bits < best.writer.bits:
                best = draft
    return best


def _draft(
    symbols: np.ndarray,
    low: np.ndarray,
    code: ValueCode,
    scan: Scan,
    background: int | None,
    zero_signs: np.ndarray | None,
) -> _Draft:
    elements = len(symbols)
    ordered = scan.ordered(symbols)
    starts = scan.starts(elements)
    sparse = background is not None
    at = np.flatnonzero(ordered) if sparse else np.arange(elements)
    first = np.searchsorted(at, starts)  # where each class begins among the coded values
    coded = np.diff(first)
    of_class = np.repeat(np.arange(scan.class_count), coded)

    writer = BitWriter()
    writer.put(WIDTHS.index(code.width), 2)
    writer.put(zero_signs is not None, 1)
    writer.put(sparse, 1)
    if background is not None:
        writer.put(background != 0, 1)
        if background:
            writer.put(background, code.width)
    _write_scan(writer, scan)
    code.write(writer)
    tokens: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    index_bits = 0
    gaps = np.zeros(0, np.int64)
    if sparse:
        gaps = np.diff(at, prepend=-1) - 1
        inner = first[:-1][coded > 0]
        gaps[inner] = at[inner] - starts[:-1][coded > 0]
        for n in coded:
            writer.put_exp_golomb(int(n), 10)
        gap_code, gap_symbols, extra, extra_bits = _choose_gap_code(gaps)
        gap_code.write(writer)
        alphabet = int(gap_symbols.max(initial=0)) + 1
        writer.put_exp_golomb(alphabet, 4)
        gap_words, gap_sizes = _write_tables(writer, gap_symbols, of_class, scan.class_count, alphabet)
        index_bits = int(gap_sizes.sum(dtype=np.int64) + extra_bits.sum())
        tokens += [gap_words, extra]
        sizes += [gap_sizes, extra_bits]
    value_symbols = ordered[at] - sparse
    words, lengths = _write_tables(writer, value_symbols, of_class, scan.class_count, len(code.codebook))
    value_bits = int(lengths.sum(dtype=np.int64)) + code.low_bits * len(at)
    tokens += [words, scan.ordered(low)[at]]
    sizes += [lengths, np.full(len(at), code.low_bits)]
    writer.put_many(np.stack(tokens, axis=1), np.stack(sizes, axis=1))
    sign_bits = 0
    if zero_signs is not None:
        sign_bits = len(zero_signs)
        writer.put_many(zero_signs, np.ones(sign_bits))
    return _Draft(writer, code, sparse, len(at), scan.class_count, index_bits, value_bits, sign_bits, gaps)


def _write_scan(writer: BitWriter, scan: Scan) -> None:
    writer.put(scan.class_count - 1, 4)
    writer.put(scan.transposed, 1)
    if scan.transposed or scan.classes is not None:
        writer.put_exp_golomb(scan.rows, 6)
    if scan.classes is not None:
        words, lengths = _write_tables(writer, scan.classes, np.zeros(len(scan.classes), np.int64), 1, scan.class_count)
        writer.put_many(words, lengths)


def _write_tables(
    writer: BitWriter, symbols: np.ndarray, of_class: np.ndarray, classes: int, alphabet: int
) -> tuple[np.ndarray, np.ndarray]:
    """Writes one table, or one a class if that is shorter; gives each symbol's code and its length."""
    counts = np.bincount(of_class * alphabet + symbols, minlength=classes * alphabet).reshape(classes, alphabet)
    options = [[counts.sum(axis=0)]] + ([list(counts)] if classes > 1 else [])
    best: tuple[int, np.ndarray, list[np.ndarray]] | None = None
    for tables in options:
        lengths = np.stack([huffman.code_lengths(table) for table in tables])
        bits = int((np.stack(tables) * lengths).sum())
        bits += sum(huffman.length_table_bits(row) for row in lengths)
        if best is None or bits < best[0]:
            best = bits, lengths, tables
    assert best is not None
    _, lengths, tables = best
    if classes > 1:
        writer.put(len(tables) > 1, 1)
    for row, table in zip(lengths, tables, strict=True):
        if alphabet > 1:
            huffman.write_lengths(writer, row, huffman.single_symbol(table))
    codes = np.stack([huffman.canonical_codes(row) for row in lengths])
    where = of_class if len(tables) > 1 else np.zeros(len(symbols), np.int64)
    return codes[where, symbols], lengths[where, symbols]


def _choose_gap_code(gaps: np.ndarray) -> tuple[GapCode, np.ndarray, np.ndarray, np.ndarray]:
    distinct, inverse, counts = np.unique(gaps, return_inverse=True, return_counts=True)

    def cost(code: GapCode) -> float:
        symbols, _, bits = code.split(distinct)
        grouped = np.bincount(symbols, weights=counts)
        return entropy_bits(grouped) + float((bits * counts).sum()) + 2.5 * np.count_nonzero(grouped)

    code = min(GAP_CODES, key=cost)
    symbols, extra, bits = code.split(distinct)
    return code, symbols[inverse], extra[inverse], bits[inverse]


def decode_tensor(payload: bytes | memoryview, out: np.ndarray) -> None:
    """Decodes a stream of `encode_tensor`.

    Args:
        payload: the stream.
        out: uint8, shape (bytes of the tensor,): filled.

    Raises:
        PackError: the stream is damaged or belongs to a tensor of another size.
    """
    from tfkit.export.packing import kernels

    reader = BitReader(payload)
    width = WIDTHS[reader.get(2)]
    if 8 * len(out) % width:
        raise PackError(f"damaged: {len(out)} bytes are no whole number of {width}-bit elements")
    elements = 8 * len(out) // width
    signed_zeros, sparse = bool(reader.get(1)), bool(reader.get(1))
    background = reader.get(width) if sparse and reader.get(1) else 0
    words = kernels.as_words(payload)
    scan = _read_scan(reader, elements, words)
    code = ValueCode.read(reader, width)
    starts = scan.starts(elements)
    counts = np.diff(starts)
    gap_code, alphabet = GapCode(0, 0), 1
    gap_tables = np.zeros(1, np.uint32), np.zeros(scan.class_count, np.int64), np.zeros(scan.class_count, np.int64)
    if sparse:
        counts = np.array([reader.get_exp_golomb(10) for _ in range(scan.class_count)], np.int64)
        if np.any(counts > np.diff(starts)):
            raise PackError("damaged: more values than elements")
        gap_code = GapCode.read(reader)
        alphabet = reader.get_exp_golomb(4)
        if not 1 <= alphabet <= gap_code.symbols:
            raise PackError(f"damaged: {alphabet} gap symbols; 1 to {gap_code.symbols} exist")
        gap_tables = _read_tables(reader, scan.class_count, alphabet)
    if not len(code.codebook) and counts.any():
        raise PackError("damaged: values without a codebook")
    value_tables = _read_tables(reader, scan.class_count, len(code.codebook))
    order = np.zeros(0, np.int64)
    if scan.classes is not None:
        order = np.argsort(scan.classes, kind="stable").astype(np.int64)
    columns = elements // scan.rows
    lines, length = (columns, scan.rows) if scan.transposed else (scan.rows, columns)
    pattern = (background * 0x11) if width == 4 else background
    out.reshape(-1, max(width // 8, 1))[:] = np.frombuffer(pattern.to_bytes(max(width // 8, 1), "little"), np.uint8)
    base, extra = gap_code.bases(alphabet)
    if signed_zeros and width < 16:
        raise PackError(f"damaged: {width}-bit elements with signed zeros")
    error, at = kernels.read_tensor(
        words, reader.at, reader.bits, starts, order, lines, length, scan.transposed, counts, sparse,
        *gap_tables, base, extra, *value_tables, code.codebook, code.low_bits, code.shift, code.zigzag, width, out,
    )  # fmt: skip
    if error == kernels.OK and signed_zeros:
        error, at = kernels.read_zero_signs(words, at, reader.bits, width // 8, out)
    if error == kernels.TRUNCATED:
        raise PackError("truncated: a tensor's stream ends before its values")
    if error == kernels.OUTSIDE:
        raise PackError("damaged: a value beyond the tensor's end")
    if reader.bits - at >= 8:
        raise PackError("damaged: a tensor's stream goes on behind its values")


def _read_scan(reader: BitReader, elements: int, words: np.ndarray) -> Scan:
    from tfkit.export.packing import kernels

    count = reader.get(4) + 1
    transposed = bool(reader.get(1))
    rows = reader.get_exp_golomb(6) if transposed or count > 1 else 1
    if rows < 1 or elements % rows:
        raise PackError(f"damaged: {rows} rows of {elements} elements")
    if count == 1:
        return Scan(rows, transposed, None, 1)
    lines = elements // rows if transposed else rows
    if not 1 <= lines <= MAX_LINES or count > MAX_CLASSES:
        raise PackError(f"damaged: {lines} lines in {count} classes")
    lengths, single = huffman.read_lengths(reader, count)
    table, bits = huffman.decode_table(lengths, single)
    classes = np.zeros(lines, np.int64)
    at = kernels.read_symbols(words, reader.at, reader.bits, table, bits, classes)
    if at < 0:
        raise PackError("truncated: a tensor's stream ends inside its line classes")
    reader.at = at
    return Scan(rows, transposed, classes, count)


def _read_tables(reader: BitReader, classes: int, alphabet: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tables behind one another, and where each class's begins and how many bits it is indexed by."""
    separate = classes > 1 and bool(reader.get(1))
    tables, widths = [], []
    for _ in range(classes if separate else 1):
        lengths, single = huffman.read_lengths(reader, alphabet) if alphabet > 1 else (np.zeros(1, np.uint8), 0)
        table, bits = huffman.decode_table(lengths, single)
        tables.append(table)
        widths.append(bits)
    begins = np.concatenate(([0], np.cumsum([len(t) for t in tables[:-1]], dtype=np.int64)))
    if not separate:
        begins, widths = np.repeat(begins, classes), widths * classes
    return np.concatenate(tables), begins.astype(np.int64), np.array(widths, np.int64)
