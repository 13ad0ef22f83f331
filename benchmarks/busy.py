"""Measure `muntin fit`, `evaluate` and `report` on a quiet machine and beside one other process that keeps a CPU busy.

    python benchmarks/busy.py [--rounds 3] [--steps 20] [--waiting muntin default] [--output FOLDER] [--json]

Each command is a process of its own, timed from its start to its end, loading PyTorch included. A round runs every command once for each
way of waiting, quiet and busy in turns; the table has the medians over the rounds:

    waiting    how OpenMP's threads wait for each other. muntin: as the command line sets it; default: as GNU's OpenMP does if nothing is
               set (GOMP_SPINCOUNT=300000); passive, active: OMP_WAIT_POLICY
    quiet s    nothing else running; busy s: beside a Python process in an endless loop; ratio: busy over quiet (goal: at most 2.5)
    to default quiet over the quiet time of `default` (goal: at most 1.03)

The busy process has a session of its own, like a program in another terminal: where Linux groups processes by session
(`/proc/sys/kernel/sched_autogroup_enabled`), one such process gets more than a thread's share. The data are the demonstration's
(`pip install '.[demo]'`); `fit` trains its recipe for `--steps` steps, with one validation.

Time: five minutes a round and more, most of it `default` beside the busy process. A round that is measured already is not measured again.
Run it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import muntin
from kept import Row, kept_row, now
from muntin.cli.start import WAITING
from muntin.runtime import describe_hardware
from options import at_least

WAYS: dict[str, dict[str, str]] = {
    "muntin": {},
    "default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "active": {"OMP_WAIT_POLICY": "active"},
}
COMMANDS = ("fit", "evaluate", "report")
GOALS = {"busy_over_quiet": 2.5, "quiet_over_default": 1.03}
RECIPE = Path(muntin.__file__).parent / "recipes" / "demo.yaml"


@contextmanager
def busy_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) as process:
        try:
            time.sleep(0.5)
            yield
        finally:
            process.kill()


def words_of(command: str, run: Path, target: Path, steps: int) -> list[str]:
    if command == "fit":
        changes = [word for key in ("steps", "validate_every") for word in ("--set", f"training.{key}={steps}")]
        return ["fit", str(RECIPE), "--output", str(target), *changes]
    return ["report", str(run), "--output", str(target)] if command == "report" else ["evaluate", str(run)]


def seconds_of(words: list[str], way: str, cache: Path) -> float:
    """Seconds of a command. Ends the program, with the command's errors, if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | WAYS[way] | {"MUNTIN_CACHE": str(cache)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "muntin", *words], env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"muntin {' '.join(words)}: {done.stderr}")
    return seconds


def measure(ways: list[str], folder: Path, steps: int) -> Row:
    """Seconds of a round, by command, way of waiting and state."""
    run, target, cache = folder / "run", folder / "target", folder / "cache"
    times: dict[str, dict[str, dict[str, float]]] = {command: {way: {} for way in ways} for command in COMMANDS}
    for command in COMMANDS:
        for way in ways:
            for state in ("quiet", "busy"):
                shutil.rmtree(target, ignore_errors=True)
                with busy_process() if state == "busy" else nullcontext():
                    seconds = seconds_of(words_of(command, run, target, steps), way, cache)
                times[command][way][state] = seconds
                print(f"{command:<9} {way:<8} {state:<6} {seconds:6.1f} s", file=sys.stderr)
    shutil.rmtree(target, ignore_errors=True)
    return {"times": times}


def summary(rounds: list[Row], ways: list[str]) -> list[Row]:
    rows: list[Row] = []
    for command in COMMANDS:
        medians = {way: {state: median(row["times"][command][way][state] for row in rounds) for state in ("quiet", "busy")} for way in ways}
        for way, seconds in medians.items():
            to_default = seconds["quiet"] / medians["default"]["quiet"] if "default" in medians else None
            ratio = seconds["busy"] / seconds["quiet"]
            rows.append({"command": command, "waiting": way, **seconds, "busy_over_quiet": ratio, "quiet_over_default": to_default})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=20, help="training steps of `fit`")
    parser.add_argument("--waiting", nargs="+", choices=WAYS, default=["muntin", "default"])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-busy"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    settings = {"steps": given.steps, "waiting": given.waiting, "torch": version("torch")}
    machine = describe_hardware()
    given.output.mkdir(parents=True, exist_ok=True)
    run, cache = given.output / "run", given.output / "cache"
    if not (run / "report.html").is_file():  # not timed: also fills the cache of compiled models
        shutil.rmtree(run, ignore_errors=True)
        seconds_of(words_of("fit", run, run, given.steps), "muntin", cache)
        seconds_of(["report", str(run)], "muntin", cache)
    work = partial(measure, given.waiting, given.output, given.steps)
    rounds = [kept_row(given.output / f"round-{number}.json", settings, work, hardware=machine) for number in range(1, given.rounds + 1)]
    rows = summary(rounds, given.waiting)
    if given.json:
        document = {"settings": settings, "rounds": given.rounds, "rows": rows, "goals": GOALS, "created": now(), "hardware": machine}
        print(json.dumps({"benchmark": "busy", **document}, indent=1))
        return
    print(f"{'command':<10}{'waiting':<9}{'quiet s':>9}{'busy s':>9}{'ratio':>7}{'to default':>12}")
    for row in rows:
        compared = "–" if row["quiet_over_default"] is None else f"{row['quiet_over_default']:.2f}"
        figures = f"{row['quiet']:>9.1f}{row['busy']:>9.1f}{row['busy_over_quiet']:>7.2f}{compared:>12}"
        print(f"{row['command']:<10}{row['waiting']:<9}{figures}")
    print(f"{machine['cpu']}, {machine['cores']} cores, torch {settings['torch']}; medians of {given.rounds}; {now()}")


if __name__ == "__main__":
    main()
