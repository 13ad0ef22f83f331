"""Search for artefacts at which reading ends otherwise than with ArtifactError, or takes much memory: inputs guided by coverage.

python -m pip install atheris
python tests/fuzz_artifacts.py CORPUS -max_total_time=3600 -rss_limit_mb=1024      (a folder of inputs; options of libFuzzer)
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["muntin"]):
    from damaged_artifacts import files_of, inputs_to_begin_with, read_all
    from muntin.errors import ArtifactError


def main() -> None:
    folder, corpus = Path(tempfile.mkdtemp(prefix="muntin-fuzz-")), Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(inputs_to_begin_with()):
        (corpus / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        with suppress(ArtifactError):
            read_all(files_of(data), folder)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
