"""Captures a call into a CUDA graph, to time its kernels without the launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Captured(Generic[Result]):
    """A replayable graph and the result tensors that each replay writes."""

    graph: torch.cuda.CUDAGraph
    result: Result


def capture(call: Callable[[], Result]) -> Captured[Result] | str:
    """The graph, or the reason why there is none; the current stream is what it was before.

    A host synchronisation is looked for first: one inside a capture would upset later captures.
    `call` and its leaves are used on one side stream alone: a leaf that another stream has used may
    have its gradient's node there, and the backward pass would wait for that stream.
    """
    torch.cuda.synchronize()
    before = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            call()
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A backward pass runs in a thread of its own; what other threads do concerns no capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = call()
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own as the current one
        torch.cuda.synchronize()
        # It also leaves the generator waiting for the capture's end; its clone knows of none.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        return f"no CUDA graph: {str(error).splitlines()[0]}"
    return Captured(graph, result)
