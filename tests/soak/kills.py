"""Soak of `sophia train --resume`: kill -9 at random moments, eager and compiled.

    python -m tests.soak.kills --kills 20

In each mode a run is trained undisturbed, and once more in a process that is killed `--kills` times, a third of them
while a checkpoint is being written, some while it starts. Both must end alike: weights, optimizer state, metrics,
everything but times, bit for bit. The compiled mode goes through the whole of torch.compile: it needs a C++ compiler.

Exits 1 if a claim fails.
"""

import argparse
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sophia import machine
from tests.train import kills, runs

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "soak-kills.json"
MODES = ("eager", "compiled")
# Steps between a resume and the next kill, at most; and what a kill may overshoot.
SPAN, SLACK = 12, 13
LONGEST_START = 8.0  # seconds
# Everything that has a state; one shape for training and evaluation, so that little must be compiled.
SETTINGS = {
    "optimizer": "sophia-g",
    "curvature-interval": 3,
    "curvature-chunks": 1,
    "curvature-rows": 6,
    "dropout": 0.1,
    "schedule": "wsd",
    "micro-batch": 6,
    "eval-windows": 6,
    "eval-interval": 7,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in each mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: with deterministic kernels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sophia-soak-") as name:
        folder = Path(name)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # compiled here, and for this
        data = runs.write_data(folder / "data", tokens=20_000, shard_tokens=4_000)
        modes = {mode: kill_run(folder / mode, data, mode, given) for mode in given.modes}
    result = {
        "soak": "kills",
        "machine": machine.describe(),
        "seed": given.seed,
        "device": given.device,
        "seconds": time.monotonic() - start,
        "settings": {**runs.SMALL, **SETTINGS},
        "modes": modes,
        "passed": all(mode["passed"] for mode in modes.values()),
    }
    machine.write_json(given.out, result)
    summary = {mode: {key: value for key, value in found.items() if key != "each"} for mode, found in modes.items()}
    print(json.dumps(summary, indent=2))
    return 0 if result["passed"] else 1


def kill_run(folder: Path, data: Path, mode: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train undisturbed and disturbed, and compare."""
    start, count = time.monotonic(), given.kills
    steps = count * (SPAN + SLACK) + 5
    place = {"device": given.device, "deterministic": given.device == "cuda" or None}
    flags = runs.arguments(**SETTINGS, **place, steps=steps, compile="on" if mode == "compiled" else "off")
    whole, torn = folder / "whole", folder / "torn"
    ended(kills.start("--data", data, "--out", whole, *flags))
    draw = random.Random(f"{given.seed} {mode}")
    found: list[kills.Kill] = []
    first = ["--data", str(data), "--out", str(torn), *flags]
    for moment in moments(draw, count):
        process = kills.start(*(["--resume", str(torn)] if torn.is_dir() else first))
        found.append(strike(process, torn, moment, draw))
        print(f"{mode}: {len(found)} of {count}: {moment}, {found[-1]}", file=sys.stderr, flush=True)
    ended(kills.start("--resume", torn))
    difference = compare(whole, torn)
    writing = sum(kill.while_writing for kill in found)
    return {
        "steps": steps,
        "kills": len(found),
        "while_writing_a_checkpoint": writing,
        "identical": not difference,
        "difference": difference,
        "seconds": time.monotonic() - start,
        "passed": not difference and len(found) == count and writing >= count // 4,
        "each": [dataclasses.asdict(kill) for kill in found],
    }


def moments(draw: random.Random, count: int) -> Iterator[str]:
    """What the kills shall interrupt, in random order; the first one comes when there is a run to resume."""
    rest = ["writing", "training", "writing", "training", "training", "starting"]
    chosen = [rest[place % len(rest)] for place in range(count)]
    draw.shuffle(chosen)
    yield from chosen


def strike(process: Any, run: Path, moment: str, draw: random.Random) -> kills.Kill:
    """Kill the process at such a moment."""
    base, since = kills.last_step(run), time.time()
    if moment == "starting":
        time.sleep(draw.uniform(0.0, LONGEST_START))  # perhaps it trains by then
        return kills.kill(process, run, since=since)
    goal = base + draw.randrange(1, SPAN)
    if moment == "writing":
        came = kills.wait_for(process, lambda: kills.last_step(run) >= goal and kills.is_writing(run, since=since))
    else:
        came = kills.wait_for(process, lambda: kills.last_step(run) >= goal)
        time.sleep(draw.uniform(0.0, 0.03))
    if not came:
        code, said = kills.finish(process)
        raise SystemExit(f"the run ended with {code} before it could be killed: {said[-500:]}")
    return kills.kill(process, run, since=since)


def ended(process: Any) -> None:
    code, said = kills.finish(process)
    if code:
        raise SystemExit(f"sophia train ended with {code}: {said[-500:]}")


def compare(whole: Path, torn: Path) -> str:
    """What differs, or nothing."""
    try:
        runs.assert_equal(whole, torn)
    except AssertionError as problem:
        return str(problem)[:500] or "they differ"
    return ""


if __name__ == "__main__":
    sys.exit(main())
