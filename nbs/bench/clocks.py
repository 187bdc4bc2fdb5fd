"""Clocks of speed.py: jobs are timed in turn, so that what else the machine does hits all of them alike."""

import statistics
import time


def seconds_of(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(functions, rounds, warm=1) -> tuple:
    "Seconds of each function (by name), median over rounds in turn; and each round's seconds."
    for function in list(functions.values()) * warm:
        function()
    found = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(seconds_of(function))
    return {name: statistics.median(values) for name, values in found.items()}, found
