"""A worker's device, which its threads share: one computes, while the others encode and commit."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


class Device:
    """A device with a lock, and a clock for each thread."""

    def __init__(self, device: torch.device, threads: int):
        self.torch, self._threads = device, threads
        self._lock = threading.Lock()
        self._clock = threading.local()

    def reset(self) -> None:
        """Set the clock of this thread to zero."""
        self._clock.seconds, self._clock.spans = Counter[str](), []

    @contextmanager
    def computing(self, stage: str) -> Iterator[None]:
        """Have the device for a stage. On a GPU the work may go on after the end: it is in a queue there."""
        with self._lock:
            # thread-local in torch, and a task may run on any thread
            torch.set_num_threads(self._threads)
            if not hasattr(self._clock, "spans"):
                self.reset()
            if self.torch.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._clock.spans.append((stage, start, end))
                start.record()
                try:
                    yield
                finally:
                    end.record()
            else:
                started = time.monotonic()
                yield
                self._clock.seconds[stage] += time.monotonic() - started

    @contextmanager
    def trying(self, share: float) -> Iterator[None]:
        """Find out what fits: with this share of the device's memory at most, and nothing compiled for it."""
        if self.torch.type != "cuda":
            yield
            return
        device = torch.cuda.current_device()  # it does not take one that has no number
        torch.cuda.set_per_process_memory_fraction(share, device)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            self.release()

    def release(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self) -> Mapping[str, float]:
        """What the device worked for each stage of this thread since its clock was reset."""
        for stage, start, end in self._clock.spans:
            end.synchronize()
            self._clock.seconds[stage] += start.elapsed_time(end) / 1000
        self._clock.spans.clear()
        return self._clock.seconds


class Returning:
    """Tensors on their way from the device to the CPU.

    On a GPU they have a stream of their own: what is put into the queue after them does not hold them up.
    """

    def __init__(self, *tensors: Tensor):
        self._done: torch.cuda.Event | None = None
        if all(tensor.device.type != "cuda" for tensor in tensors):
            self._there = tensors
            return
        device = tensors[0].device
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._there = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            self._done = torch.cuda.Event()
            self._done.record(stream)
        for tensor in tensors:  # its memory may be given to others when both streams are through with it
            if tensor.device.type == "cuda":
                tensor.record_stream(stream)

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return self._there


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
