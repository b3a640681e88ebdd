"""A decoder of tensor streams written from docs/pack_format.md alone: slow, plain, sharing no code with the product."""

from __future__ import annotations


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.text = "".join(f"{byte:08b}" for byte in data)
        self.at = 0

    def u(self, count: int) -> int:
        taken = self.text[self.at : self.at + count]
        assert len(taken) == count
        self.at += count
        return int(taken or "0", 2)

    def eg(self, k: int) -> int:
        zeros = 0
        while self.u(1) == 0:
            zeros += 1
        return int("1" + format(self.u(zeros + k), f"0{zeros + k}b") if zeros + k else "1", 2) - 2**k

    def table(self, size: int) -> dict[str, int]:
        if size < 2:
            return {"": 0}
        if self.u(1):
            return {"": self.eg(0)}
        lengths: list[int] = []
        last = 4
        while len(lengths) < size:
            ones = 0
            while ones < 4 and self.u(1):
                ones += 1
            if ones == 3:
                lengths += [0] * (self.eg(0) + 1)
                continue
            last = self.u(4) if ones == 4 else last + (ones if not ones or not self.u(1) else -ones)
            lengths.append(last)
        codes: dict[str, int] = {}
        code = previous = 0
        for length, symbol in sorted((length, i) for i, length in enumerate(lengths) if length):
            code = (code + 1) << (length - previous) if codes else 0
            previous = length
            codes[format(code, f"0{length}b")] = symbol
        return codes

    def tables(self, classes: int, size: int) -> list[dict[str, int]]:
        if classes > 1 and self.u(1):
            return [self.table(size) for _ in range(classes)]
        return [self.table(size)] * classes

    def symbol(self, table: dict[str, int]) -> int:
        code = ""
        while code not in table:
            code += str(self.u(1))
        return table[code]


def decode(payload: bytes, size_bytes: int) -> bytes:
    """The tensor's bytes."""
    bits = _Bits(payload)
    width = (4, 8, 16, 32)[bits.u(2)]
    elements = size_bytes * 8 // width
    signed_zeros, sparse = bits.u(1), bits.u(1)
    background = bits.u(width) if sparse and bits.u(1) else 0
    classes, transposed = bits.u(4) + 1, bits.u(1)
    rows = bits.eg(6) if classes > 1 or transposed else 1
    columns = elements // rows
    lines = [[r * columns + c for r in range(rows)] for c in range(columns)]
    if not transposed:
        lines = [[r * columns + c for c in range(columns)] for r in range(rows)]
    kinds = [0] * len(lines)
    if classes > 1:
        table = bits.table(classes)
        kinds = [bits.symbol(table) for _ in lines]
    order = [[i for line, kind in zip(lines, kinds, strict=True) if kind == k for i in line] for k in range(classes)]
    zigzag, shift, low, entries = bits.u(1), bits.u(5), bits.u(5), bits.eg(0)
    codebook: list[int] = []
    k = bits.u(5) if entries else 0
    for _ in range(entries):
        codebook.append((codebook[-1] if codebook else -1) + bits.eg(k) + 1)
    counts = [len(x) for x in order]
    a = b = 0
    gap_tables: list[dict[str, int]] = []
    if sparse:
        counts = [bits.eg(10) for _ in range(classes)]
        a, b = bits.u(4), bits.u(4)
        gap_tables = bits.tables(classes, bits.eg(4))
    value_tables = bits.tables(classes, entries)
    out = [background] * elements
    for kind in range(classes):
        at = -1
        for _ in range(counts[kind]):
            at += 1
            if sparse:
                gap = bits.symbol(gap_tables[kind])
                if gap >= 2**a:
                    q = gap - 2**a
                    p = a + (q >> b)
                    gap = ((2**b + q % 2**b) << (p - b)) + bits.u(p - b)
                at += gap
            x = ((codebook[bits.symbol(value_tables[kind])] << low) + bits.u(low)) << shift
            if zigzag:
                x = (x >> 1) ^ -(x & 1)
            out[order[kind][at]] = x % 2**width
    if signed_zeros:
        out = [x or bits.u(1) << (width - 1) for x in out]
    assert len(bits.text) - bits.at < 8
    number = sum(x << (width * i) for i, x in enumerate(out))
    return number.to_bytes(size_bytes, "little")
