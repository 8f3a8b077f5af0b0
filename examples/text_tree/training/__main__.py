"""Train the language model on random solved puzzles: `python -m examples.text_tree.training --seed 0 --out FILE`.

A minute of one core. It stays a weak solver on purpose, so that a search has something to do: with `--updates 1500`
sampling alone solves more than half again as many.

The same command gives the same bytes on the same machine with the same versions; another CPU or another torch may round
differently, and then learns other weights as good as these.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from examples.text_tree.model import CHARACTERS, DEFAULT_WEIGHTS, PAD, SIZES, new_model
from examples.text_tree.puzzle import random_puzzle
from reporting.arguments import file_to_write
from reporting.progress import Work
from reporting.tables import console_of

UPDATES, BATCH, LEARNING_RATE, WARM_UP = 500, 64, 3e-3, 50
UNASKED = -100  # a label of transformers: nothing is learnt there


def batch_of(draw: Random) -> tuple[Tensor, Tensor]:
    """Solved puzzles as tokens and labels `[BATCH, tokens]`: learnt are the solutions, not the prompts."""
    ids, labels = list[list[int]](), list[list[int]]()
    while len(ids) < BATCH:
        puzzle, steps = random_puzzle(draw)
        if not puzzle.is_held_out:
            prompt, solution = (CHARACTERS(text)["input_ids"] for text in (puzzle.prompt, "".join(steps)))
            ids.append(prompt + solution)
            labels.append([UNASKED] * len(prompt) + solution)
    return _padded(ids, PAD), _padded(labels, UNASKED)


def train(seed: int, updates: int) -> Any:
    """A trained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min((update + 1) / WARM_UP, (updates - update) / (updates - WARM_UP))
    )
    draw = Random(seed)
    with Work("updates", updates) as work:
        for _ in range(updates):
            ids, labels = batch_of(draw)
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            work.part(f"loss {loss.item():.3f}")
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(prog="python -m examples.text_tree.training", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--out", type=file_to_write, default=DEFAULT_WEIGHTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of a sum, and so its rounding, depends on the number of threads
    console = console_of(stderr=True)
    wall, processor = time.perf_counter(), time.process_time()
    model = train(options.seed, options.updates)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    origin = {
        "command": f"python -m examples.text_tree.training --seed {options.seed} --updates {options.updates}",
        "model": SIZES,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    written = io.BytesIO()  # of a file, torch would write the name into it
    torch.save({"origin": json.dumps(origin, sort_keys=True), "weights": model.state_dict()}, written)
    options.out.write_bytes(written.getvalue())
    console.print(f"wrote {options.out} after {wall:.0f} s, {processor:.0f} s of the processor")


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])


if __name__ == "__main__":
    main()
