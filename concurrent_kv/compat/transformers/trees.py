"""`TextTrees`: trees of text over one model, each node a continuation of its parent; for threads and for tasks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..._checks import positive_int
from ...aio.evaluator import AsyncEvaluator
from ...books.allocation import default_tokens
from ...errors import (
    CapacityError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    WaitTimeoutError,
    WindowOverflowError,
    shown,
)
from ...evaluation.evaluator import Evaluator
from ...evaluation.leaves import NO_PARENT, Evaluated, Leaf
from ...internal import ShowsPublic
from ...locks.gate import gate
from ...locks.numbers import Numbers
from ...manager import KVCacheManager
from ...model.config import ManagerConfig
from ...pool.handle import Handle
from ...pool.joint import JointBatch, Part, open_together
from ...pool.pool import KVPool
from ...search.search import Search, gather_part_of_search
from .cache import BatchCache
from .layouts import CacheLayout, UnsupportedModelError
from .states import TextState
from .stores import TextRows, TextStore
from .windows import WindowCapacityError, WindowedSide, commit_window, new_write, side_of, write_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...evaluation.stats import EvaluatorStats

__all__ = ["TextNode", "TextTree", "TextTrees"]


class Window(NamedTuple):
    """Where a child's tokens in layers with a sliding window come from, and go to.

    Attributes:
        search: of these layers.
        part: its parent's, kept from when the leaf was handed in: a call of many trees does not fail where one of them
            lets go of a node meanwhile.
        child: the key of what is stored.
    """

    search: Search
    part: Part
    child: Hashable


class Last(NamedTuple):
    """What the model is given of a node: the token that it has not seen.

    Attributes:
        token: that one.
        path: side data of a text of this token alone, which has no entry; None for others.
        window: of layers that slide; None where these keep all tokens with the others.
    """

    token: int
    path: Any = None
    window: Window | None = None


class Continuation(NamedTuple):
    """What the model made of a node.

    Attributes:
        ids: tokens that it added.
        logprob: the sum of their log-probabilities; nan where that was not asked for.
        has_ended: whether the last one ends the text.
        is_passed: whether the model keeps states, and was given tokens after the last one, as other rows went on.
        error: why it was not stored in layers that slide: its own caller hears it, and not those of the other rows.
    """

    ids: tuple[int, ...]
    logprob: float
    has_ended: bool
    is_passed: bool = False
    error: Exception | None = None


class TextNode(metaclass=ShowsPublic):
    """A text in a tree: its parent's, and some tokens more.

    Attributes:
        tree: the tree that it is of.
        parent: None for a prompt.
        ids: its own tokens.
        depth: nodes above it.
        logprob: the sum of the log-probabilities of its own tokens, as the model gave them; 0 for given ones.
        has_ended: whether its last token ends the text; it cannot be expanded then.
        released: whether the tree has let go of it; it cannot be expanded then.
        children: nodes that continue it, in no order.
        score, data: the caller's.
    """

    __slots__ = (
        "children",
        "data",
        "depth",
        "has_ended",
        "ids",
        "is_passed",
        "key",
        "logprob",
        "parent",
        "released",
        "score",
        "tree",
    )
    _internal = frozenset(("is_passed", "key"))

    def __init__(
        self, tree: TextTree, parent: TextNode | None, key: Hashable, ids: Sequence[int], logprob: float = 0.0
    ) -> None:
        self.tree = tree
        self.parent = parent
        self.key = key
        self.ids = tuple(ids)
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.logprob = logprob
        self.has_ended = False
        self.is_passed = False  # see `Continuation`
        self.released = False
        self.children: list[TextNode] = []
        self.score = 0.0
        self.data: Any = None

    @property
    def path(self) -> list[TextNode]:
        """The nodes from the prompt's to this one; those above the tree's root too, after `keep`."""
        node: TextNode | None = self
        path = []
        while node is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    @property
    def all_ids(self) -> list[int]:
        """The tokens of the whole text, the prompt's included."""
        return [token for node in self.path for token in node.ids]

    @property
    def total_logprob(self) -> float:
        """The sum of the log-probabilities of all tokens after the prompt."""
        return sum(node.logprob for node in self.path)

    @property
    def text(self) -> str:
        """Its own tokens as text; needs a tokenizer."""
        return self.tree.trees.decoded(self.ids)

    @property
    def all_text(self) -> str:
        """The whole text; needs a tokenizer."""
        return self.tree.trees.decoded(self.all_ids)

    def __iter__(self) -> Iterator[TextNode]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children

    def __repr__(self) -> str:
        return f"<TextNode {self.key}: {len(self.ids)} tokens at depth {self.depth}, score {self.score:g}>"


class TextTrees(Handle):
    """Trees of text over one causal language model. What texts have in common is computed and stored once.

    Nodes that threads and tasks expand at the same time, of whichever trees, share one `generate()`: see `Evaluator`.

    Args:
        model: in evaluation mode.
        max_tokens: the most tokens of a text, the prompt's included.
        nodes: of a tree, beside its root.
        tokens: of a tree, counted once where texts share them; if left out, `nodes` full texts where they have at most
            1,024 tokens, and 1,024 for each node where they may have more.
        window_tokens: of a tree, in layers with a sliding window, which keep no more than the newest tokens of each
            text; if left out, as many as are always enough: `tokens`, or a window for each node and the root if that
            is less. A window, and `max_new_tokens` for each node, are enough without `TextTree.add`.
        trees: that can be open at once.
        promoted: texts that `TextTree.promote` keeps for later trees.
        tokenizer: where prompts and nodes are to be text.
        generation: how a node is continued, as for `model.generate()`: a `GenerationConfig`, or arguments
            (`max_new_tokens`, `do_sample`, `temperature`, ...). One beam.
        node_ends: tokens that end a node, but not its text: that of a newline, where nodes are lines.
        logprobs: whether nodes get their `logprob`; for the time of a call that costs `max_new_tokens` rows of logits.
        max_rows: nodes that are continued in one call of `generate()`.
        max_wait_seconds: that an expansion waits for others, where a call is not made at once.
        prefill_tokens: of a prompt, given to the model at once; all of them, where texts have states. Layers with a
            sliding window keep no more than that window where `max_tokens` are more than it and these together.
        forward: called instead of `model.generate()`, with the `BatchCache` and its `model_inputs`; returns the ids
            `[rows, 1 + new tokens]`, the given ones first, and log-probabilities of the new ones `[rows, new tokens]`,
            or None.
        own_thread: whether a thread of its own makes the calls.
        timeout: seconds that an expansion takes at most.

    Raises:
        UnsupportedModelError: the model caches what no layout holds; or `node_ends` for rows of a model whose texts
            have states, which go on past them: `max_rows=1` will do.
        InvalidArgumentError, InvalidTypeError: an argument that cannot work, by name.
    """

    _internal = frozenset(("decoded", "encoded", "keep_text", "next_key", "opened", "prefilled"))

    instead_of_copy = "share the one object between threads and tasks"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int,
        nodes: int,
        tokens: int | None = None,
        window_tokens: int | None = None,
        trees: int = 1,
        promoted: int = 4,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation: GenerationConfig | Mapping[str, Any] | None = None,
        node_ends: Sequence[int] = (),
        logprobs: bool = True,
        max_rows: int = 8,
        max_wait_seconds: float = 0.002,
        prefill_tokens: int = 1024,
        forward: Callable[[BatchCache, dict[str, Any]], tuple[Tensor, Tensor | None]] | None = None,
        own_thread: bool = False,
        timeout: float = 600.0,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise InvalidTypeError(f"model must be a PreTrainedModel, got {type(model).__name__}")
        if model.training:
            raise InvalidArgumentError("model must be in evaluation mode: model.eval()")
        self.model, self.tokenizer = model, tokenizer
        self._options = _options(model, generation)
        for name in ("num_beams", "num_return_sequences"):
            if self._options[name] not in (None, 1):
                raise InvalidArgumentError(
                    f"generation must have {name}=1, as expand(samples=) says how many continuations, got "
                    f"{shown(self._options[name])}"
                )
            self._options[name] = 1
        self._options |= {"return_dict_in_generate": True, "output_logits": logprobs}
        self.new_tokens = positive_int("generation.max_new_tokens", self._options["max_new_tokens"])
        self._nodes = positive_int("nodes", nodes)
        self._tokens = None if tokens is None else positive_int("tokens", tokens)
        self._logprobs = logprobs
        self._prefill_tokens = positive_int("prefill_tokens", prefill_tokens)
        step = max(self.new_tokens, min(self._prefill_tokens, positive_int("max_tokens", max_tokens)))
        self.fits = CacheLayout.of(model, max_tokens=max_tokens, step=step)
        self.step = None if self.fits.window is None else step  # the most tokens between a gather and a commit
        self._forward = forward or self._generate
        self._trees = trees = positive_int("trees", trees)
        self._promoting = threading.Lock()
        self._promoted = promoted = positive_int("promoted", promoted)
        if self.new_tokens >= self.fits.layout.max_tokens:
            raise InvalidArgumentError(
                f"generation.max_new_tokens must leave room for a prompt in max_tokens={self.fits.layout.max_tokens}, "
                f"got {self.new_tokens}"
            )
        ends = self._options["eos_token_id"]
        self._ends: frozenset[int] = frozenset(() if ends is None else torch.as_tensor(ends).reshape(-1).tolist())
        self._stops = self._ends.union([positive_int("node_ends", token, minimum=0) for token in node_ends])
        if self._stops:
            self._options["eos_token_id"] = sorted(self._stops)
            if self._options["pad_token_id"] is None:
                self._options["pad_token_id"] = min(self._ends, default=0)
        if self._stops != self._ends and self.fits.has_states and max_rows != 1:
            raise UnsupportedModelError(
                f"max_rows must be 1 with node_ends for {type(model).__name__}, whose states go on past a node's end "
                f"until all rows are done, got {max_rows}"
            )
        self._keeps_logits = "logits_to_keep" in signature(model.forward).parameters
        # Each tree is a search. All are over one environment, whose init pool has the promoted texts.
        config = ManagerConfig(self.fits.layout, 1, self._nodes, trees * (self._nodes + 1))
        recur = None if self._tokens is None else trees * max(self._tokens, max_tokens)
        if recur is None and trees > 1:
            recur = trees * KVCacheManager.allocation_for(config, 1).slots["recur"]
        self.manager = KVCacheManager(config, 1, init_entries=promoted, recur_slots=recur, wm_entries=1)
        self.window_manager = self._for_windows(
            window_tokens, self._tokens or default_tokens(self._nodes + 1, max_tokens)
        )
        self.evaluator: Evaluator[Last, Continuation] = Evaluator(
            self.manager,
            self._continue,
            max_rows=max_rows,
            max_wait_seconds=max_wait_seconds,
            room=self.new_tokens,
            own_thread=own_thread,
            timeout=timeout,
        )
        self.for_tasks: AsyncEvaluator[Last, Continuation] = AsyncEvaluator(self.evaluator)
        self._numbers = Numbers()

    def _for_windows(self, window_tokens: int | None, tokens: int) -> KVCacheManager | None:
        """Where layers that slide keep their tokens, if they have pools of their own; `tokens` of a tree at most."""
        fits = self.fits.window
        if fits is None:
            self._window_tokens = 0
            return None
        columns, nodes, trees = fits.layout.max_tokens, self._nodes, self._trees
        self._window_tokens = (
            min(tokens, (nodes + 1) * fits.tokens)
            if window_tokens is None
            else positive_int("window_tokens", window_tokens, minimum=fits.tokens)
        )
        return KVCacheManager(
            ManagerConfig(fits.layout, 1, nodes, trees * (nodes + 1)),
            1,
            # One more: what a name had before goes after the new one is there.
            init_entries=self._promoted + 1,
            init_tokens=max(columns, (self._promoted + 1) * fits.tokens),
            recur_slots=max(columns, trees * self._window_tokens),
            wm_entries=1,
            wm_tokens=columns,
            # Roots that open trees keep after they were replaced.
            headroom_tokens=max(columns, (trees + 1) * fits.tokens),
            name="windows",
        )

    # Trees -----------------------------------------------------------------------------------------------------------

    def tree(self, prompt: str | Sequence[int] | Tensor) -> TextTree:
        """A tree whose root is a prompt, which the model is given now. May block.

        Raises:
            InvalidArgumentError: the prompt has no token, or no room for a continuation.
            CapacityError: as many trees are open as there is room for.
        """
        ids, store = self.encoded(prompt), self.opened()
        try:
            # Of a single token the model is given none before the first expansion.
            tree = TextTree(self, store, ids, self.next_key() if len(ids) > 1 else NO_PARENT)
            tree.give_root()
        except BaseException:
            store.close()
            raise
        return tree

    def promoted_tree(self, name: Hashable) -> TextTree:
        """A tree whose root is a text that was promoted under `name`: nothing is computed. May block.

        Raises:
            KeyNotFoundError: there is none, or others have displaced it, or the weights have changed.
        """
        key, before = _promoted(name), None
        while True:
            store = self.opened()
            try:
                # From here on the tree has it, whatever is promoted under the name meanwhile.
                side = _root_side(store.full, key)
                write = write_of(side)
                if side is not None and (store.window is None or _adopts_window(store, key, write)):
                    side = side_of(side)
                    return TextTree(self, store, _ids_of(side.side if isinstance(side, TextState) else side), key)
                if side is None or write == before:
                    raise KeyNotFoundError(f"no text was promoted under {shown(name)}, or it is not there any more")
            except BaseException:
                store.close()
                raise
            # Its window has gone: another text was promoted under the name meanwhile, or it will be missing again.
            store.close()
            before = write

    def keep_text(self, store: TextStore, node: TextNode, name: Hashable) -> None:
        """Keep a node's text when its tree is closed; see `TextTree.promote`. May block."""
        key, full = _promoted(name), store.full
        assert isinstance(full, Search)
        if self.window_manager is None or not isinstance(store.window, Search):
            full.promote(node.key, 0, as_key=key)
            return
        # One at a time: the window of one that is under way has the one place that is to spare.
        seconds = self.manager.storage.wait_timeout
        if not self._promoting.acquire(timeout=seconds):
            raise WaitTimeoutError(f"other texts were still being promoted after {seconds:g} s")
        try:
            self._keep_both(full, store, node.key, key)
        finally:
            self._promoting.release()

    def _keep_both(self, full: Search, store: TextStore, node_key: Hashable, key: Hashable) -> None:
        """Promote a node's entries in both stores. No other is being promoted."""
        assert self.window_manager is not None
        assert isinstance(store.window, Search)
        # The window first, under a key of its own that the other entry names: who finds that one finds this, too.
        of_windows, write = self.window_manager.init_pools[0], new_write()
        (of_node,) = store.in_window([node_key])
        store.window.promote(of_node, 0, as_key=write, side=write)
        try:
            side = side_of(_root_side(full, node_key))
            replaced = write_of(self.manager.init_pools[0].side(key))
            full.promote(node_key, 0, as_key=key, side=WindowedSide(side, write))
        except BaseException:
            of_windows.discard(write)
            raise
        if replaced is not None:
            of_windows.discard(replaced)

    def weights_changed(self) -> None:
        """The model's weights are others now: what was computed with the old ones is not used any more.

        Open trees end with `SearchEndedError`, promoted texts are gone. Never blocks for long.
        """
        self.manager.bump_version()
        if self.window_manager is not None:
            self.window_manager.bump_version()

    def stats(self) -> EvaluatorStats:
        """What the calls of the model cost; see `EvaluatorStats`."""
        return self.evaluator.stats()

    def close(self) -> None:
        """End all trees and free the memory."""
        self.evaluator.close()
        self.manager.close()
        if self.window_manager is not None:
            self.window_manager.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.manager.storage.closed

    # Texts -----------------------------------------------------------------------------------------------------------

    def encoded(self, text: str | Sequence[int] | Tensor, *, goes_on: bool = False) -> tuple[int, ...]:
        """The tokens of a text; of tokens themselves, these. `goes_on`: what begins or ends a text is not added."""
        name = "text" if goes_on else "prompt"
        ids: Any = text
        if isinstance(text, str):
            if self.tokenizer is None:
                raise InvalidArgumentError("tokenizer must be given where texts are strings")
            ids = self.tokenizer(text, **({"add_special_tokens": False} if goes_on else {}))["input_ids"]
        if isinstance(ids, (Tensor, np.ndarray)):
            if math.prod(ids.shape[:-1]) != 1:
                raise InvalidArgumentError(f"{name} must be the tokens of one text, got the shape {tuple(ids.shape)}")
            ids = ids.reshape(-1).tolist()
        return tuple([positive_int(name, token, minimum=0) for token in ids])

    def decoded(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        if self.tokenizer is None:
            raise InvalidArgumentError("tokenizer must be given for nodes to have text")
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # The model -------------------------------------------------------------------------------------------------------

    def _continue(self, joint: JointBatch, last: Sequence[Last]) -> Evaluated[Continuation]:
        """Continue the texts of a batch's rows, of which the model was given all but the last token."""
        if self.window_manager is None:
            return self._continued(BatchCache(joint, self.fits), last)
        parts = [each.window.part for each in last if each.window is not None]
        for part in parts:  # what a call that was interrupted has appended is not there any more
            part.settle([part.start] * self.window_manager.layout.num_layers)
        window = open_together(self.window_manager.storage, parts, room=self.new_tokens)
        try:
            evaluated = self._continued(BatchCache(TextRows(joint, window), self.fits), last)
        except Exception:
            window.close()
            raise
        # Not closed by what is raised otherwise: the call is made once more then, of the same parts.
        window.close()
        return evaluated

    def _continued(self, cache: BatchCache, last: Sequence[Last]) -> Evaluated[Continuation]:
        with torch.inference_mode():
            sequences, logprobs = self._forward(cache, cache.model_inputs([[each.token] for each in last]))
        continued, lengths = list[Continuation](), list[int]()
        of_rows = None if logprobs is None else logprobs.double().cumsum(1).tolist()
        for row, (_, *ids) in enumerate(sequences.tolist()):
            number = next((place for place, token in enumerate(ids, 1) if token in self._stops), len(ids))
            total = float("nan") if of_rows is None else of_rows[row][number - 1]
            is_passed = self.fits.has_states and number < len(ids)
            continued.append(Continuation(tuple(ids[:number]), total, ids[number - 1] in self._ends, is_passed))
            lengths.append(number)
        if self.fits.has_states:  # of all that the model was given; no text goes on after its end
            lengths = [cache.batch.end - cache.batch.start] * len(lengths)
        paths = [path if each.path is None else each.path for path, each in zip(cache.side, last, strict=True)]
        sides = [(path, made.ids) for path, made in zip(paths, continued, strict=True)]
        if isinstance(cache.window, JointBatch):
            cache.window.settle()
            errors = self._store_windows(cache, last, lengths)
            continued = [made._replace(error=error) for made, error in zip(continued, errors, strict=True)]
        return Evaluated(continued, sides=cache.sides(sides), lengths=lengths)

    def _store_windows(self, cache: BatchCache, last: Sequence[Last], lengths: Sequence[int]) -> list[Exception | None]:
        """Store what layers that slide keep of each row, before its other entry is; returns why not, of each."""
        assert self.fits.window is not None
        errors: list[Exception | None] = [None] * len(last)
        for row, ((_, _, window), length) in enumerate(zip(last, lengths, strict=True)):
            if window is not None:
                write, tokens = cache.rows.writes[row], self.fits.window.tokens
                try:
                    commit_window(window.search, [window.child], window.part, [length], tokens, [write])
                except Exception as error:
                    errors[row] = error
        return errors

    def _generate(self, cache: BatchCache, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        made: Any = self.model.generate(**inputs, **self._options)
        if not self._logprobs:
            return made.sequences, None
        chosen = made.sequences[:, 1:]
        of_steps = [
            logits.float().log_softmax(-1).gather(1, chosen[:, step, None]) for step, logits in enumerate(made.logits)
        ]
        return made.sequences, torch.cat(of_steps, 1)

    def prefilled(self, cache: BatchCache, ids: Sequence[int], *, begins: bool) -> None:
        """Give the model the tokens of one row; `begins`: it has none yet."""
        kept = {"logits_to_keep": 1} if self._keeps_logits else {}
        together = self._prefill_tokens
        if self.fits.has_states:  # some models go on from a state with one token only, see docs/transformers.md
            together = len(ids) if begins else 1
        with torch.inference_mode():
            for first in range(0, len(ids), together):
                self.model(**cache.model_inputs([ids[first : first + together]]), **kept)

    def opened(self) -> TextStore:
        """The store of a tree: a search, and where layers slide another one of these."""
        try:
            full = self.manager.search([0], entries=self._nodes + 1, tokens=self._tokens)
            if self.window_manager is None:
                return TextStore(self.fits, full)
            try:
                window = self.window_manager.search([0], entries=self._nodes + 1, tokens=self._window_tokens)
            except BaseException:
                full.close()
                raise
            return TextStore(self.fits, full, window)
        except CapacityError as error:
            raise CapacityError(
                f"no room is left for another tree: close one, or make TextTrees with more than trees={self._trees}",
                required_entries=error.required_entries,
                required_slots=error.required_slots,
            ) from error

    def next_key(self) -> int:
        """A key that no node has."""
        return next(self._numbers)


class TextTree(Handle):
    """A tree of continuations of one prompt; made by `TextTrees.tree`. Threads and tasks may use it at the same time.

    Attributes:
        trees: what it is of.
        root: the prompt's node, or since `keep` the one that was kept.
    """

    _internal = frozenset(("give_root",))

    instead_of_copy = "share the one object between threads and tasks"

    def __init__(self, trees: TextTrees, store: TextStore, ids: Sequence[int], key: Hashable) -> None:
        if not ids:
            raise InvalidArgumentError("prompt must have at least one token, got none")
        most = trees.fits.layout.max_tokens - trees.new_tokens
        if len(ids) > most:
            raise InvalidArgumentError(
                f"prompt must have at most {most} tokens, or no continuation of {trees.new_tokens} fits into the "
                f"{trees.fits.layout.max_tokens} of a text, got {len(ids)}"
            )
        self.trees = trees
        self._store = store
        self._lock = threading.RLock()  # for which nodes there are, and `_left`
        self._left: set[Hashable] = set()  # of nodes that nobody waits for any more: a call may store them yet
        self.root = TextNode(self, None, key, ids)

    # Growing -----------------------------------------------------------------------------------------------------

    def expand(
        self, nodes: TextNode | Sequence[TextNode], samples: int = 1, *, timeout: float | None = None
    ) -> list[TextNode]:
        """Continue nodes, each `samples` times; returns the new nodes, those of the first node first. Blocks.

        Raises:
            InvalidArgumentError: a node of another tree, or one whose text has ended.
            KeyNotFoundError: a node that was released.
            CapacityError, WindowOverflowError: no room is left in the tree, or in a text; none of the nodes was made.
            SearchEndedError: the tree was closed, or the weights have changed.
            WaitTimeoutError: the calls took longer than `timeout` seconds.
        """
        leaves, parents = self._leaves(nodes, samples)
        with self._making(leaves):
            return self._grown(leaves, parents, self.trees.evaluator.evaluate_many(leaves, timeout=timeout))

    async def aexpand(
        self, nodes: TextNode | Sequence[TextNode], samples: int = 1, *, timeout: float | None = None
    ) -> list[TextNode]:
        """As `expand`, for a task of any event loop: the loop goes on meanwhile."""
        leaves, parents = self._leaves(nodes, samples)
        with self._making(leaves):
            return self._grown(leaves, parents, await self.trees.for_tasks.evaluate_many(leaves, timeout=timeout))

    def add(self, parent: TextNode, text: str | Sequence[int] | Tensor) -> TextNode:
        """Continue a node with a given text (an observation, a hint, the user's answer), as it stands: a string gets no
        special tokens of the tokenizer's. Blocks.

        Raises:
            InvalidArgumentError: no token. Otherwise as `expand`.
            UnsupportedModelError: the model keeps states, and the node ended before others of its call.
        """
        self._check_not_passed(parent)
        ids = self.trees.encoded(text, goes_on=True)
        if not ids:
            raise InvalidArgumentError("text must have at least one token, got none")
        node = TextNode(self, parent, self.trees.next_key(), ids)
        with self._discarded_where_it_fails([node.key]):
            self._give(parent, node)
            self._join([node])
        return node

    def give_root(self) -> None:
        """Give the model the prompt, but for its last token."""
        if self.root.key is not NO_PARENT:
            self._give(None, self.root)

    def _give(self, parent: TextNode | None, node: TextNode) -> None:
        """Give the model the tokens of a node that it has not seen, but for the last one."""
        ids = node.ids[:-1] if parent is None else (parent.ids[-1], *node.ids[:-1])
        source, path, together = node.key if parent is None else parent.key, None, self.trees.step or len(ids)
        for first in range(0, len(ids), together):
            some = ids[first : first + together]
            with self._store.gather([source], [0], room=len(some)) as rows:
                cache, is_hit = BatchCache(rows, self.trees.fits), rows.hits[0]
                if not first:
                    begins = parent is None or parent.key is NO_PARENT
                    path = (None, parent.ids) if parent is not None and begins else cache.side[0]
                if not is_hit and (first or not begins):
                    raise KeyNotFoundError(f"{parent or node!r} was released")
                self.trees.prefilled(cache, some, begins=not is_hit)
                cache.commit(self._store, [node.key], sides=[(path, node.ids)], new_tokens=len(some))
            source = node.key

    def _leaves(self, nodes: TextNode | Sequence[TextNode], samples: int) -> tuple[list[Leaf[Last]], list[TextNode]]:
        of_nodes = [nodes] if isinstance(nodes, TextNode) else [*nodes]
        samples = positive_int("samples", samples)
        for node in of_nodes:
            if node.tree is not self:
                raise InvalidArgumentError(f"nodes must be of this tree, got {node!r} of another")
            if node.has_ended:
                raise InvalidArgumentError(f"nodes must be texts that have not ended, got {node!r}")
        parents = [node for node in of_nodes for _ in range(samples)]
        leaves: list[Leaf[Last]] = []
        try:
            for node in parents:
                key = self.trees.next_key()
                leaves.append(Leaf(self._search, node.key, key, self._last(node, key), 0))
        except Exception:
            _let_go(leaves)
            raise
        return leaves, parents

    @property
    def _search(self) -> Search:
        full = self._store.full
        assert isinstance(full, Search)
        return full

    @contextmanager
    def _making(self, leaves: Sequence[Leaf[Last]]) -> Iterator[None]:
        """While leaves are evaluated: either all are made, or none stays."""
        with gate.lock, self._lock:
            before = tuple(self._left)
        self._discard(before)
        keys = [leaf.child for leaf in leaves]
        try:
            with self._discarded_where_it_fails(keys):
                yield
        except WindowOverflowError as error:
            _let_go(leaves)
            raise WindowOverflowError(
                f"a text has too many tokens for {self.trees.new_tokens} more: make TextTrees with more than "
                f"max_tokens={self.trees.fits.layout.max_tokens}"
            ) from error
        except BaseException as error:
            if isinstance(error, WaitTimeoutError) or not isinstance(error, Exception):
                with gate.lock, self._lock:
                    self._left.update(keys)
            else:
                _let_go(leaves)
            raise
        if leaves:  # calls are made one by one: those that were under way before are over
            self._discard(before)
            with gate.lock, self._lock:
                self._left.difference_update(before)

    @contextmanager
    def _discarded_where_it_fails(self, keys: Sequence[Hashable]) -> Iterator[None]:
        """While nodes are made: where that fails, what was stored of them goes."""
        try:
            yield
        except CapacityError as error:
            self._discard(keys)
            if isinstance(error, WindowCapacityError):
                where, sizes = " in layers with a sliding window", f"window_tokens={error.required_slots}"
            else:
                where, sizes = "", f"nodes={(error.required_entries or 1) - 1} and tokens={error.required_slots}"
            raise CapacityError(
                f"the tree has no room for {len(keys)} more nodes{where}: release some, or make TextTrees with at "
                f"least {sizes}",
                required_entries=error.required_entries,
                required_slots=error.required_slots,
            ) from error
        except BaseException:
            self._discard(keys)
            raise

    def _discard(self, keys: Iterable[Hashable]) -> None:
        self._store.discard(keys)

    def _join(self, grown: Sequence[TextNode]) -> None:
        """Put new nodes below their parents, or none of them if one was let go of meanwhile."""
        with gate.lock, self._lock:
            overtaken = _put_below(grown)
        if overtaken is not None:
            raise KeyNotFoundError(f"{overtaken!r} was released while it was continued")

    def _last(self, node: TextNode, child: Hashable) -> Last:
        is_new, window = node.key is NO_PARENT, self._store.window
        if not isinstance(window, Search):
            return Last(node.ids[-1], (None, node.ids) if is_new else None)
        part = gather_part_of_search(window, None if is_new else self._store.in_window([node.key]), [0])
        if not is_new and not part.hits[0]:
            part.close()
            raise KeyNotFoundError(f"{node!r} was released")
        return Last(node.ids[-1], (None, node.ids) if is_new else None, Window(window, part, child))

    def _grown(
        self, leaves: Sequence[Leaf[Last]], parents: Sequence[TextNode], made: Sequence[Continuation]
    ) -> list[TextNode]:
        grown = []
        for continued in made:
            if continued.error is not None:
                raise continued.error
        for leaf, parent, continued in zip(leaves, parents, made, strict=True):
            node = TextNode(self, parent, leaf.child, continued.ids, continued.logprob)
            node.has_ended, node.is_passed = continued.has_ended, continued.is_passed
            grown.append(node)
        self._join(grown)
        return grown

    # Pruning -----------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[TextNode]:
        """All nodes, parents first."""
        return [*self.root]

    @property
    def leaves(self) -> list[TextNode]:
        """Nodes without children whose text has not ended."""
        return [node for node in self.root if not node.children and not node.has_ended]

    @property
    def tokens_stored(self) -> int:
        """Slots that its texts take, those that they share counted once."""
        return self._search.tokens_in_use

    @property
    def window_tokens_stored(self) -> int:
        """The same of layers with a sliding window; 0 where these keep all tokens, in the slots of the others."""
        window = self._store.window
        return window.tokens_in_use if isinstance(window, Search) else 0

    def release(self, nodes: TextNode | Iterable[TextNode]) -> None:
        """Let go of nodes and all below them: their room can be used again. May block.

        Raises:
            InvalidArgumentError: the root, or a node of another tree.
            KeyNotFoundError: a node was released before; nothing is let go of then.
        """
        going = [nodes] if isinstance(nodes, TextNode) else [*nodes]
        for node in going:
            if node.parent is None or node is self.root or node.tree is not self:
                raise InvalidArgumentError(f"nodes must be of this tree and below its root, got {node!r}")
        with gate.lock, self._lock:
            below, gone = _leave(going)
        if gone is not None:
            raise KeyNotFoundError(f"{gone!r} was released before")
        try:
            self._release(below)
        except BaseException:
            cut = [(node.parent, [node]) for node in going if node.parent is not None]
            with gate.lock, self._lock:
                _come_back(below, cut)
            raise

    def keep(self, node: TextNode) -> None:
        """Make a node the root: let go of all that is not below it. Its text stays whole. May block.

        Raises:
            KeyNotFoundError: the node was released.
        """
        if node.tree is not self:
            raise InvalidArgumentError(f"node must be of this tree, got {node!r} of another")
        with gate.lock, self._lock:
            before, gone = self.root, node.released
            going, cut = ([], []) if gone else _leave_but(before, node)
            self.root = before if gone else node
        if gone:
            raise KeyNotFoundError(f"{node!r} was released")
        try:
            self._release(going)
        except BaseException:
            with gate.lock, self._lock:
                _come_back(going, cut)
                self.root = before
            raise

    def _release(self, going: Sequence[TextNode]) -> None:
        """Let go of the entries of nodes that the tree has let go of. No lock is held: it may block."""
        keys = [node.key for node in going if node.key is not NO_PARENT]
        if keys:
            self._store.release(keys)

    def promote(self, node: TextNode, name: Hashable) -> None:
        """Keep a node's text when the tree is closed: `TextTrees.promoted_tree(name)` goes on from it. May block.

        Raises:
            KeyNotFoundError: the node was released.
            UnsupportedModelError: the model keeps states, and the node ended before others of its call.
        """
        self._check_not_passed(node)
        if node.key is NO_PARENT:
            raise InvalidArgumentError(f"node must have more than one token to be promoted, got {node!r}")
        self.trees.keep_text(self._store, node, name)

    def _check_not_passed(self, node: TextNode) -> None:
        if node.is_passed:
            raise UnsupportedModelError(
                f"{node!r} ended before others of its call, which the model's state went on with: a text that goes on "
                "after its end needs TextTrees with max_rows=1"
            )

    def close(self) -> None:
        """Let go of all its texts. May block; nothing happens the second time."""
        self._store.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed, or ended from outside."""
        return self._search.closed

    def __repr__(self) -> str:
        return f"<TextTree of {sum(1 for _ in self.root)} nodes, {self.tokens_stored} tokens stored>"


def _put_below(grown: Sequence[TextNode]) -> TextNode | None:
    """Put new nodes below their parents; or none, where one of these was let go of, which is returned."""
    for node in grown:
        if node.parent is None or node.parent.released:
            return node.parent
    for node in grown:
        if node.parent is not None:
            node.parent.children.append(node)
    return None


# A node is below its parent or released, never both: each of these changes that of all that it is about.


def _leave(going: Sequence[TextNode]) -> tuple[list[TextNode], TextNode | None]:
    """Take nodes and all below them out of the tree, and return them; or one that was out before, and none is taken."""
    gone = next((node for node in going if node.released), None)
    if gone is not None:
        return [], gone
    below = [*{each.key: each for node in going for each in node}.values()]
    for node in below:
        node.released = True
    for node in going:
        if node.parent is not None and node in node.parent.children:
            node.parent.children.remove(node)
    return below, None


def _leave_but(root: TextNode, node: TextNode) -> tuple[list[TextNode], list[tuple[TextNode, list[TextNode]]]]:
    """Take all below the root out of the tree but a node and all below it, and return it, and what it was below."""
    staying = {each.key for each in node}
    going = [each for each in root if each.key not in staying]
    cut = [(each, each.children) for each in node.path[:-1] if not each.released]
    for each in going:
        each.released = True
    for each, _ in cut:
        each.children = []
    return going, cut


def _come_back(below: Sequence[TextNode], cut: Sequence[tuple[TextNode, list[TextNode]]]) -> None:
    """Put back what was taken out: its entries are there still."""
    for node in below:
        node.released = False
    for parent, children in cut:
        parent.children += children


def _options(model: PreTrainedModel, given: GenerationConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments for `generate()`: what was given and, of what decides where a text ends, what the model says else."""
    if isinstance(given, GenerationConfig):
        options = {name: value for name, value in given.to_diff_dict().items() if name != "transformers_version"}
    else:
        options = dict(given or {})
    if options.get("max_length") is not None:
        raise InvalidArgumentError(
            f"generation must have max_new_tokens instead of max_length, got max_length={shown(options['max_length'])}"
        )
    base: Any = model.generation_config
    for name in ("num_beams", "num_return_sequences", "max_new_tokens", "eos_token_id", "pad_token_id"):
        options.setdefault(name, getattr(base, name))
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = 32
    options.pop("use_cache", None)  # a batch says so itself
    return options | {"max_length": None, "cache_implementation": None}  # those of models are for caches of their own


def _promoted(name: Hashable) -> tuple[str, Hashable]:
    """The key of a promoted text: no node of a tree has one like it."""
    return "promoted", name


def _ids_of(path: Any) -> list[int]:
    """The tokens of a text from an entry's side data."""
    parts = []
    while path is not None:
        path, ids = path
        parts.append(ids)
    return [token for ids in reversed(parts) for token in ids]


def _root_side(search: KVPool | Search, key: Hashable) -> object:
    """The side data of a text, which the search has from now on; None where there is none."""
    assert isinstance(search, Search)
    with search.gather([key], [0], room=0) as batch:
        return batch.side[0]


def _adopts_window(store: TextStore, key: Hashable, write: Hashable) -> bool:
    """Whether the window of a promoted text is there, under the name of its write, which the search has then."""
    assert isinstance(store.window, Search)
    with store.window.gather([write], [0], room=0) as batch:
        store.window_keys[key] = write
        return batch.hits[0]


def _let_go(leaves: Sequence[Leaf[Last]]) -> None:
    """Give up what leaves keep of their parents' windows, whatever error names them. No call has them any more."""
    for leaf in leaves:
        if leaf.inputs.window is not None:
            leaf.inputs.window.part.close()
