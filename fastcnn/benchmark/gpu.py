"""Time on a GPU: kernels by CUDA graphs and events, the host's cost of launching them apart."""

from __future__ import annotations

import statistics
import time

import torch

from fastcnn.benchmark.race import Entrant

WARM_UP = 3
HOST_ROUNDS = 10


class GpuClock:
    """Times a CUDA graph of a call per input set: what the kernels take, whatever the host does meanwhile."""

    device = "cuda"

    def __init__(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def prepare(self, entrant: Entrant) -> None:
        """Warms up on a side stream, as capture wants it, measures eager calls, then captures."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                entrant.entry.run(*entrant.next_set())
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        entrant.extra |= self._eager(entrant)
        self._graphs[id(entrant)] = self._capture(entrant)
        self.lap(entrant)

    def _eager(self, entrant: Entrant) -> dict:
        """Seconds of an eager call: until the host has launched it, and until the GPU has finished it."""
        host, total = [], []
        for _ in range(HOST_ROUNDS):
            args = entrant.next_set()
            torch.cuda.synchronize()
            start = time.perf_counter()
            entrant.entry.run(*args)
            host.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            total.append(time.perf_counter() - start)
        return {"host": statistics.median(host), "eager": statistics.median(total)}

    def _capture(self, entrant: Entrant) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for args in entrant.sets:
                    entrant.entry.run(*args)
        except RuntimeError as error:
            torch.cuda.synchronize()
            entrant.extra["graph"] = f"not captured: {str(error).splitlines()[0][:120]}"
            return None
        return graph

    def lap(self, entrant: Entrant) -> list[float]:
        """A turn: one replay (or one eager call per input set), its time divided by the calls in it."""
        graph = self._graphs[id(entrant)]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if graph is not None:
            graph.replay()
        else:
            for args in entrant.sets:
                entrant.entry.run(*args)
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3 / len(entrant.sets)]
