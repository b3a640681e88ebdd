"""`tfkit launch`: starts the workers of a distributed training on this machine, and starts them again if one dies.

Each worker is the same script in a process of its own, with `TF_CONFIG` set. A cluster sets that itself: Kubernetes'
training operator gives each pod its `TF_CONFIG`, and `srun --ntasks N python script.py` tells the same by Slurm's own
variables; the script, which calls `tfkit.training.distribute.strategy()`, is the same everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Annotated

import typer

from tfkit.commands.common import BELOW_WHAT_WAS_ASKED

#: All that follows the script's name is the script's.
PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
GRACE_SECONDS = 5.0


def launch(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A Python program; what follows is passed on to it.")],
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="Processes to start.")] = 2,
    restarts: Annotated[int, typer.Option(min=0, help="Times to start all again when one fails.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads a worker computes with; 0: cores / workers.")] = 0,
) -> None:
    """Run a script as several workers of one training on this machine."""
    if not script.is_file():
        raise FileNotFoundError(f"{script} is not a file")
    command = [sys.executable, str(script), *context.args]
    count = threads or max((os.cpu_count() or 1) // workers, 1)
    for attempt in range(restarts + 1):
        code = run(command, workers, count)
        if code == 0:
            return
        left = restarts - attempt
        typer.echo(f"tfkit: a worker ended with {code}; {f'{left} restarts left' if left else 'giving up'}.", err=True)
    raise typer.Exit(BELOW_WHAT_WAS_ASKED)


def run(command: list[str], workers: int, threads: int = 1) -> int:
    """Starts the workers, passes on what they print, and ends all of them as soon as one fails.

    Args:
        command: of each worker.
        workers: how many.
        threads: that each computes with.

    Returns:
        0, or the exit code of the first that failed; that of a signal is negative.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    started: list[subprocess.Popen[bytes]] = []
    readers = []
    try:
        for index in range(workers):
            environment = os.environ | {
                "TF_CONFIG": config(addresses, index),
                "TF_NUM_INTRAOP_THREADS": str(threads),
                "OMP_NUM_THREADS": str(threads),
                "PYTHONUNBUFFERED": "1",
            }
            worker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            started.append(worker)
            readers.append(threading.Thread(target=_pass_on, args=(worker.stdout, index), daemon=True))
            readers[-1].start()
        return _wait(started)
    finally:
        _end(started)
        for reader in readers:
            reader.join(GRACE_SECONDS)


def config(addresses: list[str], index: int) -> str:
    """Returns the `TF_CONFIG` of one worker.

    >>> config(["127.0.0.1:4000"], 0)
    '{"cluster": {"worker": ["127.0.0.1:4000"]}, "task": {"type": "worker", "index": 0}}'
    """
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on, all different."""
    with contextlib.ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [worker.poll() for worker in started]
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    running = [worker for worker in started if worker.poll() is None]
    for worker in running:
        worker.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in running:
        try:
            worker.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _pass_on(stream: IO[bytes] | None, index: int) -> None:
    for line in stream or ():
        sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stdout.flush()
