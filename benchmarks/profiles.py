"""Profile the demonstration's model before and after compression, and check that the kernels' times add up.

    python benchmarks/profiles.py [--run runs/demo] [--output runs/benchmark-profiles] [--picture docs/roofline.svg] [--json]

Profiles the FP32 layers' artefact, plain INT8 and the compressed one at 512 x 512 with the same ceilings, writes each one's page, and the
rooflines side by side as one picture. `sum/whole`: the kernels' times over the profiled call; `counted/plain`: the profiled call over one
without counters. Time on two cores: a minute, beyond the demonstration. Run it alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from engines import artifacts, demonstration
from muntin.reporting import roofline_svg, write_profile
from muntin.runtime.profiling.ceilings import measure_ceilings
from muntin.runtime.profiling.profile import profile
from muntin.runtime.profiling.profile_document import profile_dict

SIDE = 512
GOALS = {"sum_over_whole": [0.9, 1.1]}
TITLES = {"fp32": "FP32 layers, before", "int8": "plain INT8", "compressed": "low rank, W4A8, mixed, after"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-profiles"))
    parser.add_argument("--picture", type=Path, help="where to write the rooflines of before and after, an SVG")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    arguments = parser.parse_args()
    demonstration(arguments.run)
    paths = {name: path for name, (_, path, _) in artifacts(arguments.run, arguments.output / "artifacts").items()}
    ceilings = measure_ceilings()
    documents: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        documents[name] = profile_dict(profile(path, shape=(1, SIDE, SIDE), rounds=arguments.rounds, ceilings=ceilings))
        documents[name]["title"] = TITLES[name]
        write_profile(arguments.output / name, documents[name])
    if arguments.picture is not None:
        arguments.picture.write_text(roofline_svg([documents["fp32"], documents["compressed"]]), encoding="utf-8")
    if arguments.json:
        kept = {name: {key: value for key, value in found.items() if key != "kernels"} for name, found in documents.items()}
        print(json.dumps({"benchmark": "profiles", "others": ceilings.others, "goals": GOALS, "profiles": kept}, indent=1))
        return
    print(f"{'':<30}{'plain ms':>9}{'counted':>9}{'kernels':>9}{'sum/whole':>11}{'counted/plain':>15}{'at the ceilings':>17}")
    for name, found in documents.items():
        attainable = sum(kernel["attainable_ms"] or 0.0 for kernel in found["kernels"])
        print(
            f"{TITLES[name]:<30}{found['whole_ms']:>9.2f}{found['profiled_ms']:>9.2f}{found['kernels_ms']:>9.2f}"
            f"{found['kernels_ms'] / found['profiled_ms']:>11.1%}{found['profiled_ms'] / found['whole_ms']:>15.1%}"
            f"{attainable / found['whole_ms']:>17.1%}"
        )
    for name, found in documents.items():
        print(f"\n{TITLES[name]}")
        for finding in found["findings"]:
            saves = "" if finding["saves_ms"] is None else f"up to {finding['saves_ms']:.2f} ms: "
            print(f"  {saves}{finding['words']}")
        for note in found["notes"]:
            print(f"  note: {note}")
    hardware = documents["fp32"]["hardware"]
    roofs = ", ".join(f"{name} {rate:.0f}" for name, rate in ceilings.gmacs.items())
    print(f"\nceilings, GMAC/s: {roofs}; copy {ceilings.copy_gb_s:.1f} GB/s")
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {documents['fp32']['created']}")


if __name__ == "__main__":
    main()
