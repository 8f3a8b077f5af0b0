"""Every public call in a forked child: an error, or known to be harmless."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
from ast import literal_eval
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from concurrent_kv import KVCacheManager, WrongProcessError
from concurrent_kv.evaluation import Evaluator, Leaf
from concurrent_kv.evaluation.queue import Group
from concurrent_kv.evaluation.tickets import Run
from concurrent_kv.locks.deadline import Deadline
from tests.support import append, config, tokens

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60
HANG_SECONDS = 3

# What takes no lock and touches no slot: plain attributes, numbers that may be a moment old, and what finalisers call.
HARMLESS = {
    "KVStorage": {"zero_slot_is_zero", "checked_overflow"},
    "KVPool": {
        "allocation", "allocation_for", "check_open", "closed", "counters", "lifetime_now", "pool", "registered_scopes",
        "stats_now", "version",
    },
    "KVCacheManager": {
        "allocation", "allocation_for", "init_pools", "keys_values_wm_list", "keys_values_wm_size_list", "plan",
        "version",
    },
    "Search": {"closed", "held", "is_over", "abandon", "tokens_in_use", "__len__"},
    # Views of a buffer that a fork copies (on a CPU), and what is known of its rows.
    "Batch": {
        "abandon", "batch_size", "before", "closed", "committable", "end", "end_rows", "gathered", "hits",
        "keys", "layer", "layer_end", "lengths", "padding", "pending_rows", "room", "side", "start",
        "use_here", "values", "why_closed",
    },
    "Pin": {"abandon"},
    "Claim": {"abandon", "computing", "over"},
    "Evaluator": {"closed", "queue", "seconds_left", "storage"},
    "EvaluatorWorker": {"registered", "seat"},
}  # fmt: skip


def call_of(owner: object, name: str, arguments: dict[str, Any]) -> Callable[[], object]:
    """Reads a property, or calls a method with something for each argument that it must have."""
    if isinstance(inspect.getattr_static(type(owner), name), property):
        return lambda: getattr(owner, name)
    method = getattr(owner, name)
    needed = [
        parameter
        for parameter in inspect.signature(method).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    positional = [arguments[each.name] for each in needed if each.kind is not each.KEYWORD_ONLY]
    named = {each.name: arguments[each.name] for each in needed if each.kind is each.KEYWORD_ONLY}
    return lambda: method(*positional, **named)


async def _awaited(coroutine: Any) -> None:
    await coroutine


def public_names(owner: object) -> list[str]:
    return [
        name
        for name in type.__dir__(type(owner))  # what only the package calls, too
        if (not name.startswith("_") or name in ("__len__", "__contains__", "__iter__"))
        and (callable(getattr(type(owner), name)) or isinstance(inspect.getattr_static(type(owner), name), property))
    ]


def silent_in_a_child(owner: object, arguments: dict[str, Any]) -> set[str]:
    """The public names of `owner` that do not raise `WrongProcessError`."""

    def hangs(*_: object) -> None:
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, hangs)
    silent = set()
    for name in public_names(owner):
        signal.alarm(HANG_SECONDS)
        try:
            found = call_of(owner, name, arguments)()
            if inspect.iscoroutine(found):
                anyio.run(partial(_awaited, found))
        except WrongProcessError:
            continue
        except Exception as error:
            print(type(owner).__name__, name, type(error).__name__, error, file=sys.stderr, flush=True)
        silent.add(name)
    return silent


def walk() -> dict[str, set[str]]:
    """Forks with every lock held, and returns what each public class does silently in the child."""
    manager = KVCacheManager(config(), 2, wait_timeout=1.0)
    pool, storage = manager.init_pools[0], manager.storage
    pool.put("root", tokens(1, 2))
    search = manager.search([0])
    batch = search.gather(["root"], [0])
    append(batch, [2], 1)
    pin, claim = pool.pin("root"), pool.try_claim("computed")
    nonsense: Any = {}.get
    nothing: list[Any] = []
    evaluator = Evaluator(manager, nonsense)
    worker = evaluator.worker()
    arguments: dict[str, Any] = {
        "key": "root",
        "keys": ["root"],
        "config": config(),
        "env_num": 2,
        "layout": manager.layout,
        "max_entries": 4,
        "env_id": 0,
        "env_ids": [0],
        "kv": tokens(3, 2),
        "kv_cache": tokens(3, 2),
        "cache_key": 1,
        "batch": batch,
        "name": "scope",
        "path": "never.snapshot",
        "compute": lambda: tokens(3, 2),
        "error": ValueError("failed"),
        "row": 0,
        "ended": False,
        "rows": [0],
        "layer": 0,
        "index": 0,
        "tokens": 1,
        "sources": torch.zeros(1),
        "values": torch.zeros(1),
        "scope": pool.default_scope,
        "deadline": Deadline(0.0),
        "number": 1,
        "overflow": None,
        "contention": (0, 0.0),
        "entries": [],
        "reason": "test",
        "state": torch.zeros(2),
        "leaf": Leaf(search, "root", "child", None, 0),
        "leaves": [Leaf(search, "root", "child", None, 0)],
        "timeout": 1.0,
        "worker": False,
        "group": Group(),
        "search": (each for each in nothing),
        "searches": [(each for each in nothing)],
        "run": Run([], print),
        "seconds": 1.0,
    }
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        shards = range(storage.locks.count)
        with (
            storage.locks.write(shards, Deadline(SECONDS)),
            storage.ledger.mutex,
            pool.flights._lock,
            evaluator.queue._lock,
        ):
            held.set()
            over.wait(SECONDS)

    threading.Thread(target=hold, daemon=True).start()
    assert held.wait(SECONDS)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        owners = [storage, pool, manager, search, batch, pin, claim, evaluator, worker]
        found = {type(owner).__name__: sorted(silent_in_a_child(owner, arguments)) for owner in owners}
        os.write(write, repr(found).encode())
        os._exit(0)
    over.set()
    os.close(write)
    with os.fdopen(read, "rb") as answers:
        said = answers.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a call hangs in the child"
    return {name: set(names) for name, names in literal_eval(said).items()}


def in_a_process_of_its_own(call: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_forked_child import *; {call}"],
        capture_output=True,
        text=True,
        timeout=4 * SECONDS,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_in_a_forked_child_every_public_call_raises_or_is_known_to_be_harmless() -> None:
    said = in_a_process_of_its_own("print(repr(walk()))")
    assert literal_eval(said) == HARMLESS
