"""Programs over the stream clock: host threads that produce and consume, on streams of their own or the same."""

from __future__ import annotations

from typing import Any

from .clock_world import ClockWorld
from .programs import Operation, Program

__all__ = ["CLOCK_PROGRAMS"]


def produce(*names: str, on: int) -> Operation:
    return lambda world: [world.produce(name, on) for name in names]


def consume(*names: str, on: int) -> Operation:
    return lambda world: [world.consume(name, on) for name in names]


def several(*steps: Operation) -> Operation:
    return lambda world: [step(world) for step in steps]


def pass_on(name: str, new: str, on: int) -> Operation:
    """Use something, and make something else of it."""

    def run(world: ClockWorld) -> None:
        if name in world.published:
            world.consume(name, on)
            world.produce(new, on)

    return run


def clock_program(name: str, *tasks: Operation, before: Operation = lambda world: None, **setting: Any) -> Program:
    preemptions = setting.pop("preemptions", 2)
    return Program(name, tasks, setting, before, make=ClockWorld, preemptions=preemptions)


CLOCK_PROGRAMS = [
    clock_program("produce|consume", produce("x", on=1), consume("x", on=2), preemptions=3),
    clock_program("produce x, y|consume x, y", produce("x", "y", on=1), consume("x", "y", on=2), known=(1, 2)),
    clock_program(
        "produce|two threads consume on one stream",
        produce("x", on=1),
        consume("x", on=2),
        consume("x", on=2),
        known=(1, 2),
    ),
    clock_program(
        "two threads consume on one stream", consume("x", on=2), consume("x", on=2), before=produce("x", on=1)
    ),
    clock_program(
        "two threads produce on one stream|consume both",
        produce("x", on=1),
        produce("y", on=1),
        consume("x", "y", on=2),
        known=(1, 2),
    ),
    clock_program(
        "consume what was made alone|produce more|consume that",
        consume("x", "y", on=2),
        produce("y", on=1),
        before=produce("x", on=1),
    ),
    clock_program(
        "produce|pass on|consume",
        produce("x", on=1),
        pass_on("x", "y", on=2),
        lambda world: world.consume("y", 3, also_behind=["x"]),
        known=(1, 2, 3),
    ),
    clock_program(
        "made alone, more made|consume|consume more",
        consume("x", "y", on=2),
        produce("y", on=1),
        consume("y", on=2),
        before=produce("x", on=1),
    ),
    clock_program(
        "two threads count|consume",
        produce("x", on=1),
        produce("w", "y", "z", on=2),
        consume("z", on=3),
        known=(1, 2, 3),
    ),
    clock_program(
        "two threads retire, the device catches up",
        several(ClockWorld.catch_up, produce("y", on=1)),
        several(produce("z", on=2), consume("x", "y", on=2)),
        before=produce("w", "x", on=1),
        known=(1, 2),
    ),
    clock_program(
        "one of two is done",
        produce("y", on=2),
        consume("x", on=3),
        before=several(produce("w", on=1), ClockWorld.catch_up, produce("x", on=1)),
        known=(1, 2, 3),
    ),
    clock_program(
        "read|remove|write again",
        lambda world: world.read("read", 2),
        ClockWorld.remove,
        lambda world: world.write_again(3),
        before=lambda world: world.write_first(1),
    ),
    clock_program(
        "read|read|remove, write again",
        lambda world: world.read("read", 2),
        lambda world: world.read("other read", 3),
        lambda world: (world.remove(), world.write_again(1)),
        before=lambda world: world.write_first(1),
    ),
    clock_program(
        "remove|write again, never read",
        ClockWorld.remove,
        lambda world: world.write_again(2),
        before=lambda world: world.write_first(1),
        preemptions=None,
    ),
]
