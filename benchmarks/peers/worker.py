"""The process of one contestant: one line of JSON in, one out.

    python -m benchmarks.peers.worker NAME [--library FOLDER]

A process each, so that what one contestant leaves to the allocator and to the garbage collector is its own, and so that
one may need another interpreter or environment. `--library` takes `concurrent_kv` from another checkout.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from typing import Any, TextIO

__all__ = ["main"]


class Worker:
    """Answers requests `{"do": ...}`: prepare, turn, facts, finish."""

    def __init__(self, name: str) -> None:
        # Not before `--library` has had its say.
        from benchmarks.peers.cases import KINDS
        from benchmarks.peers.contestants import CONTESTANTS
        from benchmarks.peers.contestants.base import UnfitError

        self._contestant, self._kinds, self._unfit = CONTESTANTS[name], KINDS, UnfitError
        self._run: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One answer; `{"unfit": reason}` or `{"failed": traceback}` where there is none."""
        try:
            return {"answer": getattr(self, f"_{request.pop('do')}")(**request)}
        except self._unfit as error:
            return {"unfit": str(error)}
        except BaseException as error:  # a panic of a compiled peer is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            return {"failed": traceback.format_exc()}

    def _prepare(self, kind: str, arguments: dict[str, Any]) -> Any:
        self._run = self._kinds[kind](self._contestant, **arguments)
        verified = self._run.verify()
        gc.collect()
        gc.freeze()  # collections go through what turns make, not through what stands here already
        return verified

    def _turn(self) -> Any:
        return self._run.turn()

    def _facts(self) -> Any:
        return self._run.facts()

    def _finish(self) -> Any:
        gc.unfreeze()
        run, self._run = self._run, None
        if run is not None:
            run.close()
        del run
        from benchmarks.peers.cases.nodes import own_bytes

        return own_bytes()


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end."""
    for line in requests:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


def main() -> None:
    """Serve on what stdin and stdout were; whatever prints goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.worker", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--library")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if options.library:
        sys.path.insert(0, options.library)
        import concurrent_kv  # noqa: F401  from there, before anything here asks for it

        del sys.path[0]
    import torch

    torch.set_num_threads(1)
    serve(Worker(options.name), sys.stdin, answers)


if __name__ == "__main__":
    main()
