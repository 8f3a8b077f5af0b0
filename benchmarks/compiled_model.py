"""A model in an evaluator, as it is and as torch.compile makes it for batches of fixed shape: microseconds a call.

    python -m benchmarks.compiled_model [--quick] [--backend NAME] [--json FILE]

One leaf of each environment a call, from one thread. All contestants take turns in one run, with one thread of torch's;
medians of calls.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from concurrent_kv import DropOldest, KeysValues, KVCacheManager
from concurrent_kv.evaluation import Evaluated, Evaluator, Leaf
from concurrent_kv.pool.joint import JointBatch
from reporting.arguments import file_to_write
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

LAYERS, HEADS, WIDTH, WINDOW, NEW, ACTIONS, SIMULATIONS = 2, 2, 64, 8, 2, 16, 25
SECONDS_TO_COMPILE = 600.0
HEAD_DIM = WIDTH // HEADS
ROWS = (8, 32)
ROUNDS, QUICK_ROUNDS = 40, 2  # of `SIMULATIONS` calls of each contestant
MICROSECONDS = 1e-3  # of a nanosecond

Step: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Transformer(nn.Module):
    """Pre-norm blocks over the past where it lies: values, and the new keys and values of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ACTIONS, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS)])
        self.inputs = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS)])
        self.outputs = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.feeds = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)]
        )
        self.value = nn.Linear(WIDTH, 1)

    def forward(self, past: Tensor, padding: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = past.shape[1], past.shape[3]
        start = columns - NEW
        column = torch.arange(columns)
        seen = (column >= padding[:, None, None, None]) & (column <= start + torch.arange(NEW)[:, None])
        x, made = self.embedding(tokens), []
        for layer in range(LAYERS):
            parts = self.inputs[layer](self.norms[2 * layer](x)).chunk(3, -1)
            queries, keys, values = (part.view(rows, NEW, HEADS, HEAD_DIM).transpose(1, 2) for part in parts)
            all_keys = torch.cat([past[layer, :, :, :start], keys], 2)
            all_values = torch.cat([past[LAYERS + layer, :, :, :start], values], 2)
            found = F.scaled_dot_product_attention(queries, all_keys, all_values, attn_mask=seen)
            x = x + self.outputs[layer](found.transpose(1, 2).reshape(rows, NEW, WIDTH))
            x = x + self.feeds[layer](self.norms[2 * layer + 1](x))
            made.append((keys, values))
        return self.value(x[:, -1])[:, 0], torch.stack([k for k, _ in made]), torch.stack([v for _, v in made])


class Contestant:
    """One model in an evaluator over a manager of its own."""

    def __init__(self, step: Step, rows: int, *, fixed: bool) -> None:
        config = {"num_layers": LAYERS, "num_heads": HEADS, "embed_dim": WIDTH, "context_length": WINDOW}
        sizes = {"num_simulations": SIMULATIONS, "max_cache_size": rows * (SIMULATIONS + 1), "device": "cpu"}
        self.manager = KVCacheManager(config | sizes, rows)
        for env in range(rows):
            token = torch.randn(LAYERS, HEADS, 1 + env % 4, HEAD_DIM)
            self.manager.set_init_cache(env, "root", KeysValues.single(token, token))
        self.evaluator = Evaluator(
            self.manager, self._call_model, max_rows=rows, room=NEW, row_sizes=(rows,) if fixed else ()
        )
        self.rows, self.micros = rows, list[float]()
        self.model_micros: list[float] = []
        self._step = step

    def _call_model(self, batch: JointBatch, actions: Sequence[int]) -> Evaluated[float]:
        began = perf_counter_ns()
        with torch.inference_mode():
            tokens = torch.tensor(actions)[:, None].expand(-1, NEW).contiguous()
            values, keys, new_values = self._step(batch.data, batch.padding, tokens)
            batch.append_layers(keys, new_values)
            evaluated = Evaluated(values.tolist())
        self.model_micros.append((perf_counter_ns() - began) * MICROSECONDS)
        return evaluated

    def play(self) -> None:
        """One search of all environments, a leaf of each a call."""
        with self.manager.search(range(self.rows), overflow=DropOldest(WINDOW - NEW + 1, NEW)) as search:
            parents: list[object] = ["root"] * self.rows
            for simulation in range(SIMULATIONS):
                children = [(env, simulation) for env in range(self.rows)]
                leaves = [
                    Leaf(search, parent, child, (env + simulation) % ACTIONS, env)
                    for env, (parent, child) in enumerate(zip(parents, children, strict=True))
                ]
                began = perf_counter_ns()
                self.evaluator.evaluate_many(leaves, timeout=SECONDS_TO_COMPILE)
                self.micros.append((perf_counter_ns() - began) * MICROSECONDS)
                parents = list(children)

    def forget(self) -> None:
        """What was measured so far."""
        self.micros.clear()
        self.model_micros.clear()

    def told(self) -> dict[str, float]:
        """Medians of the calls, and what follows from them."""
        median = statistics.median(self.micros)
        return {
            "call_us": round(median, 1),
            "model_us": round(statistics.median(self.model_micros), 1),
            "simulations_a_second": round(self.rows / median * 1e6),
            "calls": len(self.micros),
        }


def measure(rows: int, rounds: int, backend: str) -> dict[str, dict[str, float]]:
    """All contestants at so many rows a call, in turn."""
    torch.manual_seed(1)
    model = Transformer().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    contestants = {
        "eager, as long as the rows are": Contestant(model, rows, fixed=False),
        "eager, fixed shape": Contestant(model, rows, fixed=True),
        "compiled, fixed shape": Contestant(compiled, rows, fixed=True),
    }
    for contestant in contestants.values():
        contestant.play()  # compiled here, and warm
        contestant.forget()
    for _ in track(range(rounds), f"rounds of {rows} rows a call"):
        for contestant in contestants.values():
            contestant.play()
    told = {}
    for name, contestant in contestants.items():
        told[name] = contestant.told()
        contestant.evaluator.close()
        contestant.manager.check_integrity()
        contestant.manager.close()
    return told


def table(found: dict[int, dict[str, dict[str, float]]]) -> Grid:
    """By rows a call, and by model."""
    columns = ("rows", "model", "µs a call", "of these, the model", "simulations a second")
    shown = Grid("a model in an evaluator, as it is and compiled: medians", columns, keys=2)
    for rows, figures in found.items():
        for name, each in figures.items():
            numbers = (f"{each[key]:,.0f}" for key in ("call_us", "model_us", "simulations_a_second"))
            shown.rows.append((f"{rows} rows a call", name, *numbers))
    return shown


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_model", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    parser.add_argument("--json", type=file_to_write, help="write the figures there")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    found = {rows: measure(rows, rounds, options.backend) for rows in ROWS}
    console_of().print(table(found), origin())
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__}
        options.json.write_text(
            json.dumps(machine | {"backend": options.backend, "rows": found}, indent=1) + "\n", "utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
