"""A timeline of what each rank did when, as a trace for chrome://tracing or Perfetto."""

import contextlib
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

import process_group as pg
import profiling
from errors import UserError


class Timeline:
    """Spans of time with names; with no path it records nothing.

    On CUDA the host runs ahead of the device. There events in the device's stream say when a span
    began and ended. Ranks of one machine share a clock.
    """

    def __init__(self, path, device):
        self.path, self.on_cuda, self.spans = path, device.type == "cuda", []
        if path and self.on_cuda:
            torch.cuda.synchronize()  # so the next two lines are one moment on both clocks
        self.begun = time.perf_counter()
        self.zero = self.now() if path else None

    def now(self):
        """Seconds on a CPU; on CUDA an event, whose time is read at the end."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def span(self, name):
        with profiling.span(name):
            if not self.path:
                yield
                return
            start = self.now()
            yield
            self.spans.append((name, start, self.now()))

    def seconds(self, moment):
        """What `now` returned, in seconds on the clock of the machine."""
        return self.begun + self.zero.elapsed_time(moment) / 1e3 if self.on_cuda else moment

    def write(self, world):
        """Gather the spans of all ranks and write the file, if one is wanted; all must call it."""
        if not self.path:
            return
        if self.on_cuda:
            torch.cuda.synchronize()
        own = [(name, *map(self.seconds, span)) for name, *span in self.spans]
        ranks = [None] * world.size
        dist.all_gather_object(ranks, own)
        pg.from_first(world, lambda: self.write_spans(ranks))

    def write_spans(self, ranks):
        """Write the file from the spans of each rank; raises UserError."""
        first = min(start for spans in ranks for _, start, _ in spans)
        events = [
            # X: an event with a start and a duration, in microseconds; a row for each rank
            {"name": name, "ph": "X", "pid": 0, "tid": rank, "ts": (start - first) * 1e6,
             "dur": (end - start) * 1e6}
            for rank, spans in enumerate(ranks) for name, start, end in spans
        ]  # fmt: skip
        try:
            Path(self.path).write_text(json.dumps({"traceEvents": events}))
        except OSError as error:
            if Path(self.path).is_file():
                Path(self.path).unlink()
            raise UserError(f"--timeline {self.path}: {error.strerror}; it is lost") from None
