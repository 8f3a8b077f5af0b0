"""What a batch takes from a caller's tensors, whatever their memory is like: the same compiled and by torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from concurrent_kv import Batch, KeysValues, KVLayout, KVPool
from concurrent_kv.native import native
from tests.native_support import needs_native
from tests.support import LOOPS, OperatorCalls, bits, loops_of

ROWS, LAYERS, HEADS, HEAD_DIM, WINDOW, GATHERED = 3, 2, 2, 4, 8, 3

Make = Callable[[Tensor], Any]


class Marked(Tensor):
    """A subclass that changes nothing."""


def strided_by(step: int, dimension: int) -> Make:
    def make(new: Tensor) -> Tensor:
        shape = list(new.shape)
        shape[dimension] *= step
        whole = new.new_zeros(shape)
        part = whole[(slice(None),) * dimension + (slice(None, None, step),)]
        return part.copy_(new)

    return make


def in_inference(new: Tensor) -> Tensor:
    with torch.inference_mode():
        return new.clone()


# Of the new tokens [rows, heads, tokens, head_dim] of one layer.
AT_ONCE: dict[str, Make] = {
    "contiguous": lambda new: new.clone(),
    "heads inside": lambda new: new.transpose(1, 2).contiguous().transpose(1, 2),
    "rows inside": lambda new: new.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "tokens outside": lambda new: new.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "part of another": lambda new: torch.cat([new, new + 1], 2)[:, :, : new.shape[2]],
    "every other row": strided_by(2, 0),
    "every other token": strided_by(2, 2),
    "expanded": lambda new: new[:1].expand_as(new),
    "one head": lambda new: new[:, :1].expand_as(new),
    "one number": lambda new: new[..., :1, :].expand_as(new),
    "with a gradient": lambda new: new.clone().requires_grad_(),
    "of a graph": lambda new: new.clone().requires_grad_() * 2,
    "made in inference mode": in_inference,
}
BY_TORCH: dict[str, Make] = {
    "every other number": strided_by(2, 3),
    "numbers outside": lambda new: new.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "a parameter": lambda new: torch.nn.Parameter(new),
    "a subclass": lambda new: new.clone().as_subclass(Marked),
    "negative flag": lambda new: torch._neg_view(new),
    "zeros without memory": lambda new: torch._efficientzerotensor(new.shape, dtype=new.dtype),
}
REFUSED: dict[str, Make] = {
    "another dtype": lambda new: new.double(),
    "meta": lambda new: new.to("meta"),
    "sparse": lambda new: new.to_sparse(),
    "nested": lambda new: torch.nested.nested_tensor(list(new)),
    "no tensor": lambda new: new.tolist(),
    "an array": lambda new: new.float().numpy(),
    "fewer rows": lambda new: new[1:],
    "more heads": lambda new: torch.cat([new, new], 1),
    "smaller heads": lambda new: new[..., 1:],
    "one token more": lambda new: torch.cat([new, new[:, :, :1]], 2),
    "too many tokens": lambda new: torch.cat([new] * 9, 2),
    "a dimension more": lambda new: new[None],
    "a last dimension more": lambda new: new[..., None],
    "a dimension less": lambda new: new[0],
    "nothing": lambda new: None,
}
if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
    REFUSED["mkldnn"] = lambda new: new.float().to_mkldnn()


def new_tokens(tokens: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, HEADS, tokens, HEAD_DIM, generator=generator).to(dtype)


@contextmanager
def gathered(kind: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Iterator[Batch]:
    """A batch of rows of 1 to GATHERED tokens, in a pool that is found sound at the end."""
    layout = KVLayout(LAYERS, HEADS, HEAD_DIM, WINDOW, dtype)
    with loops_of(kind), KVPool(layout, 2 * ROWS) as pool:
        for row in range(ROWS):
            shape = (2 * LAYERS, 1, HEADS, GATHERED - row, HEAD_DIM)
            pool.put(row, KeysValues.from_packed(torch.full(shape, row + 1.0, dtype=dtype)))
        with pool.gather(list(range(ROWS)), **arguments) as batch:
            yield batch
        pool.check_integrity()


class Seen(NamedTuple):
    """What an append did, in whatever form."""

    result: object
    data: list[int]
    ends: list[int]


def of_view(view: Tensor, batch: Batch) -> object:
    offset = view.storage_offset() - batch.data.storage_offset()
    shares = view.untyped_storage().data_ptr() == batch.data.untyped_storage().data_ptr()
    return tuple(view.shape), view.stride(), offset, shares, view.requires_grad, view.is_inference(), type(view)


def seen_of(batch: Batch, act: Callable[[Batch], object]) -> Seen:
    result: object
    try:
        result = act(batch)
    except Exception as error:
        # Addresses are of this run alone.
        result = type(error), re.sub(r"0x\w+", "", str(error))
    if isinstance(result, tuple) and isinstance(result[0], Tensor):
        result = [of_view(view, batch) for view in result]
    data = batch.data.detach()[:, :, :, : max(batch._ends)]
    return Seen(result, bits(data).flatten().tolist(), list(batch._ends))


def assert_alike(act: Callable[[Batch], object], dtype: torch.dtype = torch.float32, **arguments: Any) -> Seen:
    """`act` does the same in each kind of loops; returns what that is."""
    seen = []
    for kind in LOOPS:
        with gathered(kind, dtype, **arguments) as batch:
            seen.append(seen_of(batch, act))
    assert all(one == seen[0] for one in seen)
    return seen[0]


def appended(make_keys: Make, make_values: Make, dtype: torch.dtype, layer: int = 1) -> Callable[[Batch], object]:
    keys, values = make_keys(new_tokens(2, dtype, 1)), make_values(new_tokens(2, dtype, 2))
    return lambda batch: batch.append(layer, keys, values)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = {**AT_ONCE, **BY_TORCH}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_copied_whatever_their_memory_is_like(kind: str, dtype: torch.dtype) -> None:
    plain = AT_ONCE["contiguous"]
    for makes in ((KINDS[kind], plain), (plain, KINDS[kind]), (KINDS[kind], KINDS[kind])):
        seen = assert_alike(appended(*makes, dtype), dtype)
        assert isinstance(seen.result, list)
        assert seen.ends == [GATHERED, GATHERED + 2]


@pytest.mark.parametrize("kind", AT_ONCE)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_they_are_what_the_caller_gave(kind: str, layer: int) -> None:
    keys, values = AT_ONCE[kind](new_tokens(seed=1)), AT_ONCE[kind](new_tokens(seed=2))
    for loops in LOOPS:
        with gathered(loops) as batch:
            before = batch.data.clone()
            all_keys, all_values = batch.append(layer, keys, values)
            assert torch.equal(all_keys[:, :, GATHERED:], keys)
            assert torch.equal(all_values[:, :, GATHERED:], values)
            columns = slice(GATHERED, GATHERED + 2)
            before[layer, :, :, columns], before[LAYERS + layer, :, :, columns] = keys.detach(), values.detach()
            assert torch.equal(bits(batch.data), bits(before))
            assert [keys.requires_grad, all_keys.requires_grad] == [kind in ("with a gradient", "of a graph"), False]


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_torch_copies_only_what_compiled_code_cannot(kind: str) -> None:
    with gathered("compiled") as batch:
        act = appended(KINDS[kind], KINDS[kind], torch.float32)
        with OperatorCalls() as calls:
            act(batch)
    assert [name for name in calls.names if "copy_" in name] == ["aten.copy_.default"] * (2 if kind in BY_TORCH else 0)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_alike_and_leaves_the_batch_as_it_was(kind: str) -> None:
    plain = AT_ONCE["contiguous"]
    untouched = assert_alike(lambda batch: None)
    for makes in ((REFUSED[kind], plain), (plain, REFUSED[kind]), (REFUSED[kind], REFUSED["another dtype"])):
        seen = assert_alike(appended(*makes, torch.float32))
        assert seen[1:] == untouched[1:], seen.result
        assert isinstance(seen.result, tuple), "an error"


@pytest.mark.parametrize("layer", [-1, LAYERS, 2**70, True, 1.0, "0", None])
def test_a_layer_that_is_none_is_refused_alike(layer: Any) -> None:
    untouched = assert_alike(lambda batch: None)
    seen = assert_alike(appended(AT_ONCE["contiguous"], AT_ONCE["contiguous"], torch.float32, layer))
    assert seen[1:] == untouched[1:]
    assert isinstance(seen.result, tuple)
    assert seen.result[1].startswith("layer must be ")


def test_numbers_of_numpy_name_layers() -> None:
    layer = torch.ones(1, dtype=torch.int64).numpy()[0]
    plain = AT_ONCE["contiguous"]
    assert assert_alike(appended(plain, plain, torch.float32, layer)).ends == [GATHERED, GATHERED + 2]


STACKED: dict[str, Make] = {
    "contiguous": lambda new: new.clone(),
    "layers inside": lambda new: new.permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4),
    "heads inside": lambda new: new.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda new: new[:1].expand_as(new),
    "every other number": strided_by(2, 4),
    "another dtype": lambda new: new.double(),
    "fewer layers": lambda new: new[1:],
    "of one layer": lambda new: new[0],
    "too many tokens": lambda new: torch.cat([new] * 9, 3),
}


@pytest.mark.parametrize("kind", STACKED)
def test_tokens_of_all_layers_are_copied_alike(kind: str) -> None:
    keys = STACKED[kind](torch.stack([new_tokens(seed=layer) for layer in range(LAYERS)]))
    values = STACKED[kind](torch.stack([new_tokens(seed=10 + layer) for layer in range(LAYERS)]))
    seen = assert_alike(lambda batch: batch.append_layers(keys, values))
    if isinstance(seen.result, list):
        assert seen.ends == [GATHERED + 2] * LAYERS
        for loops in LOOPS:
            with gathered(loops) as batch:
                all_keys, all_values = batch.append_layers(keys, values)
                assert torch.equal(all_keys[:, :, :, GATHERED:], keys)
                assert torch.equal(all_values[:, :, :, GATHERED:], values)
    else:
        assert kind in ("another dtype", "fewer layers", "of one layer", "too many tokens")


def in_steps(batch: Batch) -> object:
    for tokens in (1, 2, 1):
        for layer in (1, 0):
            batch.append(layer, new_tokens(tokens, seed=layer), new_tokens(tokens, seed=layer + 10))
    return batch.append_layers(*[torch.stack([new_tokens(1, seed=seed)] * LAYERS) for seed in (3, 4)])


def test_many_appends_follow_each_other() -> None:
    assert assert_alike(in_steps).ends == [GATHERED + 5] * LAYERS


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_append_returns_all_that_the_layer_has(order: tuple[int, int]) -> None:
    for loops in LOOPS:
        with gathered(loops) as batch:
            expected = [part.clone() for part in batch.data[:, :, :, :GATHERED].unbind(0)]
            for tokens in (1, 3, 1):
                for layer in order:
                    keys, values = new_tokens(tokens, seed=layer), new_tokens(tokens, seed=layer + 10)
                    seen = batch.append(layer, keys, values)
                    for part, new, found in zip((layer, LAYERS + layer), (keys, values), seen, strict=True):
                        expected[part] = torch.cat([expected[part], new], 2)
                        assert torch.equal(found, expected[part])
                    for found, again in zip(seen, batch.layer(layer), strict=True):
                        assert torch.equal(found, again)


@pytest.mark.parametrize("tokens", [0, 5, 6])
def test_any_number_of_tokens_that_there_is_room_for_is_taken(tokens: int) -> None:
    new = new_tokens(tokens)
    seen = assert_alike(lambda batch: batch.append(0, new, new))
    assert seen.ends == [GATHERED + (tokens if tokens < 6 else 0), GATHERED]


def test_tokens_may_come_from_the_batch_itself() -> None:
    def act(batch: Batch) -> object:
        keys, values = batch.layer(0)
        return batch.append(1, keys[:, :, :2], values[:, :, 1:3])

    assert_alike(act)
    assert_alike(lambda batch: batch.append(0, batch.data[0, :, :, 3:5], batch.data[1, :, :, 4:6]))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
@pytest.mark.parametrize("of_out", [torch.inference_mode, nullcontext])
def test_whatever_mode_the_thread_and_the_buffer_are_in(mode: Callable[[], Any], of_out: Callable[[], Any]) -> None:
    new = new_tokens().requires_grad_()

    def act(batch: Batch) -> object:
        with mode():
            return batch.append(0, new, new)

    for loops in LOOPS:
        with of_out():
            out = torch.zeros(2 * LAYERS, ROWS, HEADS, WINDOW, HEAD_DIM)
        with gathered(loops, out=out) as batch:
            seen = seen_of(batch, act)
            assert isinstance(seen.result, list)
            assert torch.equal(batch.data[0, :, :, GATHERED : GATHERED + 2], new.detach())
            assert not batch.data.requires_grad
            with gathered("torch", out=out.clone()) as other:
                assert seen_of(other, act)[1:] == seen[1:]


def test_what_was_saved_for_a_gradient_is_known_to_have_changed() -> None:
    weight = torch.ones(1, requires_grad=True)
    for loops in LOOPS:
        with gathered(loops) as batch:
            product = (batch.data * weight).sum()
            batch.append(0, new_tokens(), new_tokens())
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()  # type: ignore[no-untyped-call]


def test_tangents_are_copied_alike() -> None:
    tangent = new_tokens(seed=3)
    for loops in LOOPS:
        with gathered(loops) as batch, forward_ad.dual_level():
            keys, _ = batch.append(0, forward_ad.make_dual(new_tokens(), tangent), new_tokens())  # type: ignore[no-untyped-call]
            found = forward_ad.unpack_dual(keys).tangent  # type: ignore[no-untyped-call]
            assert found is not None
            assert torch.equal(found[:, :, GATHERED:], tangent)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda act: torch.func.vmap(act, out_dims=None)])
def test_what_a_transform_wraps_is_left_to_torch(transform: Callable[[Any], Any]) -> None:
    def act(batch: Batch) -> object:
        def inner(new: Tensor) -> Tensor:
            keys, _ = batch.append(0, new, new)
            return keys.sum()

        return float(transform(inner)(new_tokens()).sum())

    assert_alike(act)


def test_a_buffer_that_its_user_gave_other_memory_is_left_to_torch() -> None:
    def act(batch: Batch) -> object:
        batch.append(0, new_tokens(), new_tokens())
        before = batch.data.clone()
        batch.data.set_(batch.data.clone())  # type: ignore[call-overload]
        batch.append(1, new_tokens(seed=5), new_tokens(seed=6))
        before[1, :, :, GATHERED : GATHERED + 2] = new_tokens(seed=5)
        before[3, :, :, GATHERED : GATHERED + 2] = new_tokens(seed=6)
        assert torch.equal(bits(batch.data), bits(before))
        return None

    assert_alike(act)


@pytest.mark.parametrize("first", [False, True], ids=["after an append", "before any"])
def test_a_buffer_that_its_user_turned_is_left_to_torch(first: bool) -> None:
    def act(batch: Batch) -> object:
        if not first:
            batch.append(0, new_tokens(), new_tokens())
        batch.data.set_(batch.data.transpose(1, 2).contiguous().transpose(1, 2))  # type: ignore[call-overload]
        before = batch.data.clone()
        batch.append(1, new_tokens(seed=5), new_tokens(seed=6))
        before[1, :, :, GATHERED : GATHERED + 2] = new_tokens(seed=5)
        before[3, :, :, GATHERED : GATHERED + 2] = new_tokens(seed=6)
        assert torch.equal(batch.data, before)
        return None

    assert_alike(act)


@needs_native
def test_a_buffer_of_a_subclass_is_left_to_torch() -> None:
    out = torch.zeros(2 * LAYERS, ROWS, HEADS, WINDOW, HEAD_DIM).as_subclass(Marked)
    new = new_tokens().as_subclass(Marked)
    with gathered("compiled", out=out) as batch, OperatorCalls() as calls:
        keys, _ = batch.append(0, new, new)
        assert torch.equal(keys[:, :, GATHERED:], new)
    assert len([name for name in calls.names if "copy_" in name]) == 2


@needs_native
def test_a_large_copy_is_left_to_torch_and_a_middling_one_lets_go_of_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVLayout(1, 8, 64, 64)
    with loops_of("compiled"), KVPool(layout, 64) as pool:
        for tokens, copies in ((1, 0), (8, 0), (32, 2)):  # 128 KiB, 1 MiB, 4 MiB
            with pool.gather(list(range(64))) as batch:
                keys, values = torch.randn(64, 8, tokens, 64), torch.randn(64, 8, tokens, 64)
                with OperatorCalls() as calls:
                    all_keys, all_values = batch.append(0, keys, values)
                assert len([name for name in calls.names if "copy_" in name]) == copies
                assert torch.equal(all_keys, keys)
                assert torch.equal(all_values, values)


@needs_native
def test_errors_of_attributes_reach_the_caller_unless_they_say_that_there_is_no_memory() -> None:
    class Strange:
        dtype = torch.float32
        is_cpu = True

        def data_ptr(self) -> int:
            return 0

        @property
        def shape(self) -> object:
            raise self.error

        error: Exception = KeyError("mine")

    strange: Any = Strange()
    memory = (strange, torch.float32, 0, 1, 1, 1, 2, 1, 4)
    assert native.append(memory, 0, 0, strange, strange) == 0  # without memory, nothing is asked
    strange.data_ptr = lambda: 8
    memory = (strange, torch.float32, 8, 1, 1, 1, 2, 1, 4)
    with pytest.raises(KeyError, match="mine"):
        native.append(memory, 0, 0, strange, strange)
    strange.is_cpu = False
    assert native.append(memory, 0, 0, strange, strange) == 0  # on another device, nothing more is asked
    strange.is_cpu, strange.error = True, RuntimeError("no memory")
    assert native.append(memory, 0, 0, strange, strange) == 0


def test_a_buffer_that_its_user_replaced_before_anything_was_appended_is_the_batches() -> None:
    with KVPool(KVLayout(LAYERS, HEADS, HEAD_DIM, WINDOW), 8) as pool:
        tokens, new = torch.randn(2 * LAYERS, 1, HEADS, GATHERED, HEAD_DIM), torch.randn(1, HEADS, 2, HEAD_DIM)
        pool.put(1, KeysValues.from_packed(tokens))
        batch = pool.gather([1])
        batch.data = batch.data.clone()
        for layer in range(LAYERS):
            keys, values = batch.append(layer, new, new + 1)
            assert torch.equal(keys[:, :, GATHERED:], new)
            assert torch.equal(values[:, :, GATHERED:], new + 1)
        pool.commit([2], batch)
        found = pool.get(2)
        assert found is not None
        assert torch.equal(found.keys[:, :, :, GATHERED:], new.expand(LAYERS, -1, -1, -1, -1))
        assert torch.equal(found.keys[:, :, :, :GATHERED], tokens[:LAYERS])
        pool.check_integrity()


def test_the_next_batch_knows_nothing_of_what_the_last_user_made_of_its_buffer() -> None:
    with KVPool(KVLayout(LAYERS, HEADS, HEAD_DIM, WINDOW), 8) as pool:
        tokens = torch.randn(2 * LAYERS, 1, HEADS, GATHERED, HEAD_DIM)
        pool.put(1, KeysValues.from_packed(tokens))
        for _ in range(2):
            with pool.gather([1]) as batch:
                assert torch.equal(batch.data[:, :, :, :GATHERED], tokens)
                batch.data = torch._neg_view(batch.data)


@pytest.mark.parametrize("way", ["another tensor", "another view of the same memory", "other memory"])
def test_a_commit_stores_what_its_user_gave_the_batch_after_the_appends(way: str) -> None:
    with KVPool(KVLayout(LAYERS, HEADS, HEAD_DIM, WINDOW), 8) as pool:
        pool.put(1, KeysValues.from_packed(torch.randn(2 * LAYERS, 1, HEADS, GATHERED, HEAD_DIM)))
        new = torch.randn(1, HEADS, 2, HEAD_DIM)
        batch = pool.gather([1])
        for layer in range(LAYERS):
            batch.append(layer, new, new)
        given, before = batch.data + 1, batch.data  # which keeps its memory, and what was appended
        if way == "another tensor":
            batch.data = given
        elif way == "another view of the same memory":
            batch.data = torch._neg_view(batch.data)
            given = -before
        else:
            before = before.clone()
            batch.data.set_(given)  # type: ignore[call-overload]
        pool.commit([2], batch)
        found = pool.get(2)
        assert found is not None
        assert torch.equal(found.keys[:, :, :, GATHERED:], given[:LAYERS, :, :, GATHERED : GATHERED + 2])
        assert torch.equal(before[:, :, :, GATHERED : GATHERED + 2], new.expand(2 * LAYERS, -1, -1, -1, -1))
        pool.check_integrity()
