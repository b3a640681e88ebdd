"""Downloads: streamed, bounded, timed, checked, and kept only when whole."""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tfkit.data.dataset import DataError

_CHUNK_BYTES = 1 << 18


class Offline(DataError):
    """The address could not be reached or broke off."""


def sha256_of(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(url: str, path: Path, *, size_bytes: int, sha256: str, timeout_s: float = 30.0) -> None:
    """Downloads one file to `path`, a temporary place of the caller's.

    Args:
        url: an http or https address.
        path: where to write; left in an undefined state on failure.
        size_bytes: the file's exact size: not a byte more is written.
        sha256: its checksum.
        timeout_s: the longest that the server may keep silent.

    Raises:
        Offline: if the address cannot be reached or breaks off.
        DataError: if what came has another size or checksum.
    """
    # rich loads slowly, and most loads need no download
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    request = urllib.request.Request(url, headers={"User-Agent": "tfkit"})
    digest = hashlib.sha256()
    received = 0
    try:
        with (
            urllib.request.urlopen(request, timeout=timeout_s) as response,
            path.open("wb") as stream,
            Progress(
                *columns,
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                disable=not sys.stderr.isatty(),
            ) as progress,
        ):
            task = progress.add_task(url.rpartition("/")[2], total=size_bytes)
            while chunk := response.read(_CHUNK_BYTES):
                received += len(chunk)
                if received > size_bytes:
                    raise DataError(f"{url} sends more than the {size_bytes} bytes expected; nothing was kept.")
                digest.update(chunk)
                stream.write(chunk)
                progress.update(task, completed=received)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise Offline(f"{url} could not be downloaded: {getattr(error, 'reason', None) or error}") from error
    if received < size_bytes:
        raise Offline(f"{url} broke off after {received} of {size_bytes} bytes; nothing was kept.")
    if digest.hexdigest() != sha256:
        raise DataError(
            f"{url} is not the published file: SHA-256 {digest.hexdigest()}, expected {sha256}. Nothing was kept."
        )
