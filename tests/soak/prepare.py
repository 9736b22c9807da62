"""Soak of `sophia prepare`: memory on a large text, and kill -9 at random moments. Needs Linux (/proc).

    python -m tests.soak.prepare --bytes 2000000000

1. Prepares `--bytes` of text, and watches the memory of all its processes.
2. Prepares `--kill-bytes` of text twice: undisturbed, and killed `--kills` times at random moments and begun again each
   time with another number of workers. Both folders must hold the same bytes.

Exits 1 if a claim fails. The text is this machine's own (`builtin`) over and over, every copy in another order and with
new words in it, so that neither documents nor words repeat for good.
"""

import argparse
import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from sophia import machine
from sophia.data.builtin import builtin_documents

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "soak-prepare.json"
TOKENIZER = "bpe:16000"
LIMIT_MIB = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=2_000_000_000, help="text of the memory run")
    parser.add_argument("--kill-bytes", type=int, default=200_000_000, help="text of the runs with kills")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sophia-soak-") as name:
        folder = Path(name)
        result = {
            "soak": "prepare",
            "machine": machine.describe(),
            "seed": given.seed,
            "memory": memory_run(folder, given.bytes, given.seed),
            "kills": kill_runs(folder, given.kill_bytes, given.kills, given.seed),
        }
    machine.write_json(given.out, result)
    print(json.dumps(result, indent=2))
    return 0 if result["memory"]["passed"] and result["kills"]["passed"] else 1


def memory_run(folder: Path, size: int, seed: int) -> dict[str, Any]:
    """Prepare a large text; the memory of all its processes against that of one with only the tokenizer loaded."""
    small, large = folder / "small", folder / "large"
    write_text(folder / "small-text", 20_000_000, seed + 1)
    subprocess.run(command(folder / "small-text", small, TOKENIZER), check=True, stdout=subprocess.DEVNULL)
    tokenizer = small / "tokenizer.json"
    written = write_text(folder / "large-text", size, seed)
    baseline = tokenizer_memory(tokenizer)
    start = time.monotonic()
    process = subprocess.Popen(command(folder / "large-text", large, tokenizer), stdout=subprocess.PIPE)
    watch = Watch(process.pid)
    report, _ = process.communicate()
    sums, largest = watch.stop()
    peak = max(sums)
    if process.returncode:
        raise SystemExit(f"sophia prepare ended with {process.returncode}")
    answer = json.loads(report)
    seconds = time.monotonic() - start
    subprocess.run([sys.executable, "-m", "sophia", "prepare", "--verify", str(large)], check=True)
    for leftover in (large, folder / "large-text"):
        shutil.rmtree(leftover)
    whole = answer["text_bytes"] == written
    return {
        "text_bytes": written,
        "tokens": answer["tokens"],
        "seconds": seconds,
        "tokenizer_alone_mib": baseline,
        "peak_mib": peak,
        "above_tokenizer_mib": peak - baseline,
        "processes_at_peak_mib": largest,
        # The peak of each tenth of the run: memory that grows with the text would show.
        "peaks_over_time_mib": [max(sums[i * len(sums) // 10 : (i + 1) * len(sums) // 10 + 1]) for i in range(10)],
        "all_text_is_there": whole,
        "passed": whole and peak - baseline < LIMIT_MIB,
    }


def kill_runs(folder: Path, size: int, kills: int, seed: int) -> dict[str, Any]:
    """Prepare undisturbed by one worker more than there are cores, and killed again and again by one to three."""
    draw = random.Random(seed)
    text, calm, torn = folder / "text", folder / "calm", folder / "torn"
    write_text(text, size, seed + 2)
    tokenizer = folder / "small" / "tokenizer.json"
    start = time.monotonic()
    subprocess.run(command(text, calm, tokenizer, workers=3), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    moments: list[float] = []
    while not (torn / "manifest.json").exists():
        process = subprocess.Popen(
            command(text, torn, tokenizer, workers=draw.randint(1, 3)), stdout=subprocess.DEVNULL
        )
        moment = draw.uniform(0.0, 1.5 * seconds / max(kills, 1)) + 2.0  # importing takes the first seconds
        try:
            process.wait(timeout=moment if len(moments) < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments.append(moment)
        else:
            if process.returncode:
                raise SystemExit(f"sophia prepare ended with {process.returncode}")
    (torn / "unfinished.json").unlink(missing_ok=True)  # if the last kill came behind the manifest
    same = contents(calm) == contents(torn)
    return {
        "text_bytes": size,
        "undisturbed_seconds": seconds,
        "killed_after_seconds": moments,
        "identical": same,
        "passed": same and (len(moments) >= min(kills, 2)),
    }


def command(text: Path, out: Path, tokenizer: Path | str, *, workers: int | None = None) -> list[str]:
    settings = ["--tokenizer", str(tokenizer), "--shard-tokens", str(1 << 23), "--json"]
    settings += ["--workers", str(workers)] if workers else []
    return [sys.executable, "-m", "sophia", "prepare", str(text), "--out", str(out), *settings]


def write_text(folder: Path, size: int, seed: int) -> int:
    """One huge text file for half of it, then JSON lines, plain and compressed. Returns the bytes of all texts."""
    folder.mkdir()
    texts = [document.text for document in builtin_documents(1 << 62)]
    written = 0
    with (folder / "a.txt").open("w", encoding="utf-8") as file:
        for text in copies(texts, size // 2, seed):
            file.write(text)
            written += len(text.encode())
    with (folder / "b.jsonl").open("w", encoding="utf-8") as file:
        for text in copies(texts, size // 4, seed + 1000):
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    with gzip.open(folder / "c.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as file:
        for text in copies(texts, size // 4, seed + 2000):
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    return written


def copies(texts: list[str], size: int, seed: int) -> Any:
    """Documents, `size` bytes of them: the same texts again and again, each time with words that no other copy has."""
    draw = random.Random(seed)
    left = size
    while left > 0:
        for text in draw.sample(texts, len(texts)):
            new = " ".join(f"{draw.getrandbits(40):x}" for _ in range(len(text) // 1000 + 1))
            copy = f"{new}\n{text}\n"
            yield copy
            left -= len(copy.encode())
            if left <= 0:
                return


class Watch:
    """Samples the resident memory of a process and its children, in MiB."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._sums = [resident(pid)]
        self._largest: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[list[float], list[float]]:
        """All samples, each the sum over the processes; and what the largest was made of."""
        self._over.set()
        self._thread.join()
        return self._sums, self._largest

    def _run(self) -> None:
        while not self._over.wait(0.2):
            sizes = sorted((resident(pid) for pid in (self._pid, *children(self._pid))), reverse=True)
            if sum(sizes) > max(self._sums):
                self._largest = sizes
            self._sums.append(sum(sizes))


def children(pid: int) -> list[int]:
    lists = [read(task) for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in lists for child in text.split()]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a thread or process that has just ended
        return ""


def resident(pid: int) -> float:
    lines = read(Path(f"/proc/{pid}/status")).splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def tokenizer_memory(tokenizer: Path) -> float:
    """Memory of a process that has imported the command and loaded the tokenizer."""
    program = (
        "import sys, sophia.prepare, tokenizers\n"
        "tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmRSS')][0].split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tokenizer)], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    sys.exit(main())
