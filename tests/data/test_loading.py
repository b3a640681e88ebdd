"""Where `load` looks, and what it says when it finds nothing. Downloads go to a server of the test's own."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from tfkit import data
from tfkit.data import catalog, download
from tfkit.data import npz as archives


def small(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (40, 4, 4), dtype=np.uint8),
        "y_train": np.arange(40, dtype=np.uint8) % 10,
        "x_test": rng.integers(0, 256, (10, 4, 4), dtype=np.uint8),
        "y_test": np.arange(10, dtype=np.uint8),
    }


def npz_bytes(arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


REAL_DATA = os.environ.get("TFKIT_DATA")


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("TFKIT_DATA", raising=False)
    monkeypatch.setenv("TFKIT_CACHE", str(tmp_path / "cache"))


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, server_state, *args):
        self.state = server_state
        super().__init__(*args)

    def do_GET(self):
        self.state["requests"] += 1
        body = self.state["body"]
        self.send_response(self.state.get("status", 200))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.state.get("stop_after")])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback address that answers every request alike, and a `mnist` that is published there."""
    body = npz_bytes(small())
    state = {"body": body, "requests": 0}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, state)) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        remote = catalog.Remote(
            f"http://127.0.0.1:{running.server_port}/mnist.npz", len(body), hashlib.sha256(body).hexdigest()
        )
        monkeypatch.setitem(catalog.CATALOG, "mnist", replace(catalog.CATALOG["mnist"], files={"mnist.npz": remote}))
        yield state
        running.shutdown()
        thread.join()


def test_download_once_then_cache(server, tmp_path):
    assert data.describe("mnist").kind == "download"
    first = data.load("mnist")
    assert (tmp_path / "cache" / "mnist.npz").is_file() and server["requests"] == 1
    second = data.load("mnist")
    assert server["requests"] == 1 and np.array_equal(first.x_train, second.x_train)
    assert data.describe("mnist").kind == "cache"
    assert [item.name for item in (tmp_path / "cache").iterdir()] == ["mnist.npz"]
    assert first.input_shape == (4, 4, 1) and len(first.x_train) == 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404}, "could not be downloaded"),
        ({"stop_after": 500}, "broke off after|could not be downloaded"),
        ({"body": b"x" * len(npz_bytes(small()))}, "not the published file"),
        ({"body": b"x" * 10**6}, "sends more than"),
        ({"body": b"short"}, "broke off after 5"),
    ],
)
def test_bad_downloads_leave_nothing(server, tmp_path, change, message):
    server.update(change)
    with pytest.raises(data.DataError, match=message):
        data.load("mnist")
    assert list((tmp_path / "cache").iterdir()) == []


def test_silent_server_times_out(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(download.Offline, match="timed out"):
            download.fetch(url, tmp_path / "x", size_bytes=1, sha256="", timeout_s=0.2)


def test_offline_names_file_address_and_variable(monkeypatch, tmp_path):
    remote = catalog.Remote("http://127.0.0.1:9/mnist.npz", 1, "0")  # the discard port: nobody listens
    monkeypatch.setitem(catalog.CATALOG, "mnist", replace(catalog.CATALOG["mnist"], files={"mnist.npz": remote}))
    with pytest.raises(data.DataError) as caught:
        data.load("mnist")
    for part in (str(tmp_path / "cache" / "mnist.npz"), remote.url, "TFKIT_DATA", "mnist5k"):
        assert part in str(caught.value)


def test_data_folder_comes_first_and_is_held_to_its_sums(monkeypatch, tmp_path):
    for folder, seed in (("given", 1), ("cache", 2)):
        (tmp_path / folder).mkdir()
        archives.write(tmp_path / folder / "mnist.npz", small(seed))
    monkeypatch.setenv("TFKIT_DATA", str(tmp_path / "given"))
    path = tmp_path / "given" / "mnist.npz"
    loaded = data.load("mnist", validation=0)
    assert loaded.source == f"TFKIT_DATA: {path}"
    assert np.isclose(loaded.x_train.sum() * 255, small(1)["x_train"].sum())

    sums = tmp_path / "given" / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  other.npz\n{download.sha256_of(path)}  mnist.npz\n")
    data.load("mnist")
    sums.write_text(f"{'0' * 64}  mnist.npz\n")
    with pytest.raises(data.DataError, match="SHA256SUMS lists"):
        data.load("mnist")


def test_damaged_cache_says_what_to_do(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mnist.npz").write_bytes(b"PK half a file")
    with pytest.raises(data.DataError, match="Delete it"):
        data.load("mnist")


def test_own_npz(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **small(), class_names=np.array([f"class {i}" for i in range(10)]))
    loaded = data.load(path)
    assert loaded.class_names[3] == "class 3" and loaded.source == str(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnits", "Unknown data set 'mnits'. Known: mnist5k"),
        ("absent.npz", "no file"),
        ("no_such_module_here:f", "No module named"),
        ("os.path:nothing", "no function 'nothing'"),
        ("os:getcwd", "must return a dict"),
    ],
)
def test_unknown_sources(name, message):
    with pytest.raises(data.DataError, match=message):
        data.load(name)


MODULE = """
import numpy as np
x, y = np.arange(24, dtype="float32").reshape(12, 2), np.arange(12) % 3

def arrays():
    return {"train": (x, y), "test": (x, y), "class_names": ["a", "b", "c"]}

def _set(batch, repeat=1):
    import tensorflow as tf
    part = tf.data.Dataset.from_tensor_slices((x, y)).repeat(repeat)
    return part.batch(batch) if batch else part

def batched():
    return {"train": _set(5), "test": _set(4), "validation": _set(12)}

def single():
    return {"train": _set(0), "test": _set(0)}

def endless():
    return {"train": _set(5, None), "test": _set(5)}

def words():
    return {"train": "abc", "test": "def"}
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_source.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_source", None)


@pytest.mark.parametrize("function", ["arrays", "batched", "single"])
def test_function_gives_the_same_however_it_is_fed(own_module, function):
    loaded = data.load(f"own_source:{function}", validation=0)
    order = np.argsort(loaded.x_train[:, 0])
    assert np.array_equal(loaded.x_train[order].ravel(), np.arange(24)) and loaded.num_classes == 3
    assert np.array_equal(loaded.y_train[order], np.arange(12) % 3) and len(loaded.x_test) == 12
    assert len(loaded.x_validation) == (12 if function == "batched" else 0)


@pytest.mark.parametrize(("function", "message"), [("endless", "never ends"), ("words", "pair")])
def test_bad_functions(own_module, function, message):
    with pytest.raises(data.DataError, match=message):
        data.load(f"own_source:{function}")


def test_published_entries_are_complete():
    for entry in catalog.CATALOG.values():
        for remote in entry.files.values():
            assert remote.url.startswith("https://") and len(remote.sha256) == 64 and remote.size_bytes > 5000


@pytest.mark.skipif(not REAL_DATA, reason="needs the real data sets: set TFKIT_DATA to their folder")
@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (28, 28, 1)), ("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))]
)
def test_real_sets(monkeypatch, name, shape):
    monkeypatch.setenv("TFKIT_DATA", REAL_DATA)
    loaded = data.load(name)
    assert loaded.input_shape == shape and loaded.num_classes == 10
    assert loaded.x_train.min() == 0 and loaded.x_train.max() == 1 and set(loaded.y_test) == set(range(10))
