"""How long the command line takes to answer: `--help`, `plan` and `run` on a finished workspace, and a bare Python.

    .venv/bin/python benchmarks/startup.py

Bars: `--help` 0.6 s, `plan` on a cached run 2 s, an unchanged `run` 3 s (medians of 7, interleaved; the ratio is against
`python -c pass`, which tells how fast the machine is just now).
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
BARS = {"--help": 0.6, "plan (cached)": 2.0, "run (unchanged)": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        tool = [sys.executable, "-m", "pipeline"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "--help": [*tool, "--help"],
            "plan (cached)": [*tool, "plan", "digits"],
            "run (unchanged)": [*tool, "run", "digits"],
        }
        subprocess.run(commands["run (unchanged)"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                clock = time.perf_counter()
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
                taken[name].append(time.perf_counter() - clock)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    bare = medians["python -c pass"]
    for name, seconds in medians.items():
        bar = BARS.get(name)
        verdict = "" if bar is None else f"   bar {bar} s: {'reached' if seconds <= bar else 'MISSED'}"
        print(f"{name:18} {seconds:6.3f} s   {seconds / bare:6.1f}x of bare python{verdict}")
    out = HERE / "out" / "startup.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"median_seconds": medians, "bars": BARS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
