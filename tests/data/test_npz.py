"""Archives from strangers."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from tfkit.data import npz
from tfkit.data.dataset import DataError


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def member(shape, values=b"", dtype="|u1"):
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + values


def test_round_trip_agrees_with_numpy(tmp_path):
    arrays = {
        "a": np.arange(12, dtype=np.float64).reshape(3, 4).T,  # Fortran order
        "b": np.array(["x", "yy"]),
        "c": np.zeros((0, 3), np.uint8),
        "d": np.array(7),
    }
    npz.write(tmp_path / "ours.npz", arrays)
    np.savez(tmp_path / "theirs.npz", **arrays)
    for name in ("ours.npz", "theirs.npz"):
        for key, value in npz.read(tmp_path / name).items():
            assert value.dtype == arrays[key].dtype and np.array_equal(value, arrays[key])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ours.npz", "theirs.npz"]


def test_objects_are_refused_unread(tmp_path):
    np.savez(tmp_path / "evil.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        npz.read(tmp_path / "evil.npz")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="[Oo]bject"):
        npz.write(tmp_path / "out.npz", {"x": np.array([object()])})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.npy": member((2**60,))}, "speaks of"),
        ({"x.npy": member((2**40, 2**40))}, "speaks of"),
        ({"x.npy": member((-1, 4))}, "speaks of"),
        ({"x.npy": member((8,), b"1234")}, "speaks of"),
        ({"x.npy": member((4,), b"12345678")}, "more follow"),
        ({"x.npy": b"\x93NUMPY\x01\x00"}, "not a readable .npz"),
        ({"x.npy": b"no array at all"}, "not a readable .npz"),
        ({"x.npy": b"\x93NUMPY\x09\x00" + b"0" * 64}, "unknown .npy version"),
        ({"x.txt": b"hello"}, "unexpected member"),
    ],
)
def test_lying_members(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        npz.read(archive(tmp_path / "x.npz", members))


def test_memory_is_bounded_over_all_members(tmp_path):
    path = tmp_path / "big.npz"
    np.savez_compressed(path, a=np.zeros(6000, np.uint8), b=np.zeros(6000, np.uint8))
    assert len(npz.read(path, max_bytes=12_000)) == 2
    with pytest.raises(DataError, match="are allowed"):
        npz.read(path, max_bytes=11_999)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8), st.floats(0, 1)
)
def test_damage_gives_one_kind_of_error(tmp_path, flips, keep):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.arange(50), y=np.arange(3.0))
    damaged = bytearray(path.read_bytes())
    for where, mask in flips:
        damaged[int(where * len(damaged))] ^= mask
    if keep < 0.5:
        del damaged[int(2 * keep * len(damaged)) :]
    path.write_bytes(damaged)
    try:
        npz.read(path)
    except DataError:
        pass  # the only failure allowed; a flip that zip does not cover may also pass
