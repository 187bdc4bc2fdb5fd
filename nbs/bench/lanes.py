"""Streams of a GPU on which several models train side by side, and CUDA graphs.

A job enqueues its steps on a lane of its own. The scheduler goes round the jobs, so that each is always a bounded
number of steps ahead of the card. On a CPU there are neither streams nor graphs, and the same code runs in turn.
"""

import collections
import gc
import math
import time
import traceback
from contextlib import nullcontext

import torch

WAIT = "wait"  # what a job yields when it has enqueued nothing


def do_nothing():
    pass


class Lane:
    "A stream with a bounded number of steps in flight; on a CPU nothing but a name."

    def __init__(self, device, depth=48, priority=0):
        self.stream = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None
        self.depth = depth
        self.events = collections.deque()

    def use(self):
        "A context in which the stream is the current one."
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def mark(self):
        "A step was enqueued."
        if self.stream is None:
            return
        event = torch.cuda.Event()
        event.record(self.stream)
        self.events.append(event)

    def _forget_what_has_ended(self):
        while self.events and self.events[0].query():
            self.events.popleft()

    def is_ready(self) -> bool:
        "Whether another step may be enqueued."
        self._forget_what_has_ended()
        return len(self.events) < self.depth

    def is_idle(self) -> bool:
        "Whether all steps have ended."
        self._forget_what_has_ended()
        return not self.events


def capture(function, pool=None):
    "A function that replays what `function` launches on the current stream."
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(*([pool] if pool else []), capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    finally:
        if collects:
            gc.enable()
    return graph.replay


class Scheduler:
    """Runs jobs side by side, each as far ahead of the card as its lane allows.

    A job has a `name`, a `lane`, a `rank` (the lower begins first), a `kind` of which `most` run at once, names of the
    jobs that it `needs`, a `run` that yields after each step it has enqueued (or `WAIT`), and a `word` about its end.
    """

    def __init__(self, until=math.inf, say=print, tick=do_nothing):
        self.until, self.say, self.tick = until, say, tick
        self.live, self.waiting, self.failed, self.done = [], [], {}, {}
        self.started = time.perf_counter()

    def add(self, job):
        self.waiting.append(job)

    def has_what_it_needs(self, job) -> bool:
        return all(name in self.done for name in job.needs)

    def begin_jobs(self):
        "Begin the jobs that may begin."
        for job in sorted(self.waiting, key=lambda job: job.rank):
            busy = sum(other.kind == job.kind for other in self.live)
            if busy < job.most and self.has_what_it_needs(job):
                self.waiting.remove(job)
                job.began, job.steps = time.perf_counter(), job.run()
                self.live.append(job)

    def advance(self, job) -> bool:
        "One step of a job; whether there was anything to do."
        if not job.lane.is_ready():
            return False
        with job.lane.use():
            try:
                if next(job.steps) == WAIT:
                    return False
                job.lane.mark()
            except StopIteration:
                self.end(job)
            except Exception as e:
                traceback.print_exc()
                self.drop(job, f"{type(e).__name__}: {str(e)[:300]}")
                self.say(f"FAILED {job.name}: {self.failed[job.name]}")
        return True

    def end(self, job):
        "A job has come to its end."
        self.live.remove(job)
        self.done[job.name] = seconds = time.perf_counter() - job.began
        self.say(f"{time.perf_counter() - self.started:6.1f} s  {job.name}: done in {seconds:.1f} s  {job.word}")

    def drop(self, job, why):
        "A job will not come to its end."
        self.live.remove(job)
        self.failed[job.name] = why

    def run(self):
        "Run all jobs, or those that fit into the time."
        while self.live or self.waiting:
            if time.perf_counter() > self.until:
                names = [job.name for job in self.live]
                self.say(f"time is over: {names} were running, {len(self.waiting)} not begun")
                return
            self.begin_jobs()
            self.tick()
            moved = [self.advance(job) for job in list(self.live)]
            if any(moved):
                continue
            if not self.live and not any(map(self.has_what_it_needs, self.waiting)):
                self.failed |= {job.name: "what it needs failed" for job in self.waiting}
                return
            time.sleep(2e-4)
