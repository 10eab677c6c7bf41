"""`levelhead teacher` killed at a moment of its work: arguments are the data, and pairs of moment and store.

Each run is a fork of this process, which has imported everything and computed nothing.
"""

import os
import signal
import sys
from typing import Any

from levelhead.cli import main
from levelhead.cli.teacher import recording, store


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Make this process end by SIGKILL at the moment."""
    store.ROWS = recording.ROWS = 4
    if moment == "inside a shard":
        original, calls = recording._Teacher._batch, []

        def batch(self: Any, *arguments: Any) -> Any:
            calls.append(None)
            return original(self, *arguments) if len(calls) < 4 else kill()

        recording._Teacher._batch = batch  # type: ignore[method-assign]
    elif moment == "before a shard is described":
        write = store.write_atomically

        def described(path: Any, *arguments: Any) -> None:
            (kill if path.name == "shard-00001.json" else write)(path, *arguments)

        store.write_atomically = described  # type: ignore[assignment]
    elif moment == "before the manifest":
        recording._finish = kill  # type: ignore[assignment]


if __name__ == "__main__":
    data, *pairs = sys.argv[1:]
    for moment, folder in zip(pairs[::2], pairs[1::2], strict=True):
        child = os.fork()
        if child == 0:
            arm(moment)
            main(["teacher", "tiny", data, "-o", folder, "--batch-size", "2"])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"{moment}: the run ended with status {status}")
