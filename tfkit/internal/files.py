"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_atomically(target: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file through a temporary one beside it, so that no reader sees half of it.

    Args:
        target: of the file.
        content: of it, whole or in pieces.

    Raises:
        OSError: the folder is not there or not writable, or `target` is a folder; the message names `target`.
    """
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise _about(error, target) from None
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except OSError as error:
        raise _about(error, target) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)  # There is no way to read it without setting it.
    os.umask(mask)
    return mask


def _about(error: OSError, target: Path) -> OSError:
    """Returns the error with the user's file in place of the temporary one."""
    return error if error.errno is None else type(error)(error.errno, os.strerror(error.errno), str(target))
