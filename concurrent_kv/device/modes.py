"""torch's modes of the calling thread: no gradients, and no inference tensors but the caller's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["plain_torch_state", "writing_to"]

AS_IT_IS = nullcontext()


def plain_torch_state(written: Tensor | None = None) -> AbstractContextManager[None]:
    """A context without gradients and without inference mode, whatever the caller's thread is in.

    A tensor made under inference mode cannot be written to outside of it: whether a pool works must not depend on which
    thread came first. Only where the caller's own tensor, `written`, was made that way is that mode entered.
    """
    inference = written is not None and written.is_inference()
    if inference != torch.is_inference_mode_enabled():
        return torch.inference_mode(inference) if inference else _normal_mode()
    return torch.no_grad() if torch.is_grad_enabled() else AS_IT_IS


def writing_to(buffer: Tensor) -> AbstractContextManager[None]:
    """A context in which a caller's tensors can be copied into `buffer`, which joins no graph of theirs."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return torch.inference_mode()
    return torch.no_grad() if torch.is_grad_enabled() else AS_IT_IS


@contextmanager
def _normal_mode() -> Iterator[None]:
    # Leaving inference mode turns gradients on again.
    with torch.inference_mode(False), torch.no_grad():
        yield
