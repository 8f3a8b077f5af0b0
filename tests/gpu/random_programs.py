"""Several threads, each on streams of its own and others', with random delays, on a pool too small for them."""

from __future__ import annotations

import random
import threading

from concurrent_kv import Batch, KVPool
from tests.support import HANG_SECONDS

from .machine import LAYOUT, Machine, tokens

__all__ = ["run_random_program"]

KEYS = range(6)


def run_random_program(machine: Machine, seed: int, *, threads: int = 4, steps: int = 40) -> None:
    """Puts, gets, gathers, commits and clears. What was read is among `machine.seen` then; raises what a thread raised.

    The side data of an entry are the names of its tokens: a read says itself what it must be.
    """
    chance = random.Random(seed)
    pool = machine.pool(3, headroom=threads * 2 * LAYOUT.max_tokens, policy=chance.choice(("fifo", "lru", "clock")))
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            own = random.Random(1000 * seed + number)
            for step in range(steps):
                with machine.on(own.randrange(4)):
                    if own.random() < 0.4:
                        machine.delay(own.uniform(0.05, 1.0))
                    _step(machine, pool, own, 1 + step + steps * number)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(HANG_SECONDS)
    if errors:
        raise errors[0]
    assert not any(worker.is_alive() for worker in workers), "a thread hangs"
    machine.settle()
    pool.check_integrity()
    pool.close()


def _step(machine: Machine, pool: KVPool, chance: random.Random, number: int) -> None:
    key = chance.choice(KEYS)
    kind = chance.choice(("put", "put", "get", "gather", "gather", "extend", "extend", "clear"))
    if kind == "put":
        made = tuple(100 * number + i for i in range(chance.randint(1, LAYOUT.max_tokens)))
        pool.put(key, machine.row(made), side=made)
    elif kind == "clear":
        if chance.random() < 0.2:
            pool.clear()
    elif kind == "get":
        with pool.gather([key], room=0) as batch:
            _see(machine, batch, "get")
    else:
        keys = chance.sample(KEYS, chance.randint(1, 4))
        with pool.gather(keys) as batch:
            _see(machine, batch, kind)
            # Another stream goes on with the batch.
            other = chance.randrange(4)
            batch.wait(machine.stream(other))
            with machine.on(other):
                if chance.random() < 0.5:
                    machine.delay(chance.uniform(0.05, 0.5))
                _see(machine, batch, f"{kind}, on another stream")
                if kind == "extend" and all(batch.hits) and max(batch.lengths) < LAYOUT.max_tokens:
                    _extend(machine, pool, batch, keys, number)


def _extend(machine: Machine, pool: KVPool, batch: Batch, keys: list[int], number: int) -> None:
    made = [100 * number + 50 + row for row in range(len(keys))]
    rows = tokens(tuple(made)).permute(0, 3, 2, 1, 4).contiguous()  # [2 * layers, batch, heads, 1, head_dim]
    new = machine.upload(rows)
    layers = LAYOUT.num_layers
    for layer in range(layers):
        batch.append(layer, new[layer], new[layers + layer])
    sides = [(*side, name) for side, name in zip(batch.side, made, strict=True)]  # type: ignore[misc]
    pool.commit(keys, batch, sides=sides)


def _see(machine: Machine, batch: Batch, what: str) -> None:
    for row, (hit, length) in enumerate(zip(batch.hits, batch.lengths, strict=True)):
        if hit:
            columns = slice(batch.end - length, batch.end)
            names = batch.side[row]
            machine.see(batch.data[:, row : row + 1, :, columns], names, f"{what} of {names}")  # type: ignore[arg-type]
