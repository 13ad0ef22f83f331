"""Networks that are not muntin's (EfficientNet-Lite0, -1 and -2, all-MiniLM-L6-v2, two of timm that are trained here) and their forms.

Their inputs are those of `quantizer_peers.data`: `draw` for calibration and distillation, `held_out` for what judges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import muntin
from quantizer_peers.data import IMAGES, SIDE, Named, batches, digits_before_photographs
from quantizer_peers.networks import ATTENTION, CONVOLUTIONS, lite, minilm, trained_once, with_pixels

Batch = Tensor | dict[str, Tensor]
BATCH, CLASSES = 16, 10
QUANTISED = ("int8", "w4a8 nearest", "w4a8", "w4.4a8")
NARROWED = ("low rank", "svd by energy", "prune", "torch-pruning")
MULTIPLE = 8
"""Widths and ranks are multiples of it."""
AVERAGE = 4.4
"""Average bits of a weight where widths are mixed."""
RATE = 3e-4
"""Learning rate of distillation, for every form."""
CLASSIFIERS = ("head", "fc", "_fc", "classifier")
"""Last parts of the names of classifiers, which torch-pruning leaves."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network, and what it is judged on.

    `build`: the FP32 module, from the folder of the packages, the folder of this subject's own files, and a seed; it takes raw pixels
    (B, 3, H, W), or tensors by name. `judged_by`: classes are compared by the share of equal ones, vectors by their cosine. `distance`: a
    loss of distillation. `keep`: layers that pruning and low rank leave. `forms`: of `FORMS`. `macs`, `parameters`: shares that pruning
    and low rank leave. `schemes`: options of nncf.quantize.
    """

    name: str
    description: str
    build: Callable[[Path, Path, int], nn.Module]
    judged_by: Literal["classes", "vectors"] = "classes"
    distance: Any = "scores"
    keep: tuple[str, ...] = ()
    forms: tuple[str, ...]
    macs: float = 0.8
    parameters: float = 0.85
    schemes: Mapping[str, Mapping[str, str]]


def without_padding(inputs: Named) -> list[Batch]:
    """Batches of sentences in order of length, without the padding that a whole batch has; of images, `batches`."""
    if "attention_mask" not in inputs:
        return batches(inputs)
    lengths = inputs["attention_mask"].sum(1)
    order = np.argsort(lengths, kind="stable")
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [{name: torch.from_numpy(value[part, : lengths[part].max()]) for name, value in inputs.items()} for part in parts]


def cosine_distance(output: Tensor, expected: Tensor) -> Tensor:
    """One less the mean cosine of the vectors."""
    return 1 - torch.cosine_similarity(output, expected).mean()


def _vision_transformer() -> nn.Module:
    """timm's VisionTransformer with 64 patches, 4 blocks of 192 channels and 6 heads: 1.8 million parameters."""
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=192, depth=4, num_heads=6, num_classes=CLASSES)


def _convolutional() -> nn.Module:
    """timm's ResNet with a basic block in each of four stages, of 64 to 512 channels: 4.9 million parameters."""
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(64, 128, 256, 512), stem_width=64)


def _lite(level: int) -> Subject:
    name, side = f"efficientnet-lite{level}", IMAGES[f"efficientnet-lite{level}"][1]
    return Subject(
        name=name, description=f"EfficientNet-Lite{level} at {side} x {side}, ImageNet's weights",
        build=lambda packages, folder, seed: lite(packages, level), keep=("model._fc",), schemes=CONVOLUTIONS,
        forms=(*QUANTISED, *(NARROWED if level == 0 else ()), "together"),
    )  # fmt: skip


def _trained(name: str, what: str, make: Callable[[], nn.Module], steps: int, rate: float, classifier: str, schemes: Any) -> Subject:
    """A network that learns digits before photographs, once for each seed."""

    def build(packages: Path, folder: Path, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        file, data = folder / f"weights-{steps}.safetensors", lambda: digits_before_photographs(packages, seed)["train"]
        return trained_once(with_pixels(make()), file, data, steps=steps, rate=rate, seed=seed)

    return Subject(
        name=name, description=f"timm's {what}, digits before photographs at {SIDE} x {SIDE}", build=build, keep=(classifier,),
        forms=(*QUANTISED, *NARROWED, "together"), macs=0.5, parameters=0.6, schemes=schemes,
    )  # fmt: skip


MINILM = Subject(
    name="minilm", description="all-MiniLM-L6-v2, 64 tokens a sentence", build=lambda packages, folder, seed: minilm(packages),
    judged_by="vectors", distance=cosine_distance, forms=(*QUANTISED, "w5.9a8", *NARROWED[:-1], "together"), schemes=ATTENTION,
)  # fmt: skip
VIT = _trained("vision-transformer", "VisionTransformer, 4 blocks, 64 patches", _vision_transformer, 1200, 1e-3, "model.head", ATTENTION)
RESNET = _trained("resnet", "ResNet, a block in each of four stages", _convolutional, 300, 3e-3, "model.fc", CONVOLUTIONS)
SUBJECTS = {subject.name: subject for subject in (*map(_lite, range(3)), MINILM, VIT, RESNET)}


# Forms


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a form may use: inputs without labels (`batches`: for distillation), and how long it may train."""

    subject: Subject
    batches: Sequence[Batch]
    calibration: Sequence[Batch]
    steps: int
    seed: int


Pass = Callable[[nn.Module, Material], nn.Module]
"""From a module, which it may change, to the compressed one."""


def parameters_of(model: nn.Module) -> int:
    """Number of values of weights, in whatever form: parameters, and integer weights in buffers."""
    integers = (buffer for buffer in model.buffers() if buffer.dtype in (torch.int8, torch.uint8) and buffer.ndim > 1)
    return sum(parameter.numel() for parameter in model.parameters()) + sum(buffer.numel() for buffer in integers)


def chain(
    *passes: Pass, bits: float | None = 8, trained: bool = False, aware: bool = False, parts: int = 1, embedding_bits: int | None = None,
    **options: Any,
) -> Pass:  # fmt: skip
    """Passes, then distillation if it is `trained`, then muntin.quantize (`options`: of it), with embeddings of 4 bits if others have fewer
    than 8. `aware`: bits are learned in the distillation. `parts`: equal parts of the steps, of which it takes one."""

    def made(model: nn.Module, material: Material) -> nn.Module:
        teacher = copy.deepcopy(model)
        for each in passes:
            model = each(model, material)
        tables = [name for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)]
        narrow = {"embedding_bits": embedding_bits or 4} if tables and bits is not None and (embedding_bits or bits < 8) else {}
        if aware:
            if narrow:
                muntin.quantize(model, material.calibration, only=tables, **narrow)
            muntin.prepare_qat(model, material.calibration, bits=bits)
        if trained:
            given: Any = {"loss": material.subject.distance, "learning_rate": RATE, "seed": material.seed}
            muntin.distil(model, teacher, material.batches, steps=material.steps // parts, **given)
        if aware:
            muntin.freeze(model, material.calibration)
        elif bits is not None:
            muntin.quantize(model, material.calibration, bits=bits, **narrow, **options)
        return model

    return made


def ranks(model: nn.Module, material: Material, **options: Any) -> nn.Module:
    """Lower ranks; `options`: of muntin.low_rank."""
    given = {"parameters": material.subject.parameters, "multiple": MULTIPLE, "keep": material.subject.keep, **options}
    muntin.low_rank(model, material.calibration, **given)
    return model


def channels(model: nn.Module, material: Material, **options: Any) -> nn.Module:
    """Fewer channels; `options`: of muntin.prune."""
    muntin.prune(model, material.calibration, multiple=MULTIPLE, keep=material.subject.keep, **(options or {"macs": material.subject.macs}))
    return model


def torch_pruned(model: nn.Module, material: Material) -> nn.Module:
    """Pruned by torch-pruning to the share of the multiply-adds, as its examples for timm do it.

    Global, isomorphic pruning at the least ratio that meets the share; importance by Taylor, of the gradients of the cross-entropy with the
    network's own classes as labels.
    """
    images = [batch for batch in material.calibration if isinstance(batch, Tensor)]
    most = material.subject.macs * _macs(model, images[0])
    low, high, small = 0.0, 0.95, None
    for _ in range(10):
        middle = (low + high) / 2
        attempt = _pruned_by(model, images, middle)
        low, high, small = (low, middle, attempt) if _macs(attempt, images[0]) <= most else (middle, high, small)
    if small is None:
        raise SystemExit(f"torch-pruning does not leave {material.subject.macs} of the multiply-adds at any ratio")
    return small.eval()


def _macs(model: nn.Module, batch: Tensor) -> float:
    import torch_pruning

    count, _ = torch_pruning.utils.count_ops_and_params(copy.deepcopy(model), batch[:1])
    return float(count)


def _pruned_by(model: nn.Module, images: Sequence[Tensor], ratio: float) -> nn.Module:
    import timm
    import torch_pruning

    small = copy.deepcopy(model).eval().requires_grad_(True)
    attentions = [part for part in small.modules() if isinstance(part, timm.layers.Attention)]
    ignored = [layer for name, layer in small.named_modules() if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in CLASSIFIERS]
    pruner = torch_pruning.pruner.BasePruner(
        small, images[0][:1], importance=torch_pruning.importance.GroupTaylorImportance(), global_pruning=True, isomorphic=True,
        pruning_ratio=ratio, max_pruning_ratio=0.9, ignored_layers=ignored, num_heads={part.qkv: part.num_heads for part in attentions},
        prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=ratio, round_to=8,
    )  # fmt: skip
    for batch in images:
        scores = small(batch)
        nn.functional.cross_entropy(scores, scores.detach().argmax(1)).backward()
    pruner.step()
    for part in attentions:
        part.num_heads = pruner.num_heads[part.qkv]
        part.head_dim = part.qkv.out_features // (3 * part.num_heads)
        part.attn_dim = part.num_heads * part.head_dim
    small.zero_grad()
    return small


NEAREST: dict[str, Any] = {"rounding": "nearest", "min_sqnr_db": 0}
"""Scales of least squared error for each output channel, nearest rounding, and nothing else."""
FORMS: dict[str, Pass | None] = {
    "float": None,  # as it is
    "int8": chain(),
    "w4a8 nearest": chain(bits=4, **NEAREST),
    "w4a8": chain(bits=4),
    "w4.4a8": chain(bits=AVERAGE),
    "w5.9a8": chain(bits=5.9),
    "low rank": chain(ranks),
    "svd by energy": chain(partial(ranks, criterion="energy")),
    "prune": chain(channels, trained=True),
    "torch-pruning": chain(torch_pruned, trained=True),
    "together": chain(channels, ranks, trained=True, bits=AVERAGE),
}
"""Passes of muntin, alone and together, and other tools' ways. Forms that narrow layers are in INT8, so that their times compare."""
