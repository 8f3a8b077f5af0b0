"""Operators on a simulated device: enqueued with the memory they name, not with the tensors, and run late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import greenlet  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .memory import Memory, SimTensor
from .queues import Queues, SimStream

__all__ = ["CPU", "SimGPU"]

CPU = torch.device("cpu")
KIND = "maia"  # a device type that torch can name and that nobody has
aten = torch.ops.aten


class SimGPU(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Devices under torch: entered by every thread that works on them.

    Args:
        devices: how many.
        streams: of each device; the first is the one that is current unless another is made so.

    Attributes:
        faults: what went wrong on the device itself, an index out of range for example.
    """

    def __init__(self, devices: int = 1, streams: int = 5) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.queues = Queues(devices, streams)
        self.memory = Memory(self.queues)
        self.devices = [torch.device(KIND, number) for number in range(devices)]
        self.faults: list[str] = []
        # Of each host thread, and of each of the explorer's tasks. Tasks of an event loop share it, as they do CUDA's.
        self._current: WeakKeyDictionary[Any, dict[int, SimStream]] = WeakKeyDictionary()

    # Streams -------------------------------------------------------------------------------------------------------

    def stream(self, number: int, device: int = 0) -> SimStream:
        """One of a device's own streams."""
        return next(
            stream
            for stream in self.queues.streams
            if stream.lasting and (stream.device, stream.handle) == (device, number)
        )

    def current(self, device: int = 0) -> SimStream:
        """The calling thread's current stream on a device."""
        return self._current.get(greenlet.getcurrent(), {}).get(device) or self.stream(0, device)

    @contextmanager
    def use(self, *streams: SimStream) -> Iterator[None]:
        """Make streams the calling thread's current ones, each on its device."""
        thread = greenlet.getcurrent()
        before = self._current.get(thread, {})
        self._current[thread] = {**before, **{stream.device: stream for stream in streams}}
        try:
            yield
        finally:
            self._current[thread] = before

    def currents(self) -> tuple[SimStream, ...]:
        """The calling thread's current streams."""
        return tuple(self.current(device.index) for device in self.devices)

    # Memory --------------------------------------------------------------------------------------------------------

    def read(self, tensor: Tensor) -> Tensor:
        """What is in a tensor now, whatever is still to run; for checks."""
        return self.memory.seen_by_device(tensor).clone()

    def protect(self, tensor: Tensor, stream: SimStream) -> None:
        """Tell the allocator of a stream that uses a tensor (torch's `record_stream`)."""
        allocation = self.memory.of(tensor)
        if allocation is not None and allocation.stream is not None:
            allocation.told.add(stream)

    def pinned(self, tensor: Tensor, *, torchs: bool = True) -> SimTensor:
        """A copy in pinned memory of the host: of torch's allocator, or of another one, which is told of no copies."""
        copy = self.memory.new(tensor.shape, tensor.dtype, CPU, None)
        self.memory.seen_by_device(copy).copy_(tensor)
        allocation = self.memory.of(copy)
        assert allocation is not None
        allocation.is_torchs = torchs
        return copy

    # Operators -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors((args, kwargs))
        where = next((tensor.home for tensor in tensors if self._is_on_device(tensor)), None)
        if func is aten.is_pinned.default:
            return self.memory.of(args[0]) is not None and not self._is_on_device(args[0])
        if func is aten._pin_memory.default:
            return self.pinned(args[0])
        if func is aten._to_copy.default:
            return self._to_copy(args[0], **kwargs)
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == KIND:
            return self._make(func, args, kwargs)
        if kwargs.get("pin_memory"):
            made = func(*args, **{**kwargs, "pin_memory": None})
            return self.memory.new(made.shape, made.dtype, CPU, None)
        if where is None:
            return self._on_host(func, args, kwargs)
        if func.is_view or func is aten.detach.default:
            return self._view(func, args, kwargs, where)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            self.queues.drain(self.current(where.index))  # the host waits
            return func(*self._seen(args), **self._seen(kwargs))
        return self._launch(func, args, kwargs, where)

    def _is_on_device(self, tensor: Tensor) -> bool:
        return isinstance(tensor, SimTensor) and tensor.home.type == KIND

    def _seen(self, tree: Any) -> Any:
        return _each_tensor(self.memory.seen_by_device, tree)

    def _view(self, func: Any, args: Any, kwargs: Any, where: torch.device) -> Any:
        with no_dispatch():
            views = func(*args, **kwargs)
        return _each_tensor(lambda view: self.memory.wrap(view, where), views)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on memory of the host, pinned or not: done at once."""
        pinned = [tensor for tensor in _tensors((args, kwargs)) if self.memory.of(tensor) is not None]
        if not pinned:
            return func(*args, **kwargs)
        if func.is_view or func is aten.detach.default:
            return self._view(func, args, kwargs, CPU)
        done = func(*self._seen(args), **self._seen(kwargs))
        written = _written(func, args, kwargs)
        return written[0] if written else done

    def _make(self, func: Any, args: Any, kwargs: Any) -> SimTensor:
        """A tensor made on a device; if it is filled, then late."""
        where = torch.device(kwargs["device"])
        template = func(*args, **{**kwargs, "device": CPU, "pin_memory": None})
        made = self.memory.new(template.shape, template.dtype, where, self.current(where.index))
        allocation, target = self.memory.of(made), self.memory.seen_by_device(made)
        assert allocation is not None
        if func.overloadpacket in (aten.empty, aten.empty_strided, aten.empty_like):
            self._enqueue(where, "is given used memory", allocation.spoil)
        else:
            self._enqueue(where, f"fills with {func.overloadpacket.__name__}", lambda: target.copy_(template))
        return made

    def _launch(self, func: Any, args: Any, kwargs: Any, where: torch.device) -> Any:
        """An operator that runs late, in the device's current stream."""
        for tensor in _tensors((args, kwargs)):
            if tensor.dim() and self.memory.of(tensor) is None:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {tensor.device}")
            if self._is_on_device(tensor) and tensor.device != where:
                raise RuntimeError(f"{func}: expected all tensors on {where}, got {tensor.device}")
        name = func.overloadpacket.__name__
        late_args, late_kwargs = self._seen(args), self._seen(kwargs)
        written = _written(func, args, kwargs)
        if written:
            self._enqueue(where, name, lambda: func(*late_args, **late_kwargs))
            return written[0]
        template = func(*_meta(args), **_meta(kwargs))
        made = self.memory.new(template.shape, template.dtype, where, self.current(where.index))
        target = self.memory.seen_by_device(made)
        self._enqueue(where, name, lambda: target.copy_(func(*late_args, **late_kwargs)))
        return made

    def _enqueue(self, where: torch.device, what: str, run: Callable[[], object]) -> None:
        def on_device() -> None:
            try:
                with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                    run()
            except Exception as error:
                self.faults.append(f"{what}: {type(error).__name__}: {error}")

        self.queues.enqueue(self.current(where.index), what, on_device)

    # Copies between devices ------------------------------------------------------------------------------------------

    def _to_copy(
        self, source: Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **ignored: Any
    ) -> Tensor:
        where = torch.device(device) if device is not None else source.device
        dtype = dtype or source.dtype
        if where.type == KIND:
            made: Tensor = self.memory.new(source.shape, dtype, where, self.current(where.index))
        else:
            made = torch.empty(source.shape, dtype=dtype, device=where)
        return self._copy(made, source, non_blocking)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        to_device, from_device = self._is_on_device(target), self._is_on_device(source)
        late_target, late_source = self.memory.seen_by_device(target), self.memory.seen_by_device(source)
        if not to_device and not from_device:
            late_target.copy_(late_source)
            return target
        pinned = next((t for t in (target, source) if not self._is_on_device(t) and self.memory.of(t)), None)
        if not from_device and pinned is None:
            late_source = late_source.clone()  # ordinary memory is read before the call returns
        where = source.device if from_device else target.device
        stream = self.current(where.index)
        if to_device and from_device and source.device != target.device:
            # In the source's current stream; the target's current stream is before it and after it.
            self._order(self.current(target.device.index), stream)
            self._enqueue(where, "copies to another device", lambda: late_target.copy_(late_source))
            self._order(stream, self.current(target.device.index))
            return target
        self._enqueue(where, "copies", lambda: late_target.copy_(late_source))
        if pinned is not None:
            allocation = self.memory.of(pinned)
            assert allocation is not None
            if allocation.is_torchs:
                allocation.told.add(stream)
        if not to_device and (pinned is None or not non_blocking):
            self.queues.drain(stream)
        return target

    def _order(self, earlier: SimStream, later: SimStream) -> None:
        """Let later work of one stream come after the work of another one so far."""
        reached: list[bool] = []
        self.queues.pass_by(earlier, lambda: reached.append(True))
        self.queues.hold(later, lambda: bool(reached))


def _each_tensor(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Arguments or results of an operator, with every tensor in them changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_each_tensor(change, item) for item in tree)
    if isinstance(tree, dict):
        return {name: _each_tensor(change, item) for name, item in tree.items()}
    return tree


def _tensors(tree: Any) -> list[Any]:
    found: list[Any] = []
    _each_tensor(found.append, tree)
    return found


def _meta(tree: Any) -> Any:
    return _each_tensor(lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta"), tree)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to, and returns."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if value is not None:
                found.append(value)
    return found
