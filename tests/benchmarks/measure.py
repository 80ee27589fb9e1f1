"""How the benchmarks measure: two ways in turn, an interval, the machine."""
import os
import platform
import random
import re
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("rlworkbench", "torch", "transformers", "accelerate", "peft", "trl", "captum", "gradio", "numpy", "pandas")


def interval(ratios, draws=4000) -> tuple:
    "Bootstrap: 95 % of the medians of as many ratios drawn with replacement."
    stream = random.Random(0)
    medians = sorted(statistics.median(stream.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(.025 * draws)], medians[int(.975 * draws) - 1]


def in_turn(first, second, repeats=5) -> dict:
    "CPU and wall seconds of two functions, run A B B A ...; medians, and the median of the pairwise ratios second/first with its interval."
    times, walls = {first: [], second: []}, {first: [], second: []}
    first(), second()
    for k in range(repeats):
        for f in (first, second) if k % 2 == 0 else (second, first):
            start, wall = time.process_time(), time.perf_counter()
            f()
            times[f].append(time.process_time() - start)
            walls[f].append(time.perf_counter() - wall)
    ratios = sorted(b / a for a, b in zip(times[first], times[second]))
    low, high = interval(ratios)
    return {"ours": statistics.median(times[first]), "other": statistics.median(times[second]), "ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high,
            "ratio_min": ratios[0], "ratio_max": ratios[-1], "wall_ours": statistics.median(walls[first]), "wall_other": statistics.median(walls[second]), "repeats": repeats}


def machine() -> dict:
    "The processor by its name, cores, memory."
    told = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", told.read_text()) if told.is_file() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"processor": named[1].strip() if named else platform.processor() or platform.machine(), "cores": os.cpu_count(), "gigabytes": round(memory / 2**30, 1), "system": platform.system()}


def versions() -> dict:
    "What was measured, and with what."
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def peak(pid="self") -> float:
    "Megabytes that a process held at most. Not getrusage: there a process begins with what its parent held."
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
