"""`muntin update`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from muntin.cli.console import notes_once, out, print_json, print_notes, print_table, say
from muntin.cli.options import JsonOption, ThreadsOption, TrustOption
from muntin.cli.start import prepare_torch, refuse_without_gradients
from muntin.cli.train import training_bar
from muntin.errors import DataError, RecipeError
from muntin.progress import progress_lines
from muntin.text import count

if TYPE_CHECKING:
    from muntin.tasks.classes import ClassSpec
    from muntin.training import FitProgress
    from muntin.updating.gate import GateVerdict
    from muntin.updating.update import UpdateResult
    from muntin.updating.versions import ServerClient
    from muntin.updating.watch import WatchSettings

_RunArgument = Annotated[Path, typer.Argument(help="A run's folder; its newest accepted update goes on. Or one of its checkpoints.")]
_ClassOption = Annotated[
    list[str] | None,
    typer.Option("--class", help="Add a class: NAME, or NAME=VALUE with its value in the masks, a number or R,G,B; repeatable."),
]
_SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Replace a value of the recipe, e.g. --set update.strategy=naive; repeatable.")
]
_AcceptOption = Annotated[
    list[str] | None,
    typer.Option("--accept", help="Replace a condition of the gate, e.g. --accept max_drop=0.02 (update.accept); repeatable."),
]

_PushOption = Annotated[
    str | None, typer.Option("--push", help="Offer an accepted version to the `muntin serve` at this URL, which serves --repository.")
]
_RepositoryOption = Annotated[
    Path | None, typer.Option("--repository", help="Folder of numbered versions for accepted artefacts; RUN/versions with --push.")
]
_TokenOption = Annotated[Path | None, typer.Option("--token-file", help="File with the bearer token of the server.")]


def update_command(
    run: _RunArgument,
    data: Annotated[Path, typer.Option("--data", help="Folder of new pictures: images/ and masks/, or a folder for each class.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the update; RUN/updates/N by default.")] = None,
    class_: _ClassOption = None,
    set_: _SetOption = None,
    accept: _AcceptOption = None,
    push: _PushOption = None,
    repository: _RepositoryOption = None,
    token_file: _TokenOption = None,
    every: Annotated[
        int | None, typer.Option(min=3, help="Watch the folder: update whenever so many new labelled pictures have come, until Ctrl-C.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="With --every: end after this many updates; by default never.")] = None,
    threads: ThreadsOption = None,
    trust_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Learn from new pictures without forgetting, export, and judge the artefact beside the one that it is to replace.

    Exit code 1 if the gate refuses it, or the server that it is pushed to. An update that was interrupted goes on when the command is
    repeated, and so does a watch (--every) that was killed.
    """
    if every is None and rounds is not None:
        raise RecipeError(f"--rounds {rounds}: it counts the updates of a watch: give --every NUMBER, or leave it out")
    if every is not None and output is not None:
        raise RecipeError(f"--output {output}: updates of a watch are in RUN/updates: leave out --output or --every")
    refuse_without_gradients(run)
    refuse_several_processes()
    client = server_client(push, token_file)
    notes = prepare_torch()  # before PyTorch is imported
    added, overrides = parse_classes(class_ or ()), all_overrides(set_ or (), accept or ())
    if every is not None:
        from muntin.updating.watch import WatchSettings

        settings = WatchSettings(every=every, added=added, overrides=tuple(overrides), repository=repository, threads=threads)
        _watch(data, run, settings, client, rounds=rounds, notes=notes, trust_code=trust_code, json=json)
        return
    result = update_with_progress(
        run, data, output, added=added, overrides=overrides, threads=threads, notes=() if json else notes, trust_code=trust_code
    )
    offered = offer(result, run, repository, client)
    if json:
        print_json(update_document(result) | offered | {"notes": [*notes, *result.notes]})
    else:
        describe_update(result)
        describe_offer(offered)
    if problem := outcome(result, offered):
        say(f"muntin: {problem}")
        raise typer.Exit(1)


def _watch(
    folder: Path,
    run: Path,
    settings: WatchSettings,
    client: ServerClient | None,
    *,
    rounds: int | None,
    notes: Sequence[str],
    trust_code: bool,
    json: bool,
) -> None:
    """Update a run whenever enough labelled pictures have come: learn, judge, publish, push. Ctrl-C ends it with a checkpoint."""
    from muntin.artifact.file_lock import folder_in_use
    from muntin.training import read_checkpoint
    from muntin.updating.watch import FolderWatch, WatchedUpdate, keep_watching

    read_checkpoint(run, check=False, trust_code=trust_code)
    watch = FolderWatch(run, folder, settings, client)
    interrupted, documents = False, list[dict[str, object]]()

    def tell(update: WatchedUpdate) -> None:
        nonlocal interrupted
        interrupted = update.problem == "interrupted"
        verdict = None if update.result is None else update.result.verdict
        line = update.problem if verdict is None else verdict.summary
        place = "" if update.version is None else f"; version {update.version}"
        accepted = update.version is not None
        documents.append(
            {"number": update.number, "accepted": accepted, "summary": line, "version": update.version, "server": update.server}
            | {"left_out": update.dropped}
        )
        if not json:
            out.print(f"update {update.number}: {line}{place}{f'; server: {update.server}' if update.server else ''}")
            print_notes([*([] if update.result is None else update.result.advice), *(f"left out: {reason}" for reason in update.dropped)])

    with folder_in_use(watch.inbox, "muntin update --every") as taken_over:
        for note in (*notes, *taken_over):
            say(f"note      {note}")
        if links := watch.links():
            say(f"note      {count(links, 'labelled picture')} in {folder} left out: a watch follows no links; copy the files")
        say(f"muntin: {watch.waiting()} of {settings.every} new pictures are in {folder}; Ctrl-C ends the watch")
        keep_watching(watch, tell=tell, rounds=rounds)
    if json:
        print_json({"updates": documents})
    if interrupted:
        say("muntin: interrupted; the same command goes on")
        raise typer.Exit(1)


def update_with_progress(
    run: Path, data: Path, output: Path | None, *, added: Sequence[ClassSpec], overrides: Sequence[str], threads: int | None,
    notes: Sequence[str], trust_code: bool,
) -> UpdateResult:  # fmt: skip
    """Run `update_run` and show its progress. `notes` are printed when work begins."""
    from muntin.training import read_checkpoint
    from muntin.updating.update import update_run

    begin = notes_once(notes)
    with training_bar(read_checkpoint(run, trust_code=trust_code).recipe.task) as bar:

        def report(progress: FitProgress) -> None:
            begin()
            if progress.kind != "note":
                bar("training", progress)

        return update_run(run, data, directory=output, added=added, overrides=overrides, threads=threads, report=report)


def refuse_several_processes() -> None:
    """Raise RecipeError under torchrun: an update is trained by one process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise RecipeError("an update is trained by one process, and torchrun started several: start the command without it")


def server_client(url: str | None, token_file: Path | None) -> ServerClient | None:
    """The client of --push, with the first token of --token-file; checked before the long work. Raises PushError if no server answers."""
    if url is None:
        return None
    from muntin.updating.versions import ServerClient

    try:
        tokens = [None] if token_file is None else token_file.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--token-file {token_file}: {error}: give a text file with a token") from error
    if not tokens:
        raise DataError(f"--token-file {token_file} holds no token: write one into it")
    client = ServerClient(url, tokens[0])
    for note in client.notes:
        say(f"note      {note}")
    client.index()
    return client


def offer(result: UpdateResult, run: Path, repository: Path | None, client: ServerClient | None) -> dict[str, object]:
    """Publish and push an accepted update if that was requested; return what was done as plain values."""
    if not result.accepted or (repository is None and client is None):
        return {}
    from muntin.updating.update import VERSIONS, offer_update, root_of, run_directory

    with progress_lines("offering the new version"):
        version, record = offer_update(result, repository or root_of(run_directory(run)) / VERSIONS, client)
    return {"version": version, "push": None if record is None else record.model_dump(mode="json")}


def describe_offer(offered: Mapping[str, object]) -> None:
    """Print where the version lies, and what the server did."""
    if "version" in offered:
        out.print(f"version   {offered['version']}")
    if isinstance(record := offered.get("push"), dict):
        out.print(f"server    {record['url']}: {record['reason']}")


def outcome(result: UpdateResult, offered: Mapping[str, object]) -> str:
    """Why the exit code is 1; empty if it is 0."""
    if result.verdict is None:
        return "interrupted; the same command goes on"
    if not result.accepted:
        tried = "; ".join(result.advice)
        return f"refused: {refusal(result.verdict)}; {shlex.quote(str(result.directory / 'verdict.json'))} holds all checks; try: {tried}"
    if isinstance(record := offered.get("push"), dict) and not record["serves"]:
        return f"{record['url']} sent version {record['version']} back: {record['reason']}"
    return ""


def all_overrides(changes: Sequence[str], conditions: Sequence[str]) -> list[str]:
    """The values of --set, and those of --accept as values of the recipe."""
    return [*changes, *(f"update.accept.{condition}" for condition in conditions)]


def parse_classes(texts: Sequence[str]) -> tuple[ClassSpec, ...]:
    """Read NAME, NAME=NUMBER or NAME=R,G,B. Raises DataError for another form."""
    from pydantic import ValidationError

    from muntin.tasks.classes import ClassSpec

    specs = []
    for text in texts:
        name, equals, value = text.rpartition("=") if "=" in text else (text, "", "")
        try:
            numbers = [int(part) for part in value.split(",")] if equals else []
            specs.append(ClassSpec.model_validate({"name": name, "value": numbers[0] if len(numbers) == 1 else numbers or None}))
        except (ValueError, ValidationError) as error:
            raise DataError(f"--class {text}: write NAME, NAME=7 or NAME=200,60,0: its value in the masks") from error
    return tuple(specs)


def refusal(verdict: GateVerdict) -> str:
    """The failed checks in a line."""
    parts = []
    for check in verdict.failed[:3]:
        note = f" ({check.note})" if check.note else ""
        parts.append(f"{check.name} {check.value:.3g}, allowed {check.limit} {check.bound:g}{note}")
    more = f", and {len(verdict.failed) - 3} more checks" if len(verdict.failed) > 3 else ""
    return "; ".join(parts) + more


def describe_update(result: UpdateResult) -> None:
    """Print the checks of the gate, and where the update lies."""
    verdict = result.verdict
    if verdict is not None:
        table = Table("check", Column("value", justify="right"), Column("95 % interval", justify="right"), "allowed", "")
        for check in verdict.checks:
            interval = "" if check.low is None or check.high is None else f"{check.low:.3f} to {check.high:.3f}"
            table.add_row(check.name, f"{check.value:.3f}", interval, f"{check.limit} {check.bound:g}", "yes" if check.passed else "no")
        print_table(table)
        for name, (old, new) in verdict.scores.items():
            out.print(f"score     {name}: {old:.3f}, updated {new:.3f}")
    out.print(f"update    {result.directory}, of {result.parent.path.parent.parent}")
    if result.artifact is not None:
        out.print(f"artefact  {result.artifact.path}: {'accepted' if result.accepted else 'refused'}")
    print_notes(result.notes)


def update_document(result: UpdateResult) -> dict[str, object]:
    """The result as plain values."""
    return {
        "directory": result.directory,
        "parent": result.parent.path,
        "checkpoint": result.checkpoint.path,
        "artifact": None if result.artifact is None else result.artifact.path,
        "accepted": result.accepted,
        "verdict": None if result.verdict is None else result.verdict.model_dump(mode="json"),
        "advice": list(result.advice),
    }
