"""Trees of text under transformers: what a round of expansions costs, by who keeps the keys and values of the nodes.

    python -m benchmarks.text_trees [--shape NAME] [--prompt 200] [--nodes 64] [--new 32] [--quick] [--json FILE]

A random tree, the same for all contestants and with the same tokens, grows by `--rows` nodes a round; each new node
has `--new` tokens, which the model is given one by one as when it generates (`--at-once`: together, as when it scores).
Contestants, each batching as the others do, take turns round by round:

- `prefill`: the whole text of every node is given to the model anew;
- `copies`: a `DynamicCache` for each node, joined to a batch with padding, and copied apart again;
- `continuous`: transformers' continuous batching, which shares full pages of texts that begin alike as long as they are
  in its memory; it chooses its tokens itself (`--continuous`: its thread runs beside the others);
- `concurrent_kv`: this library, through `BatchCache` over a search.

With `--memory` the tree is stored without a model, to see what it takes; where layers slide in two ways: they keep all
tokens with the others, and those in their window in a pool of their own.
Prefilling is run for `--prefilled` rounds and scaled to all; such figures are marked. Weights are random: no download.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time, thread_time
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.utils import logging as transformers_logging

from benchmarks.peers.machine import About
from concurrent_kv import KVCacheManager, KVLayout
from concurrent_kv.compat.transformers import BatchCache, CacheLayout, TextStore
from concurrent_kv.model.config import ManagerConfig
from reporting.arguments import file_to_write
from reporting.progress import track
from reporting.tables import Grid, console_of, origin

# WORKLOADS: what a model's configuration has, its dtype, and the most tokens of a text.
SHAPES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "tiny-llama": (
        {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        torch.float32,
    ),
    "qwen2.5-0.5b": (
        {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4_864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        torch.bfloat16,
    ),
    "gemma3-1b": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262_144,
            "hidden_size": 1_152,
            "intermediate_size": 6_912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
        },
        torch.bfloat16,
    ),
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "vocab_size": 201_088,
            "hidden_size": 2_880,
            "intermediate_size": 2_880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
        },
        torch.bfloat16,
    ),
    "starcoder2-3b": (
        {
            "model_type": "starcoder2",
            "vocab_size": 49_152,
            "hidden_size": 3_072,
            "intermediate_size": 12_288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "sliding_window": 4_096,
        },
        torch.bfloat16,
    ),
}
CHUNK = 512  # tokens of a prompt at once
PAGE = 32  # tokens of a page of continuous batching
GIB, MIB = 2**30, 2**20
LARGEST = 16 * GIB  # of kept keys and values: a contestant that would take more is left out


@dataclass(frozen=True)
class Node:
    """A text of the tree: its parent's, and `own`."""

    parent: int | None
    own: list[int]
    length: int  # of the whole text


@dataclass
class Plan:
    """The tree, and which nodes are made in which round."""

    nodes: list[Node]
    rounds: list[list[int]]

    @property
    def distinct(self) -> int:
        """Tokens, those that texts share counted once."""
        return sum(len(node.own) for node in self.nodes)

    def text(self, number: int) -> list[int]:
        """The whole text of a node."""
        node = self.nodes[number]
        return ([] if node.parent is None else self.text(node.parent)) + node.own


def planned(prompt: int, nodes: int, new: int, rows: int, depth: int, words: int) -> Plan:
    """A random tree: each node's parent is one of those that there are, of less than `depth`."""
    draw = random.Random(0)

    def some(number: int) -> list[int]:
        return [draw.randrange(1, words) for _ in range(number)]

    plan, depths = Plan([Node(None, some(prompt), prompt)], []), [0]
    while len(plan.nodes) <= nodes:
        parents = [number for number, at in enumerate(depths) if at < depth]
        made = []
        for parent in draw.choices(parents, k=min(rows, nodes + 1 - len(plan.nodes))):
            made.append(len(plan.nodes))
            plan.nodes.append(Node(parent, some(new), plan.nodes[parent].length + new))
            depths.append(depths[parent] + 1)
        plan.rounds.append(made)
    return plan


@dataclass
class Costs:
    """Seconds of a contestant's rounds: on the clock, of the thread, and of those in the model."""

    wall: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)


class Contestant(Protocol):
    """Who keeps the nodes' keys and values."""

    name: str

    def plant(self) -> None:
        """Give the model the prompt."""

    def grow(self, made: Sequence[int]) -> Tensor:
        """Make the nodes of a round; returns the logits of the last token of each, `[rows, words]`."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of keys and values that it keeps now."""


class Base:
    """The model, and the time that is spent in it."""

    def __init__(self, model: Any, plan: Plan, at_once: bool) -> None:
        self.model, self.plan, self.at_once = model, plan, at_once
        self.in_model = 0.0
        self.in_threads: float | None = None  # of a round, where others than the caller's thread work

    def call(self, **inputs: Any) -> Tensor:
        """The logits of each row's last token."""
        began = perf_counter()
        logits: Tensor = self.model(**inputs, logits_to_keep=1).logits[:, -1]
        self.in_model += perf_counter() - began
        return logits

    def steps(self, ids: Tensor) -> Sequence[Tensor]:
        """New tokens `[rows, tokens]` as the model is given them."""
        return [ids] if self.at_once else torch.split(ids, 1, 1)


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask."""
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return ids, mask


class Prefill(Base):
    """Keeps nothing."""

    name = "prefill"
    kept_bytes = 0

    def plant(self) -> None:
        """Nothing: every node begins anew."""

    def grow(self, made: Sequence[int]) -> Tensor:
        nodes = [self.plan.nodes[number] for number in made]
        ids, mask = padded([self.plan.text(node.parent or 0) for node in nodes])
        cache = DynamicCache(config=self.model.config)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        self.call(input_ids=ids, cache=cache, **inputs)
        return decode(self, nodes, cache, mask)


def decode(base: Base, nodes: Sequence[Node], cache: DynamicCache, mask: Tensor) -> Tensor:
    """Give the model the own tokens of nodes whose parents are in a cache."""
    logits = torch.empty(0)
    for ids in base.steps(torch.tensor([node.own for node in nodes])):
        mask = torch.cat([mask, mask.new_ones(ids.shape)], 1)
        positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1
        logits = base.call(input_ids=ids, cache=cache, attention_mask=mask, position_ids=positions)
    return logits


class Copies(Base):
    """Keeps a cache of each node."""

    name = "copies"

    def __init__(self, model: Any, plan: Plan, at_once: bool) -> None:
        super().__init__(model, plan, at_once)
        self.caches: dict[int, DynamicCache] = {}

    def plant(self) -> None:
        cache = DynamicCache(config=self.model.config)
        for ids in torch.split(torch.tensor([self.plan.nodes[0].own]), CHUNK, 1):
            self.call(input_ids=ids, cache=cache)
        self.caches[0] = cache

    def grow(self, made: Sequence[int]) -> Tensor:
        nodes = [self.plan.nodes[number] for number in made]
        parents = [self.caches[node.parent or 0] for node in nodes]
        lengths = [parent.get_seq_length() for parent in parents]
        longest, cache = max(lengths), DynamicCache(config=self.model.config)
        for number in range(len(parents[0].layers)):
            sides = []
            for side in ("keys", "values"):
                rows = [getattr(parent.layers[number], side) for parent in parents]
                _, heads, _, width = rows[0].shape
                joined = rows[0].new_zeros(len(rows), heads, longest, width)
                for row, tensor in enumerate(rows):
                    joined[row, :, longest - tensor.shape[2] :] = tensor[0]
                sides.append(joined)
            cache.layers[number].update(*sides)
        mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
        logits = decode(self, nodes, cache, mask)
        for row, (number, node) in enumerate(zip(made, nodes, strict=True)):
            own = DynamicCache(config=self.model.config)
            for layer, of_batch in zip(own.layers, cache.layers, strict=True):
                sides = [
                    side[row : row + 1, :, side.shape[2] - node.length :].clone()
                    for side in (of_batch.keys, of_batch.values)
                ]
                layer.update(*sides)
            self.caches[number] = own
        return logits

    @property
    def kept_bytes(self) -> int:
        return sum(
            tensor.nbytes
            for cache in self.caches.values()
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
        )


class Continuous(Base):
    """Has an engine keep pages, which know what they begin with."""

    name = "continuous"

    def __init__(self, model: Any, plan: Plan, at_once: bool) -> None:
        super().__init__(copy.deepcopy(model), plan, at_once)  # it changes the model's attention
        pages = 2 * (plan.distinct // PAGE + len(plan.nodes))
        self._manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=pages, max_batch_tokens=CHUNK, use_cuda_graph=False
            ),
        )
        self.kept_bytes = 0  # it says nothing of it
        self._manager.start()

    def plant(self) -> None:
        self._continue([self.plan.nodes[0].own], 1)

    def grow(self, made: Sequence[int]) -> Tensor:
        began = process_time()
        nodes = [self.plan.nodes[number] for number in made]
        self._continue([self.plan.text(node.parent or 0) for node in nodes], len(nodes[0].own))
        self.in_threads = process_time() - began
        return torch.empty(0)

    def _continue(self, texts: Sequence[list[int]], new: int) -> None:
        asked = self._manager.add_requests(list(texts), max_new_tokens=new)
        for request in asked:
            while (result := self._manager.get_result(request, timeout=1.0)) is None:
                pass
            if result.error is not None:
                raise RuntimeError(result.error)

    def close(self) -> None:
        """End its thread."""
        self._manager.stop(block=True)


class Ours(Base):
    """Keeps what is new of each node."""

    name = "concurrent_kv"

    def __init__(self, model: Any, plan: Plan, at_once: bool) -> None:
        super().__init__(model, plan, at_once)
        longest = max(node.length for node in plan.nodes)
        self.fits = CacheLayout.of(model, max_tokens=longest)
        config = ManagerConfig(self.fits.layout, 1, len(plan.nodes), len(plan.nodes))
        self.manager = KVCacheManager(config, 1, init_entries=1, wm_entries=1, recur_slots=plan.distinct)
        self.search = self.manager.search([0], entries=len(plan.nodes), tokens=plan.distinct)
        self.in_cache = {"gather": 0.0, "append": 0.0, "commit": 0.0}

    def plant(self) -> None:
        own = self.plan.nodes[0].own
        with self.search.gather([0], [0], room=len(own)) as batch:
            cache = BatchCache(batch, self.fits)
            for first in range(0, len(own), CHUNK):
                self.call(**cache.model_inputs([own[first : first + CHUNK]]))
            cache.commit(self.search, [0])

    def grow(self, made: Sequence[int]) -> Tensor:
        nodes, times = [self.plan.nodes[number] for number in made], self.in_cache
        began = perf_counter()
        batch = self.search.gather([node.parent for node in nodes], [0] * len(nodes), room=len(nodes[0].own))
        cache = TimedCache(batch, self.fits)
        times["gather"] += perf_counter() - began
        logits = torch.empty(0)
        for ids in self.steps(torch.tensor([node.own for node in nodes])):
            began = perf_counter()
            inputs = cache.model_inputs(ids)
            times["append"] += perf_counter() - began
            logits = self.call(**inputs)
        began = perf_counter()
        cache.commit(self.search, made)
        times["commit"] += perf_counter() - began
        times["append"] += cache.seconds
        return logits

    @property
    def kept_bytes(self) -> int:
        return self.search.tokens_in_use * self.fits.layout.bytes_per_token


class TimedCache(BatchCache):
    """Counts the seconds of its layers' updates."""

    seconds = 0.0

    def update(self, *args: Any, **options: Any) -> Any:
        began = perf_counter()
        found = super().update(*args, **options)
        self.seconds += perf_counter() - began
        return found


def bare_copies(ours: Ours, rows: int, times: int) -> tuple[float, float]:
    """Median seconds of gathering the longest texts once more, and of copying as many bytes."""
    longest = sorted(range(len(ours.plan.nodes)), key=lambda number: -ours.plan.nodes[number].length)[:rows]
    gathers, copies = [], []
    with ours.search.gather(longest, [0] * rows, room=0) as batch:
        source = batch.data.clone()
    target = torch.empty_like(source)
    for _ in range(times):
        began = perf_counter()
        batch = ours.search.gather(longest, [0] * rows, room=0)
        gathers.append(perf_counter() - began)
        batch.close()
        began = perf_counter()
        target.copy_(source)
        copies.append(perf_counter() - began)
    return statistics.median(gathers), statistics.median(copies)


def stored_without_a_model(plan: Plan, shape: str) -> dict[str, Any]:
    """What a tree takes whose tokens no model has seen."""
    settings, dtype = SHAPES[shape]
    config, longest = AutoConfig.for_model(**settings), max(node.length for node in plan.nodes)
    step = max(CHUNK, *[len(node.own) for node in plan.nodes[1:]])
    whole, parted = (CacheLayout.of(config, max_tokens=longest, step=each, dtype=dtype) for each in (None, step))
    distinct, named = plan.distinct, sum(node.length for node in plan.nodes)
    return {
        "shape": shape,
        "nodes": len(plan.nodes),
        "distinct_tokens": distinct,
        "named_tokens": named,
        "copies_would_keep_bytes": named * whole.layout.bytes_per_token,
        **_stored(plan, whole, step),
        **({} if parted.window is None else {"with_a_pool_for_windows": _stored(plan, parted, step)}),
    }


def _stored(plan: Plan, fits: CacheLayout, step: int) -> dict[str, Any]:
    nodes, new = len(plan.nodes), max(len(node.own) for node in plan.nodes[1:])

    def manager_of(layout: KVLayout, tokens: int) -> KVCacheManager:
        return KVCacheManager(
            ManagerConfig(layout, 1, nodes, nodes),
            1,
            init_entries=1,
            init_tokens=layout.max_tokens,
            wm_entries=1,
            wm_tokens=layout.max_tokens,
            headroom_tokens=layout.max_tokens,
            recur_slots=max(tokens, layout.max_tokens),
        )

    managers = [manager_of(fits.layout, plan.distinct)]
    if fits.window is not None:
        managers.append(manager_of(fits.window.layout, min(plan.distinct, fits.window.tokens + nodes * new)))
    searches = [m.search([0], entries=nodes, tokens=m.allocation().slots["recur"]) for m in managers]
    store, buffer_bytes = TextStore(fits, *searches), 0
    for made in track([[0], *plan.rounds], "rounds"):
        parents: list[int | None] = [plan.nodes[number].parent for number in made]
        own = len(plan.nodes[made[0]].own)
        for first in range(0, own, step):
            some = min(step, own - first)
            rows = store.gather(made if first else parents, [0] * len(made), room=some)
            batches = [batch for batch in (rows.full, rows.window) if batch is not None]
            for batch in batches:
                batch.advance(some)
            buffer_bytes = max(buffer_bytes, sum(batch.data.nbytes for batch in batches))
            store.commit(made, rows, lengths=[some] * len(made))
    per_token = [manager.layout.bytes_per_token for manager in managers]
    kept = [search.tokens_in_use for search in searches]
    return {
        "tokens": kept,
        "bytes_per_token": per_token,
        "kept_bytes": sum(tokens * each for tokens, each in zip(kept, per_token, strict=True)),
        "storage_bytes": sum(manager.allocation().nbytes for manager in managers),
        "largest_buffer_bytes": buffer_bytes,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny-llama", help="of the model (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=64, help="of the tree (default: %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens of a node (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="nodes of a round (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=6, help="of the tree, at most (default: %(default)s)")
    parser.add_argument("--at-once", action="store_true", help="give a node's tokens together, not one by one")
    parser.add_argument("--prefilled", type=int, default=2, help="rounds that are prefilled (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="store the tree without a model")
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contestants alone")
    parser.add_argument("--quick", action="store_true", help="16 nodes of 4 tokens, to see that it runs")
    parser.add_argument("--json", type=file_to_write, help="write the figures to this file")
    asked = parser.parse_args(argv)
    if asked.quick:
        asked.nodes, asked.new, asked.prompt = 16, 4, min(asked.prompt, 50)
    if asked.memory:
        plan = planned(asked.prompt, asked.nodes, asked.new, asked.rows, asked.depth, words=512)
        console_of().print_json(data=stored_without_a_model(plan, asked.shape))
        return
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    about = About()
    settings, dtype = SHAPES[asked.shape]
    longest = asked.prompt + asked.depth * asked.new
    config = AutoConfig.for_model(**settings, max_position_embeddings=longest + 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    plan = planned(asked.prompt, asked.nodes, asked.new, asked.rows, asked.depth, config.vocab_size)
    named = sum(node.length for node in plan.nodes)
    fits = CacheLayout.of(model, max_tokens=longest)
    kinds: list[Callable[..., Any]] = [Prefill, Copies, *([Continuous] if asked.continuous else []), Ours]
    out = console_of()
    contestants: list[Any] = []
    for kind in kinds:
        name = kind.name  # type: ignore[attr-defined]
        if asked.only and name not in asked.only:
            continue
        if name == "copies" and named * fits.layout.bytes_per_token > LARGEST:
            out.print(f"copies left out: {named * fits.layout.bytes_per_token / GIB:.0f} GiB")
            continue
        contestants.append(kind(model, plan, asked.at_once))
    costs = {each.name: Costs() for each in contestants}
    differ = 0.0
    with torch.inference_mode():
        for each in contestants:
            each.plant()
        for number, made in enumerate(track(plan.rounds, "rounds")):
            logits = {}
            for each in contestants[number % len(contestants) :] + contestants[: number % len(contestants)]:
                if each.name == "prefill" and number >= asked.prefilled:
                    continue
                each.in_model = 0.0
                began, of_thread = perf_counter(), thread_time()
                of_last = each.grow(made).float()
                if of_last.numel():
                    logits[each.name] = of_last
                costs[each.name].wall.append(perf_counter() - began)
                spent = thread_time() - of_thread
                costs[each.name].thread.append(spent if each.in_threads is None else each.in_threads)
                costs[each.name].model.append(each.in_model)
            if "concurrent_kv" in logits:
                differ = max(differ, *[float((each - logits["concurrent_kv"]).abs().max()) for each in logits.values()])
        found = summary(asked, contestants, costs, plan, fits, differ)
    found["about"] = about.as_dict(" ".join(["python -m benchmarks.text_trees", *(argv or [])]))
    for each in contestants:
        if isinstance(each, Continuous):
            each.close()
    show(out, found)
    out.print(origin(found["about"]))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def summary(
    asked: Any, contestants: Sequence[Any], costs: dict[str, Costs], plan: Plan, fits: CacheLayout, differ: float
) -> dict[str, Any]:
    """The figures, as plain data."""
    rounds = len(plan.rounds)
    found: dict[str, Any] = {
        "shape": asked.shape,
        "prompt": asked.prompt,
        "nodes": asked.nodes,
        "new": asked.new,
        "rows": asked.rows,
        "at_once": asked.at_once,
        "distinct_tokens": plan.distinct,
        "named_tokens": sum(node.length for node in plan.nodes),
        "bytes_per_token": fits.layout.bytes_per_token,
        "largest_difference": differ,
        "contestants": {},
    }
    for each in contestants:
        of = costs[each.name]
        scale = rounds / len(of.wall)
        found["contestants"][each.name] = {
            "seconds": sum(of.wall) * scale,
            "thread_seconds": sum(of.thread) * scale,
            "model_seconds": sum(of.model) * scale,
            "round_quartiles": statistics.quantiles(of.wall, n=4) if len(of.wall) > 1 else of.wall * 3,
            "scaled": scale > 1,
            "kept_bytes": each.kept_bytes,
        }
        if isinstance(each, Ours):
            gather, copy = bare_copies(each, asked.rows, 3 if asked.quick else 15)
            in_model = sum(of.model) - each.in_cache["append"]
            found |= {
                "cache_seconds": each.in_cache,
                "cache_share_of_forwards": sum(each.in_cache.values()) / in_model,
                "gather_seconds": gather,
                "bare_copy_seconds": copy,
                "kept_by_distinct": each.kept_bytes / (plan.distinct * fits.layout.bytes_per_token),
            }
    return found


def show(out: Console, found: dict[str, Any]) -> None:
    """A table of the figures."""
    how = "together" if found["at_once"] else "one by one"
    table = Grid(
        f"{found['shape']}: prompt {found['prompt']}, {found['nodes']} nodes of {found['new']} tokens {how}, "
        f"{found['rows']} rows",
        ("", "seconds", "of the thread", "of the model", "by ours", "kept"),
    )
    ours = found["contestants"].get("concurrent_kv", {}).get("thread_seconds")
    for name, of in found["contestants"].items():
        mark = " *" if of["scaled"] else ""
        row = (
            name,
            f"{of['seconds']:.2f}{mark}",
            f"{of['thread_seconds']:.2f}{mark}",
            f"{of['model_seconds']:.2f}{mark}",
            f"{of['thread_seconds'] / ours:.2f}{mark}" if ours else "",
            f"{of['kept_bytes'] / MIB:.1f} MiB",
        )
        table.rows.append(row)
    out.print(table)
    if any(of["scaled"] for of in found["contestants"].values()):
        out.print("* scaled from the first rounds")
    if ours:
        out.print(
            f"stored: {found['kept_by_distinct']:.3f} of the {found['distinct_tokens']:,} distinct tokens "
            f"({found['named_tokens']:,} named); cache path {100 * found['cache_share_of_forwards']:.1f}% of the "
            f"forwards; gather by a bare copy {found['gather_seconds'] / found['bare_copy_seconds']:.2f}; largest "
            f"difference of logits {found['largest_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
