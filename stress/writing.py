"""Writes of keys, and what their ends say of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stress.content import BrokenPromiseError, Token
from stress.possible import KeyLedger, Write
from stress.world import Space

if TYPE_CHECKING:
    from stress.actors import Actor

__all__ = ["COMPUTED", "all_writing", "check_side", "said", "write_key", "writing"]

COMPUTED = "computed"  # side data of what `get_or_compute` stores, which is not known before


@contextmanager
def writing(ledger: KeyLedger) -> Iterator[Write]:
    """A write of a key; an actor that leaves normally has said whether it was stored."""
    write = ledger.begin()
    try:
        yield write
    except Exception:
        ledger.refused(write)  # an error leaves the pool as it was
        raise
    except BaseException:
        ledger.cut_off(write)
        raise


def said(ledger: KeyLedger, write: Write, stored: bool) -> None:
    """What a write returned."""
    if stored:
        ledger.stored(write)
    else:
        ledger.refused(write)


def check_side(tokens: Sequence[Token], side: object) -> None:
    """Raise unless the side data is that of the entry."""
    if side not in (tuple(tokens), COMPUTED):
        raise BrokenPromiseError(f"an entry of {list(tokens)} came with the side data {side}")


@contextmanager
def all_writing(ledgers: Sequence[KeyLedger]) -> Iterator[list[Write]]:
    """As `writing`, of different keys at once."""
    written = [ledger.begin() for ledger in ledgers]
    try:
        yield written
    except BaseException as error:
        for ledger, write in zip(ledgers, written, strict=True):
            (ledger.refused if isinstance(error, Exception) else ledger.cut_off)(write)
        raise


async def write_key(actor: Actor, space: Space, key: int) -> None:
    """Put one key of a space."""
    world, ledger = actor.world, space.plain[key]
    kind = "key" if space.env is None else "root"
    with writing(ledger) as write:
        tokens = world.plain(key, space.number, write.version, actor.number)
        call = space.calls(actor.access).put(
            world.key(kind, key),
            world.content.row(tokens),
            side=tuple(tokens),
            priority=float(actor.rng.randrange(4)),
            scope=space.scope,
        )
        said(ledger, write, await actor.call("write", call))
