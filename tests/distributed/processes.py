"""Processes of one gloo group that run functions of a test and give back what they return."""

from __future__ import annotations

import copy
import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120.0
PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo"]


class Processes:
    """`run` starts the processes when it needs them; a function that fails or hangs ends them all, the next run starts
    new ones. The functions must be importable, their arguments and results picklable."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        self._folder = folder
        self._started = 0
        self._running: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def run(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
        """`function(process, *arguments, **keywords)` on every process at once; the results in their order."""
        if not self._running:
            self._start()
        try:
            for _, connection in self._running:
                connection.send((function, arguments, keywords))
            return self._answers()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        for process, connection in self._running:
            process.kill()
            process.join()
            connection.close()
        self._running.clear()

    def _start(self) -> None:
        # Where there is a fork server it imports torch once for all processes.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        self._started += 1
        meeting = str(self._folder / f"meeting{self._started}")
        for index in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(index, self.count, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))

    def _answers(self) -> list[Any]:
        results: list[Any] = [None] * self.count
        waiting = {connection: index for index, (_, connection) in enumerate(self._running)}
        end = time.monotonic() + SECONDS
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"processes {sorted(waiting.values())} did not answer within {SECONDS:g} s")
            for connection in ready:
                index = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    results[index], failure = _received(connection)
                except EOFError:
                    failure = "it ended without an answer"
                if failure is not None:
                    raise AssertionError(f"process {index}: {failure}")
        return results


def _received(connection: Any) -> Any:
    """What was sent, in memory of its own: tensors come in memory that both processes see."""
    return copy.deepcopy(connection.recv())


def _serve(process: int, count: int, meeting: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=process,
        world_size=count,
        timeout=timedelta(seconds=SECONDS),
    )
    while True:
        try:
            function, arguments, keywords = _received(connection)
        except EOFError:
            return
        try:
            answer = (function(process, *arguments, **keywords), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        connection.send(answer)
