"""Readers of the published files, on files made here."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest

from tfkit.data import formats
from tfkit.data.dataset import DataError


def idx_bytes(values, *, kind=8):
    return bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_idx_known_answer(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes.fromhex("00000803 00000002 00000001 00000003 0a0b0c 0d0e0f")))
    assert formats.read_idx(path).tolist() == [[[10, 11, 12]], [[13, 14, 15]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(mtime=0, data=b"\x00\x00\x0d\x01" + b"\0" * 8), "not an IDX"),
        (gzip.compress(mtime=0, data=b"\x00\x00\x08\x03\x00\x00"), "cut short"),
        (gzip.compress(mtime=0, data=b"\x00\x00\x08\x01\x00\x00\x00\x05abc"), "follow"),
        (gzip.compress(mtime=0, data=b"\x00\x00\x08\x01\x00\x00\x00\x02abc"), "follow"),
        (gzip.compress(mtime=0, data=b"\x00\x00\x08\x03" + b"\xff" * 12), "more than"),
        (gzip.compress(mtime=0, data=b"\x00\x00\x08\x01\x00\x00\x00\x03abc")[:-9], "not a readable gzip"),
        (b"plain text", "not a readable gzip"),
    ],
)
def test_bad_idx(tmp_path, content, message):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        formats.read_idx(path)


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(formats, "_CIFAR_RECORDS", 3)


def cifar_tar(path, *, drop=(), resize=(), link=(), prefix="cifar-10-batches-bin/"):
    rng = np.random.default_rng(0)
    records = {}
    with tarfile.open(path, "w:gz") as out:
        for name in (*formats._CIFAR_MEMBERS, "readme.html", "../../escape.bin"):
            content = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
            content[:, 0] %= 10
            records[name] = content
            info = tarfile.TarInfo(prefix + name)
            data = content.tobytes()[: -1 if name in resize else None]
            info.size = len(data)
            if name in link:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            if name not in drop:
                out.addfile(info, io.BytesIO(data))
    return records


def test_cifar_layout(tmp_path, small_cifar):
    path = tmp_path / "c.tar.gz"
    records = cifar_tar(path)
    arrays = formats.cifar10_binary({"archive": path})
    assert arrays["x_train"].shape == (15, 32, 32, 3) and arrays["x_test"].shape == (3, 32, 32, 3)
    third = records["data_batch_2.bin"][1]  # example 4 of the training part
    assert arrays["y_train"][4] == third[0]
    # byte 1 + 1024 * channel + 32 * row + column, by the publisher's description
    assert arrays["x_train"][4, 7, 11, 2] == third[1 + 1024 * 2 + 32 * 7 + 11]
    assert [item.name for item in tmp_path.iterdir()] == ["c.tar.gz"]  # nothing was extracted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["data_batch_3.bin"]}, "missing data_batch_3.bin"),
        ({"resize": ["test_batch.bin"]}, "9219 bytes"),
        ({"link": ["test_batch.bin"]}, "missing test_batch.bin"),
    ],
)
def test_bad_cifar(tmp_path, small_cifar, options, message):
    path = tmp_path / "c.tar.gz"
    cifar_tar(path, **options)
    with pytest.raises(DataError, match=message):
        formats.cifar10_binary({"archive": path})


def test_truncated_cifar(tmp_path, small_cifar):
    path = tmp_path / "c.tar.gz"
    cifar_tar(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="not a readable tar.gz"):
        formats.cifar10_binary({"archive": path})


def test_mnist5k_split_is_fixed(digits):
    labels = np.concatenate([digits.y_train, digits.y_validation])
    assert np.bincount(labels).tolist() == [400] * 10 and np.bincount(digits.y_test).tolist() == [100] * 10
    # Known answer: a change of the split would silently change every published number.
    assert digits.y_test[:10].tolist() == EXPECTED_TEST_LABELS
    assert int(np.rint(digits.x_test[:100].astype(np.float64) * 255).sum()) == EXPECTED_TEST_PIXELS
    test = {image.tobytes() for image in digits.x_test}
    kept = [image.tobytes() in test for image in np.concatenate([digits.x_train, digits.x_validation])]
    assert not any(kept)


EXPECTED_TEST_LABELS = [0, 8, 3, 8, 8, 2, 5, 3, 0, 8]
EXPECTED_TEST_PIXELS = 2_528_740
