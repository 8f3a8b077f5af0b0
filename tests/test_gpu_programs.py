"""What `tests/gpu` runs on a GPU, run on a CPU: its own logic is right, and what fails there is the device's order."""

from __future__ import annotations

import pytest
import torch

from concurrent_kv.evaluation import Evaluator
from tests.compiling import NEW as NEW_TOKENS
from tests.compiling import FixedShapes, new_transformer, play, turns_of
from tests.compiling import new_manager as new_manager_of_transformers
from tests.gpu.captured import Captured
from tests.gpu.machine import LAYOUT, Machine, tokens
from tests.gpu.programs import PROGRAMS
from tests.gpu.random_programs import run_random_program
from tests.support import slots_named


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_reads_what_it_should(program: str) -> None:
    machine = Machine()
    PROGRAMS[program](machine)
    assert machine.seen
    assert not machine.wrong()


@pytest.mark.parametrize("seed", range(3))
def test_random_program_of_threads_reads_what_it_should(seed: int) -> None:
    machine = Machine()
    run_random_program(machine, seed)
    assert machine.seen
    assert not machine.wrong()


def test_what_was_read_wrongly_is_named() -> None:
    machine = Machine()
    machine.see(tokens((1, 2)), (1, 2), "right")
    machine.see(tokens((1, 3)), (1, 2), "wrong")
    assert machine.wrong() == ["wrong"]


def test_slots_that_nobody_wrote_to_keep_their_bytes() -> None:
    machine = Machine()
    pool = machine.pool(2)
    data = pool.storage.tensor.data
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1)).to(data.device)
    data[:, 1:] = noise[:, 1:]
    source = machine.row((1, 2, 3))
    pool.put("a", source)
    (entry,) = (entry for part in pool.default_scope.entries for entry in part.values())
    own = slots_named(pool.storage.ledger, entry)
    others = [slot for slot in range(1, data.shape[1]) if slot not in own]
    machine.settle()
    assert len(own) == 3
    assert torch.equal(data[:, others].cpu(), noise[:, others].cpu())
    assert source.packed is not None
    assert torch.equal(source.packed.cpu(), tokens((1, 2, 3)))
    assert LAYOUT.max_tokens * 3 == len(own) + len(others)
    pool.close()


def test_model_captured_over_the_memory_of_each_size_says_and_stores_what_the_eager_one_does() -> None:
    """The work itself stands for the graph here: it reads and writes the memory that it was made over."""
    turns, model = turns_of(2, [1, 2, 3, 4, 2, 3, 1, 4, 4, 3, 2, 1]), Captured(new_transformer())
    plain, fixed = new_manager_of_transformers(), new_manager_of_transformers()
    eager = Evaluator(plain, FixedShapes(new_transformer()), max_rows=4, room=NEW_TOKENS)
    captured = Evaluator(fixed, model, max_rows=4, row_sizes=(2, 4), room=NEW_TOKENS, own_thread=True)
    torch.testing.assert_close(play(captured, fixed, turns), play(eager, plain, turns))
    assert len(model.graphs) == 2
    captured.close()
    for manager in (plain, fixed):
        manager.check_integrity()
        manager.close()
