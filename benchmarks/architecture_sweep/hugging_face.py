"""Models of transformers, built from small configurations with random weights. Nothing is downloaded.

`IMAGES`: classifiers and segmenters, written as folders for `muntin.open_model("hf:FOLDER")`. `TENSORS`: other models, written as ONNX
files by torch.onnx.export, with their inputs.
"""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantizer_peers.data import real_pictures, sentences

LABELS = {number: f"class-{number}" for number in range(20)}
SIDE = 224
VOCABULARY, TOKENS = 2000, 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Named = dict[str, NDArray[Any]]
Values = dict[str, Any]
"""Arguments of a configuration; a tuple of a family and arguments is a configuration inside it."""

_DINO: Values = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3}
_VIT: Values = {**_DINO, "intermediate_size": 768}
_SWIN: Values = {"embed_dim": 48, "depths": [2, 2, 4, 2]}
_MOBILEVIT: Values = {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320]}
_CONVNEXT: Values = {
    "hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 4, 2], "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
IMAGES: dict[str, tuple[str, Values]] = {
    "vit": ("ViT", _VIT),
    "deit": ("DeiT", _VIT),
    "beit": ("Beit", {**_VIT, "use_relative_position_bias": True}),
    "swin": ("Swin", _SWIN),
    "swinv2": ("Swinv2", _SWIN),
    "convnextv2": ("ConvNextV2", {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}),
    "resnet": ("ResNet", {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}),
    "mobilevit": ("MobileViT", _MOBILEVIT),
    "mobilevitv2": ("MobileViTV2", {"width_multiplier": 0.5}),
    "mobilenet_v2": ("MobileNetV2", {}),
    "efficientnet": ("EfficientNet", {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}),
    "focalnet": ("FocalNet", _SWIN),
    "levit": ("Levit", {}),
    "pvt_v2": ("PvtV2", {}),
    "poolformer": ("PoolFormer", {}),
    "dinov2": ("Dinov2", {**_DINO, "patch_size": 14}),
    "segformer": ("Segformer", {"decoder_hidden_size": 128}),
    "mobilevit-segmenter": ("MobileViT", _MOBILEVIT),
    "dpt-segmenter": (
        "DPT",
        {**_VIT, "backbone_out_indices": [2, 3, 4, 5], "neck_hidden_sizes": [24, 48, 96, 192], "fusion_hidden_size": 64},
    ),
    "upernet": ("UperNet", {"hidden_size": 64, "use_auxiliary_head": False, "backbone_config": ("ConvNext", _CONVNEXT)}),
}
"""Family and arguments of its configuration, by name."""
SEGMENTERS = ("segformer", "mobilevit-segmenter", "dpt-segmenter", "upernet")


def _config(family: str, arguments: Values) -> Any:
    import transformers

    given = {key: _config(*value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    return getattr(transformers, f"{family}Config")(**given)


def write_folder(name: str, folder: Path, seed: int) -> None:
    """Write a model of `IMAGES` as save_pretrained does. Raises KeyError for another name."""
    import transformers

    family, arguments = IMAGES[name]
    side = {"image_size": SIDE} if hasattr(_config(family, {}), "image_size") else {}
    kind = f"{family}For{'SemanticSegmentation' if name in SEGMENTERS else 'ImageClassification'}"
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(_config(family, {**arguments, **side, "id2label": LABELS}))
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)


def texts(count: int, seed: int) -> Named:
    """Token ids and mask of real sentences: with random weights any numbering of words is as good as another."""
    lines = sentences()
    chosen = np.random.default_rng(seed).choice(len(lines), count, replace=False)
    ids, mask = np.zeros((count, TOKENS), np.int64), np.zeros((count, TOKENS), np.int64)
    for row, index in enumerate(chosen):
        words = [3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in re.findall(r"\w+|\S", lines[index])][: TOKENS - 2]
        ids[row, : len(words) + 2] = [2, *words, 1]
        mask[row, : len(words) + 2] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pixels(count: int, seed: int) -> Named:
    """Normalised images (B, 3, H, W)."""
    images = real_pictures(count, SIDE, SIDE, seed).astype(np.float32) / 255
    return {"pixel_values": np.ascontiguousarray(((images - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2), np.float32)}


def texts_and_pixels(count: int, seed: int) -> Named:
    return texts(count, seed) | pixels(count, seed)


@dataclass(frozen=True)
class TensorModel:
    """A model with named inputs: its class, the arguments of its family's configuration, `outputs` as it names them, and a function that
    makes a batch of inputs from a count and a seed."""

    kind: str
    family: str
    arguments: Values
    outputs: tuple[str, ...]
    inputs: Callable[[int, int], Named]


FREE = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}, "pixel_values": {0: "batch"}}
"""Names of the free dimensions of each input, by axis."""
_SMALL: Values = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
    "initializer_range": 0.08,  # larger than transformers' own, with which every text has nearly the same output
}  # fmt: skip
_WORDS: Values = {"vocab_size": VOCABULARY}
_HIDDEN = ("last_hidden_state", "pooler_output")
_DISTILLED: Values = {"dim": 128, "n_layers": 4, "n_heads": 4, "hidden_dim": 512, "initializer_range": 0.08}
_TOWERS: Values = {
    "text_config": {**_WORDS, "eos_token_id": 1, **_SMALL}, "vision_config": {"image_size": SIDE, "patch_size": 16, **_SMALL},
    "projection_dim": 64,
}  # fmt: skip
_STAGES: Values = {"image_size": SIDE, **_DINO, "out_indices": [3, 4, 5, 6], "reshape_hidden_states": False, "apply_layernorm": True}
_DEPTH: Values = {
    "backbone_config": ("Dinov2", _STAGES), "reassemble_hidden_size": 192, "neck_hidden_sizes": [24, 48, 96, 192], "fusion_hidden_size": 32,
}  # fmt: skip
TENSORS: dict[str, TensorModel] = {
    "bert": TensorModel("BertModel", "Bert", _WORDS | _SMALL, _HIDDEN, texts),
    "distilbert": TensorModel("DistilBertModel", "DistilBert", _WORDS | _DISTILLED, _HIDDEN[:1], texts),
    "roberta-classifier": TensorModel(
        "RobertaForSequenceClassification", "Roberta", {**_WORDS, "num_labels": 5, **_SMALL}, ("logits",), texts
    ),
    "electra": TensorModel(
        "ElectraForTokenClassification", "Electra", {**_WORDS, "num_labels": 9, "embedding_size": 64, **_SMALL}, ("logits",), texts
    ),
    "mpnet": TensorModel("MPNetModel", "MPNet", _WORDS | _SMALL, _HIDDEN, texts),
    "clip": TensorModel("CLIPModel", "CLIP", _TOWERS, ("text_embeds", "image_embeds"), texts_and_pixels),
    "dinov2-embeddings": TensorModel("Dinov2Model", "Dinov2", {"image_size": SIDE, **_DINO}, _HIDDEN, pixels),
    "depth-anything": TensorModel("DepthAnythingForDepthEstimation", "DepthAnything", _DEPTH, ("predicted_depth",), pixels),
    "vit-mae-encoder": TensorModel("ViTModel", "ViT", {"image_size": SIDE, **_SMALL}, _HIDDEN, pixels),
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
    model = getattr(transformers, entry.kind)(_config(entry.family, entry.arguments)).eval()
    return entry, TensorForm(model, tuple(entry.inputs(1, 0)), entry.outputs).eval()


def write_onnx(entry: TensorModel, model: nn.Module, path: Path) -> None:
    """Write the ONNX file as a user does: torch.onnx.export with named inputs and free dimensions."""
    inputs = entry.inputs(2, 0)
    dims = {name: torch.export.Dim(name, min=1, max=512) for each in inputs for name in FREE[each].values()}
    free = tuple({axis: dims[dim] for axis, dim in FREE[name].items()} for name in inputs)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            model, tuple(torch.from_numpy(value) for value in inputs.values()), path, input_names=list(inputs),
            output_names=list(entry.outputs), dynamic_shapes=(free,), dynamo=True, opset_version=20, external_data=False, verbose=False,
        )  # fmt: skip
