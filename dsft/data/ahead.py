"""The next step's batches, made while the device works on this one's."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch

from dsft.types import Batch

Item = TypeVar("Item")
_END = object()


class Shipping:
    """Brings batches to a device without anybody waiting for it.

    On CUDA a batch is copied from pinned memory on a stream of its own. The stream that computes is made to wait for
    the copy, and the memory is not used again before that stream has passed, as two streams share it.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batches: list[Batch]) -> tuple[list[Batch], torch.cuda.Event | None]:
        """Begin the copies; from any thread. What comes back is for `receive`."""
        if self._stream is None:
            return [batch.to(self._device) for batch in batches], None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pinned = [
                replace(batch, tensors={name: tensor.pin_memory() for name, tensor in batch.tensors.items()})
                for batch in batches
            ]
            return [batch.to(self._device) for batch in pinned], self._stream.record_event()

    def receive(self, sent: tuple[list[Batch], torch.cuda.Event | None]) -> list[Batch]:
        """The batches, for the stream that is current in this thread."""
        batches, arrival = sent
        if arrival is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrival)
            for batch in batches:
                for tensor in batch.tensors.values():
                    tensor.record_stream(current)
        return batches


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items, each made in a thread of its own while the one before it is in use.

    An exception is raised when its item's turn comes, with its traceback. The thread ends with the iteration: after
    the last item, or when the iterator is closed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="dsft-ahead") as thread:
        coming: Future[Any] = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item
