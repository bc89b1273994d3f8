"""A long run that is killed again and again: the same returns, bit for bit, in flat memory.

    python experiments/long_run.py [--episodes 1000000] [--kills 20] [--workers 2]

Certifies the smoothed CartPole agent of `zoo/cartpole-ppo-sigma0.2` twice with the same seed: once undisturbed, once in a
process group that is killed with SIGKILL at random moments (workers and all) and started again each time. Writes
`experiments/results/long_run.json`: hashes of all returns, lengths and seeds of both runs, the moments of the kills and what
was finished then, and the resident memory of the undisturbed run over time (all processes together), split into quarters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from robustrl.files import write_atomically
from robustrl.policy.loading import load_model
from robustrl.rollouts.collect import collect, make_job
from robustrl.training.run_files import RunInfo

MODEL, SEED = Path("zoo/cartpole-ppo-sigma0.2"), 2022
CACHE, RESULTS = Path("experiments/cache/long_run"), Path("experiments/results/long_run.json")


def play(folder: Path, episodes: int, workers: int) -> None:
    """One attempt: roll out what is missing, then write the hash of everything."""
    recipe = RunInfo.load(MODEL).env
    job = make_job(recipe.view(load_model(MODEL / "model.zip", device="cpu")), recipe, seed=SEED)
    found = collect(job, episodes, n_workers=workers, folder=folder)
    digest = hashlib.sha256(b"".join(found.arrays()[name].tobytes() for name in ("returns", "lengths", "seeds")))
    summary = {"sha256": digest.hexdigest(), "episodes": len(found), "mean": float(found.returns.mean())}
    write_atomically(folder.with_suffix(".json"), json.dumps(summary).encode())


def start(folder: Path, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """An attempt in a process group of its own, so that one kill takes its workers with it."""
    command = [sys.executable, __file__, "--play", str(folder), "--episodes", str(arguments.episodes)]
    return subprocess.Popen([*command, "--workers", str(arguments.workers)], start_new_session=True)


def resident(process: subprocess.Popen[bytes]) -> float:
    """Resident megabytes of a process and its children."""
    try:
        parent = psutil.Process(process.pid)
        return sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True))) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def undisturbed(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run to the end, with its memory every two seconds."""
    folder, memory, began = CACHE / "undisturbed", [], time.time()
    process = start(folder, arguments)
    while process.poll() is None:
        time.sleep(2)
        memory.append(resident(process))
    if process.returncode:
        raise SystemExit(f"the undisturbed run ended with status {process.returncode}")
    settled = memory[len(memory) // 20 :]  # the first moments are imports
    quarters = [settled[i * len(settled) // 4 : (i + 1) * len(settled) // 4] for i in range(4)]
    return {
        **json.loads(folder.with_suffix(".json").read_text()),
        "seconds": time.time() - began,
        "resident_mb_median_by_quarter": [statistics.median(q) for q in quarters if q],
        "resident_mb_peak": max(memory, default=0.0),
    }


def disturbed(arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The same run, killed `arguments.kills` times at random moments and started again."""
    folder, kills, chance = CACHE / "disturbed", [], random.Random(arguments.seed)
    for _ in range(arguments.kills):
        process = start(folder, arguments)
        moment = chance.uniform(0.5, 2 * seconds / (arguments.kills + 1))
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append({"after_seconds": moment, "chunks_finished": len(list(folder.glob("chunk-*.npz")))})
            print(f"killed after {moment:.1f} s with {kills[-1]['chunks_finished']} chunks", flush=True)
    last = start(folder, arguments)
    if last.wait():
        raise SystemExit(f"the last attempt ended with status {last.returncode}")
    leftovers = len(list(folder.glob(".*.part")))
    return {**json.loads(folder.with_suffix(".json").read_text()), "kills": kills, "half_written_files": leftovers}


def main() -> None:
    """Both runs, and whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the kills' moments")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play is not None:
        play(arguments.play, arguments.episodes, arguments.workers)
        return
    one = undisturbed(arguments)
    print(one, flush=True)
    two = disturbed(arguments, one["seconds"])
    agrees = one["sha256"] == two["sha256"]
    command = f"python experiments/long_run.py --episodes {arguments.episodes} --kills {arguments.kills}"
    report = {"command": command, "bit_equal": agrees, "undisturbed": one, "disturbed": two}
    write_atomically(RESULTS, json.dumps(report, indent=1).encode())
    print(f"bit-equal: {agrees}; {len(two['kills'])} kills; memory by quarter {one['resident_mb_median_by_quarter']} MB")
    if not agrees:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
