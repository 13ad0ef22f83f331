"""Run a benchmark: its command line, rows that are measured once, the document with its machine, the tables and the goals.

A benchmark is a module with `BENCHMARK = Benchmark(...)` and, at its end, `main(BENCHMARK, __doc__)` under `if __name__ == "__main__"`.
`tables.py` reads the same declaration to write the pages. This module does not import PyTorch, because load generators do not need it.

    options -> measure(Run) -> rows (a file each) -> Document -> tables and goals
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from documents import Document, Goal, Row, Table, goal_table, judge
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("python", "numpy", "torch", "openvino", "onnxruntime", "onnx")
"""Properties of `describe_hardware` that are versions of software."""
SAME = ("cpu", "cores", "features", "gpus", "openvino", "torch")
"""Properties of the machine that two rows must share to be compared."""
NAMED_DIFFERENCES = 4


# Options


def option(
    default: Any, help: str, *, least: int | None = None, choices: Sequence[str] | None = None, parse: Callable[[str], Any] | None = None,
    selects: bool = False,
) -> Any:  # fmt: skip
    """Declare a field of an options dataclass: `--name`, with dashes. A tuple takes several values, a bool is a switch.

    `least`: smallest integer. `parse`: reads one value where the default is None or of another type. `selects`: it chooses which rows are
    measured and changes none of them.
    """
    facts = {"help": help, "least": least, "choices": choices, "parse": parse, "selects": selects}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that every benchmark has. Subclasses add fields made by `option`; `Benchmark` makes a dataclass of them."""

    output: Path = option(Path(), "folder of the rows; runs/benchmark-NAME unless given", selects=True)
    json: bool = option(False, "print one JSON document instead of the tables", selects=True)


def threads_option() -> Any:
    return option(physical_cores(), "threads of the engine", least=1)


def seeds_option(*seeds: int) -> Any:
    return option(seeds, "seeds", least=0, parse=int, selects=True)


def at_least(least: int) -> Callable[[str], int]:
    """Return a function with which argparse reads an integer of at least `least`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: give at least {least}")
        return value

    return number


def _parser(options: type[Options], description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in sorted(dataclasses.fields(options), key=lambda each: each.name in ("output", "json")):
        facts, flag = each.metadata, "--" + each.name.replace("_", "-")
        text = facts["help"].replace("%", "%%")
        if isinstance(each.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
            continue
        several = isinstance(each.default, tuple)
        sample = (each.default[0] if each.default else None) if several else each.default
        parse = facts["parse"] or (str if sample is None else type(sample))
        if facts["least"] is not None:
            parse = at_least(facts["least"])
        extra: dict[str, Any] = {"nargs": "+", "action": "extend"} if several else {"default": each.default}
        parser.add_argument(flag, type=parse, choices=facts["choices"], help=text, **extra)
    return parser


# Rows


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of a benchmark: its options, and the rows that it keeps below `output`."""

    options: Any
    hardware: Row

    @property
    def folder(self) -> Path:
        return Path(self.options.output)

    @property
    def settings(self) -> Row:
        """Values of the options that change a row."""
        fields = dataclasses.fields(self.options)
        return {each.name: getattr(self.options, each.name) for each in fields if not each.metadata["selects"]}

    def row(self, name: str, measure: Callable[..., Row], /, *arguments: Any, **settings: Any) -> Row:
        """Return the row of this name (a path below the output folder, without suffix): the one on disk, or a new one.

        `arguments`: of `measure`. `settings`: what the row depends on beyond the options. A row of other settings or of another machine
        ends the program. A row that says `cannot` is not kept, so the next call tries again.
        """
        path = self.folder / f"{file_name(name)}.json"
        wanted = self.settings | settings
        row = read_row(path, wanted, self.hardware)
        if row is None:
            row = {"settings": wanted, **measure(*arguments), "created": now(), "hardware": self.hardware}
            if "cannot" not in row:
                write_whole(path, row)
            print(f"{datetime.now(UTC):%H:%M:%S}  {name}{': ' + row['cannot'] if 'cannot' in row else ''}", file=sys.stderr, flush=True)
        return row


def file_name(name: str) -> str:
    """The name of a row as a path without blanks and commas."""
    return name.replace(",", "").replace(" ", "-").replace(":", "of")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_whole(path: Path, content: Any) -> None:
    """Write JSON to a draft beside `path` and rename it, so that an interrupted call leaves no partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


def read_row(path: Path, settings: Mapping[str, Any], hardware: Row) -> Row | None:
    """Return the row in a file; None without a file. Ends the program if its settings or its machine differ, and names differences."""
    if not path.is_file():
        return None
    row = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(row, dict) or "settings" not in row:
        raise SystemExit(f"{path} does not say what it was measured with: give another --output")
    there, here = ({key: machine.get(key) for key in SAME} for machine in (row.get("hardware", {}), hardware))
    old, new = _flat({**row["settings"], "hardware": there}), _flat({**json.loads(json.dumps(settings, default=str)), "hardware": here})
    differ = [f"{key} {old.get(key)} (now {new.get(key)})" for key in {**old, **new} if old.get(key) != new.get(key)]
    if differ:
        more = f" and {len(differ) - NAMED_DIFFERENCES} more" if len(differ) > NAMED_DIFFERENCES else ""
        raise SystemExit(f"{path} was measured with {'; '.join(differ[:NAMED_DIFFERENCES])}{more}: give another --output")
    return dict(row)


def _flat(values: Mapping[str, Any], where: str = "") -> Row:
    """Values of nested dictionaries by their whole path: `training.steps`."""
    flat: Row = {}
    for key, value in values.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat


def apart(function: Callable[..., Row], *arguments: Any, limit_s: float | None = None, memory_gib: float | None = None) -> Row:
    """Call a module's function in a new process and return its row; `{"cannot": reason}` if it raises, dies, or exceeds a limit."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments, memory_gib))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return {"cannot": f"not within {limit_s:g} s"}
        return dict(receiver.recv())
    except EOFError:
        process.join()
        return {"cannot": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _answer(sender: Any, function: Callable[..., Row], arguments: tuple[Any, ...], memory_gib: float | None) -> None:
    if memory_gib is not None:  # an error in this process, so that the system kills no other one
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * 2**30),) * 2)
    try:
        sender.send(function(*arguments))
    except Exception as error:  # noqa: BLE001 - it becomes the row's reason
        sender.send({"cannot": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


# Benchmarks


def commit_of_code() -> str | None:
    """The commit of the working tree, `+` if something is changed; None without git."""
    try:
        git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        commit = git(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        return commit + ("+" if git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a benchmark measures and how its pages show it.

    `newest`: its most important figures in a sentence. `n`: how often the figures were repeated, in words. `variant`: what separates
    documents of other models or settings; documents of one variant are runs of the same. `blocks`: texts for marked places of other pages,
    from all documents, oldest first. `about`: what a reader of the tables must know, in Markdown. `unrecorded`: figures of runs without a
    document, shown and marked as such until there is one.
    """

    name: str
    options: type[Options]
    measure: Callable[[Run], Iterable[Row]]
    tables: tuple[Table, ...]
    newest: Callable[[Document], str]
    about: str = ""
    goals: tuple[Goal, ...] = ()
    n: Callable[[list[Row]], str] = lambda rows: "1 run"
    variant: Callable[[Document], str] = lambda document: ""
    blocks: Mapping[str, Callable[[list[Document]], str]] = field(default_factory=dict)
    unrecorded: str = ""

    def __post_init__(self) -> None:
        if "__dataclass_fields__" not in vars(self.options):
            dataclass(frozen=True, kw_only=True)(self.options)

    def parse(self, arguments: Sequence[str], description: str | None = None) -> Any:
        """Read the command line. Ends the program on wrong values. `--help` prints the description and `about`."""
        parser = _parser(self.options, f"{description or ''}\n{self.about}")
        several = {each.name for each in dataclasses.fields(self.options) if isinstance(each.default, tuple)}
        words = vars(parser.parse_args(arguments))
        given = {key: tuple(value) if key in several else value for key, value in words.items() if key not in several or value is not None}
        if given["output"] == Path():
            given["output"] = Path(f"runs/benchmark-{self.name}")
        try:
            return self.options(**given)
        except ValueError as error:  # from __post_init__
            parser.error(str(error))

    def run(self, options: Any) -> Document:
        """Measure, row by row."""
        run = Run(options=options, hardware=describe_hardware())
        rows = list(self.measure(run))
        created = max((row["created"] for row in rows if "created" in row), default=now())
        bare = [{key: value for key, value in row.items() if key not in ("settings", "hardware", "created")} for row in rows]
        machine = {key: value for key, value in run.hardware.items() if key not in VERSIONS}
        versions = {key: run.hardware[key] for key in VERSIONS if key in run.hardware}
        return Document(
            benchmark=self.name, created=created, machine=machine, versions=versions, rows=bare, settings=run.settings,
            n=self.n(bare), commit=commit_of_code(),
        )  # fmt: skip

    def markdown(self, documents: Sequence[Document], *, paged: bool) -> Iterator[str]:
        """The tables of the newest document, then the goals over all of them. `paged`: for a page, without what only the command prints."""
        for table in self.tables:
            if (table.paged or not paged) and (text := table.markdown(documents[-1])):
                yield text
        if verdicts := judge(self.goals, documents):
            yield goal_table(verdicts)


def main(benchmark: Benchmark, description: str | None) -> None:
    """The command of a benchmark."""
    options = benchmark.parse(sys.argv[1:], description)
    document = benchmark.run(options)
    if options.json:
        print(document.to_json(), end="")
        return
    print(*benchmark.markdown([document], paged=False), sep="\n\n")
    features = ", ".join(document.machine.get("features", ()))
    print(f"\n{document.where} ({document.machine['physical_cores']} cores, {features}); {document.n}; commit {document.commit}")
