"""Keys made from states."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ..device.tensor_checks import address_of, check_tensor
from ..errors import InvalidArgumentError, shown
from ..native import native

__all__ = ["State", "hash_state", "hash_states"]

# Types whose memory is read as it is.
CAST = frozenset("?bBhHiIlLqQfd")
PLAIN = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32, torch.int64))

State = npt.NDArray[Any] | np.generic | torch.Tensor


@overload
def hash_state(state: State, *, form: Literal["int"] = "int") -> int: ...
@overload
def hash_state(state: State, *, form: Literal["hex"]) -> str: ...
def hash_state(state: State, *, form: Literal["int", "hex"] = "int") -> int | str:
    """Return the xxh64 hash of a state's bytes in C order, as LightZero's `hash_state` does.

    `form="hex"` agrees with LightZero 0.2.0, `xxhash.xxh64(state.tobytes()).hexdigest()`, and `form="int"` with its
    main branch, `.intdigest()` of the same. A tensor hashes like the array of the same bytes. Contiguous data is read
    in place, other data through a contiguous copy. A tensor on an accelerator is copied to the host: the caller waits
    for the work queued before that on the current stream.

    What this legacy hash does not tell apart, a key has to: shape and dtype are not part of it, nor are the state's
    position, its history and the weights it was computed with. Conversely, 0.0 and -0.0 are equal and hash differently,
    as do two latents that differ by the rounding of another batch size.

    Raises:
        InvalidArgumentError: a `state` that is neither a numpy array or scalar of plain values nor a dense torch tensor
            with data, or a `form` that is neither "int" nor "hex".
    """
    if form not in ("int", "hex"):
        raise InvalidArgumentError(f"form must be 'int' or 'hex', got {shown(form)}")
    digest = xxhash.xxh64(_bytes_of(state))
    return digest.intdigest() if form == "int" else digest.hexdigest()


def hash_states(states: State) -> list[str]:
    """`hash_state(states[row], form="hex")` of every row of a batch `[rows, ...]`, in order.

    A tensor on an accelerator is copied to the host once for all rows.

    Raises:
        InvalidArgumentError: as `hash_state`, or a batch without rows.
    """
    if isinstance(states, torch.Tensor):
        check_tensor("states", states)  # first of all: a nested one has no shape
    shape = states.shape if isinstance(states, (torch.Tensor, np.ndarray)) else ()
    rows = shape[0] if shape else 0
    if not rows:
        raise InvalidArgumentError(f"states must be an array or tensor with at least one row, got {shown(states)}")
    if native is not None:
        address = _address_of(states) if type(states) is torch.Tensor else 0
        if address:
            return native.hash_memory(address, rows, states.nbytes // rows)  # type: ignore[no-any-return]
        return native.hash_rows(states if _is_castable(states) else _bytes_of(states), rows)  # type: ignore[no-any-return]
    array: Any = states
    if isinstance(states, torch.Tensor):
        try:
            array = (states.detach() if states.requires_grad else states).numpy()
        except (RuntimeError, TypeError):
            array = None  # on an accelerator, of a dtype that arrays lack, lazily conjugated, or not dense
    castable = _is_castable(array) and array.size and array.dtype.isnative
    data = memoryview(array).cast("B") if castable else memoryview(_bytes_of(states))
    size, digest = len(data) // rows, xxhash.xxh64_hexdigest
    return [digest(data[row * size : (row + 1) * size]) for row in range(rows)]


def _is_castable(array: Any) -> bool:
    """Whether an array's memory is its bytes in C order. Subclasses keep their own idea of their bytes."""
    return type(array) is np.ndarray and array.dtype.char in CAST and array.flags.c_contiguous


def _address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie, row by row; 0 if they do not lie in host memory like that."""
    plain = tensor.is_cpu and tensor.layout is torch.strided and tensor.dtype in PLAIN
    return address_of(tensor) if plain and tensor.is_contiguous() else 0


def _bytes_of(state: State) -> bytes | memoryview:
    if isinstance(state, torch.Tensor):
        return _tensor_bytes(state)
    if not isinstance(state, np.ndarray | np.generic):
        raise InvalidArgumentError(
            f"state must be a numpy array or a torch tensor, got {type(state).__name__}; numpy.asarray(state) makes one"
        )
    if state.dtype.hasobject:
        # Its bytes are addresses: equal states would differ, and other states take their place.
        raise InvalidArgumentError(f"state must hold plain values, got dtype {state.dtype}")
    # Subclasses keep their own idea of their bytes: a masked array fills in what is masked.
    if type(state) is np.ndarray and state.flags.c_contiguous:
        return state.reshape(-1).view(np.uint8).data
    return state.tobytes()


def _tensor_bytes(state: torch.Tensor) -> memoryview:
    check_tensor("state", state)
    if state.is_meta:
        raise InvalidArgumentError("state must be a dense tensor with data, got one on the meta device, which has none")
    # A conjugate or negative view is a flag over bytes that are not its own. bfloat16 exists in no array: bytes do.
    plain = state.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not plain.numel():
        return memoryview(b"")  # its strides may be anything, which a view of its bytes would not take
    # Not reshape(-1): where there is one element, that keeps a stride which a view of its bytes would not take either.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data
