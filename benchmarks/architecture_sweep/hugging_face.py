"""Models of transformers, built from small configurations with random weights. Nothing is downloaded.

`IMAGES`: classifiers and segmenters, written as folders for `muntin.open_model("hf:FOLDER")`. `TENSORS`: other models, written as ONNX
files by torch.onnx.export, with their inputs.
"""

from __future__ import annotations

import contextlib
import io
import pkgutil
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from architecture_sweep.pictures import real_pictures

LABELS = {number: f"class-{number}" for number in range(20)}
SIDE = 224
VOCABULARY, TOKENS = 2000, 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_DINO: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3}
_VIT: dict[str, Any] = {**_DINO, "intermediate_size": 768}
_MOBILEVIT: dict[str, Any] = {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320]}
# name -> class of the model, class of its configuration, arguments of that
IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VIT),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_VIT, "use_relative_position_bias": True}),
    "swin": ("SwinForImageClassification", "SwinConfig", {"embed_dim": 48, "depths": [2, 2, 4, 2]}),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", {"embed_dim": 48, "depths": [2, 2, 4, 2]}),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    ),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig", _MOBILEVIT),
    "mobilevitv2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"width_multiplier": 0.5}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {}),
    "efficientnet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    ),
    "focalnet": ("FocalNetForImageClassification", "FocalNetConfig", {"embed_dim": 48, "depths": [2, 2, 4, 2]}),
    "levit": ("LevitForImageClassification", "LevitConfig", {}),
    "pvt_v2": ("PvtV2ForImageClassification", "PvtV2Config", {}),
    "poolformer": ("PoolFormerForImageClassification", "PoolFormerConfig", {}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_DINO, "patch_size": 14}),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {"decoder_hidden_size": 128}),
    "mobilevit-segmenter": ("MobileViTForSemanticSegmentation", "MobileViTConfig", _MOBILEVIT),
    "dpt-segmenter": (
        "DPTForSemanticSegmentation",
        "DPTConfig",
        {**_VIT, "backbone_out_indices": [2, 3, 4, 5], "neck_hidden_sizes": [24, 48, 96, 192], "fusion_hidden_size": 64},
    ),
    "upernet": ("UperNetForSemanticSegmentation", "UperNetConfig", {"hidden_size": 64, "use_auxiliary_head": False}),
}


def write_folder(name: str, folder: Path, seed: int) -> None:
    """Write a model of `IMAGES` as save_pretrained does. Raises KeyError for another name."""
    import transformers

    kind, config_class, arguments = IMAGES[name]
    if name == "upernet":
        arguments = arguments | {"backbone_config": transformers.ConvNextConfig(
            hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 4, 2], out_features=["stage1", "stage2", "stage3", "stage4"]
        )}  # fmt: skip
    side = {"image_size": SIDE} if hasattr(getattr(transformers, config_class)(), "image_size") else {}
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config_class)(**arguments, **side, id2label=LABELS))
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)


Named = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class TensorModel:
    """A model with named inputs. `outputs`: entries of what it returns. `inputs`: makes a batch of inputs from a seed. `free`: the names
    of the free dimensions of each input, by axis."""

    kind: str
    config: Callable[[Any], Any]
    outputs: tuple[str, ...]
    inputs: Callable[[int, int], Named]
    free: Mapping[str, dict[int, str]]


def sentences() -> list[str]:
    """The first lines of docstrings of the standard library, read from its files."""
    lines = set()
    for module in pkgutil.iter_modules():
        spec = find_spec(module.name) if not module.name.startswith("_") and "site-packages" not in str(module.module_finder) else None
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            text = Path(spec.origin).read_text(encoding="utf-8", errors="ignore")
            lines |= {" ".join(line.split()) for line in re.findall(r'"""([A-Z][^"\n]{30,160}\.)', text)}
    return sorted(lines)


def texts(count: int, seed: int) -> Named:
    """Token ids and mask of real sentences: of random weights any numbering of words is as good as another."""
    lines = sentences()
    chosen = np.random.default_rng(seed).choice(len(lines), count, replace=False)
    ids, mask = np.zeros((count, TOKENS), np.int64), np.zeros((count, TOKENS), np.int64)
    for row, index in enumerate(chosen):
        words = [3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in re.findall(r"\w+|\S", lines[index])][: TOKENS - 2]
        ids[row, : len(words) + 2] = [2, *words, 1]
        mask[row, : len(words) + 2] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pixels(count: int, seed: int) -> Named:
    """Normalised pictures (B, 3, H, W)."""
    images = real_pictures(count, SIDE, SIDE, seed).astype(np.float32) / 255
    return {"pixel_values": np.ascontiguousarray(((images - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2), np.float32)}


_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "initializer_range": 0.08,
}
"""Weights are larger than transformers makes them at first: otherwise every text has nearly the same answer."""
_TEXT = {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")}
_PICTURE = {"pixel_values": {0: "batch"}}
_HIDDEN = ("last_hidden_state", "pooler_output")

TENSORS: dict[str, TensorModel] = {
    "bert": TensorModel(
        kind="BertModel", config=lambda t: t.BertConfig(vocab_size=VOCABULARY, **_SMALL), outputs=_HIDDEN, inputs=texts, free=_TEXT
    ),
    "distilbert": TensorModel(
        kind="DistilBertModel",
        config=lambda t: t.DistilBertConfig(vocab_size=VOCABULARY, dim=128, n_layers=4, n_heads=4, hidden_dim=512, initializer_range=0.08),
        outputs=_HIDDEN[:1],
        inputs=texts,
        free=_TEXT,
    ),
    "roberta-classifier": TensorModel(
        kind="RobertaForSequenceClassification",
        config=lambda t: t.RobertaConfig(vocab_size=VOCABULARY, num_labels=5, **_SMALL),
        outputs=("logits",),
        inputs=texts,
        free=_TEXT,
    ),
    "electra": TensorModel(
        kind="ElectraForTokenClassification",
        config=lambda t: t.ElectraConfig(vocab_size=VOCABULARY, num_labels=9, embedding_size=64, **_SMALL),
        outputs=("logits",),
        inputs=texts,
        free=_TEXT,
    ),
    "mpnet": TensorModel(
        kind="MPNetModel", config=lambda t: t.MPNetConfig(vocab_size=VOCABULARY, **_SMALL), outputs=_HIDDEN, inputs=texts, free=_TEXT
    ),
    "clip": TensorModel(
        kind="CLIPModel",
        config=lambda t: t.CLIPConfig(
            text_config={"vocab_size": VOCABULARY, "eos_token_id": 1, **_SMALL},
            vision_config={"image_size": SIDE, "patch_size": 16, **_SMALL},
            projection_dim=64,
        ),
        outputs=("text_embeds", "image_embeds"),
        inputs=lambda count, seed: texts(count, seed) | pixels(count, seed),
        free=_TEXT | _PICTURE,
    ),
    "dinov2-embeddings": TensorModel(
        kind="Dinov2Model", config=lambda t: t.Dinov2Config(image_size=SIDE, **_DINO), outputs=_HIDDEN, inputs=pixels, free=_PICTURE
    ),
    "depth-anything": TensorModel(
        kind="DepthAnythingForDepthEstimation",
        config=lambda t: t.DepthAnythingConfig(
            backbone_config=t.Dinov2Config(
                image_size=SIDE, **_DINO, out_indices=[3, 4, 5, 6], reshape_hidden_states=False, apply_layernorm=True
            ),
            reassemble_hidden_size=192,
            neck_hidden_sizes=[24, 48, 96, 192],
            fusion_hidden_size=32,
        ),
        outputs=("predicted_depth",),
        inputs=pixels,
        free=_PICTURE,
    ),
    "vit-mae-encoder": TensorModel(
        kind="ViTModel", config=lambda t: t.ViTConfig(image_size=SIDE, **_SMALL), outputs=_HIDDEN, inputs=pixels, free=_PICTURE
    ),
}


class TensorForm(nn.Module):
    """A model that takes its inputs by position and returns a tuple of the chosen outputs, as torch.onnx.export needs it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, names, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        answer = self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(answer[name] for name in self.outputs)


def build(name: str, seed: int) -> tuple[TensorModel, nn.Module]:
    """Return a model of `TENSORS` and its PyTorch form, which takes the inputs in their order."""
    import transformers

    entry = TENSORS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, entry.kind)(entry.config(transformers)).eval()
    return entry, TensorForm(model, tuple(entry.inputs(1, 0)), entry.outputs).eval()


def write_onnx(entry: TensorModel, model: nn.Module, path: Path) -> None:
    """Write the ONNX file as a user does: torch.onnx.export with named inputs and free dimensions."""
    inputs = entry.inputs(2, 0)
    dims = {name: torch.export.Dim(name, min=1, max=512) for axes in entry.free.values() for name in axes.values()}
    free = tuple({axis: dims[dim] for axis, dim in entry.free[name].items()} for name in inputs)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            model, tuple(torch.from_numpy(value) for value in inputs.values()), path, input_names=list(inputs),
            output_names=list(entry.outputs), dynamic_shapes=(free,), dynamo=True, opset_version=20, external_data=False, verbose=False,
        )  # fmt: skip
