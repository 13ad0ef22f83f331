from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import muntin
from muntin import open_model, verify
from muntin.deployment.sources.source_export import SourceOptions, export_source
from muntin.errors import MuntinError, RecipeError
from muntin.runtime.verification.exactness import sums_saturate

transformers = pytest.importorskip("transformers")  # of the extra `dev`
LABELS = {0: "sky", 1: "road", 2: "tree"}


def write_classifier(folder: Path) -> Any:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16, id2label=LABELS
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def test_classifier_answers_as_with_its_processor(tmp_path: Path) -> None:
    own = write_classifier(tmp_path)
    opened = open_model(f"hf:{tmp_path}")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = own(**transformers.ViTImageProcessor.from_pretrained(tmp_path)(pixels, return_tensors="pt")).logits
    scores = opened.model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert (opened.size, opened.classes, opened.signature.task) == ((32, 32), ("sky", "road", "tree"), "classify")
    assert opened.weights is not None
    assert opened.weights.tensors == len(own.state_dict())
    logging = transformers.utils.logging
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (True, logging.WARNING)  # unchanged


@torch.no_grad()
def test_segmenter_scores_in_the_size_of_the_picture(tmp_path: Path) -> None:
    config = transformers.SegformerConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, id2label=LABELS
    )
    own = transformers.SegformerForSemanticSegmentation(config).eval()
    own.save_pretrained(tmp_path)
    processor = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_rescale": False, "size": 64}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    opened = open_model(f"hf:{tmp_path}")
    pixels = torch.randint(0, 256, (1, 3, 64, 64)).float()
    quarter = own((pixels - 0.5) / 0.25).logits  # raw pixels, as the processor does not rescale
    assert quarter.shape == (1, 3, 16, 16)
    expected = torch.nn.functional.interpolate(quarter, (64, 64), mode="bilinear")
    torch.testing.assert_close(opened.model(pixels), expected, rtol=1e-3, atol=1e-3)
    assert any("resized from 16 x 16" in note for note in opened.notes)


@torch.no_grad()
def test_reversed_channels_and_a_file_of_weights(tmp_path: Path) -> None:
    own = write_classifier(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "other.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_flip_channel_order": True, "crop_size": 32, "do_center_crop": True}))
    assert open_model(f"hf:{tmp_path}").weights is None
    with safe_open(tmp_path / "other.safetensors", framework="pt") as file:  # names of the file are not those of the model
        assert not set(file.keys()) <= own.state_dict().keys()
    opened = open_model(f"hf:{tmp_path}", tmp_path / "other.safetensors")
    pixels = torch.randint(0, 256, (1, 3, 32, 32)).float()
    torch.testing.assert_close(opened.model(pixels), own(pixels.flip(1) / 255).logits, rtol=1e-4, atol=1e-4)


def test_token_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    ids = np.random.default_rng(0).integers(0, 90, (12, 9))
    np.savez(tmp_path / "inputs.npz", allow_pickle=False, input_ids=ids, attention_mask=np.ones_like(ids))
    options = SourceOptions(calibration=tmp_path / "inputs.npz")
    artifact, notes = export_source(f"hf:{tmp_path / 'bert'}", tmp_path / "artifact", options, integer=True, sizes=None)
    assert [(info.name, info.shape) for info in artifact.manifest.signature.inputs] == [
        ("input_ids", ("batch", "tokens")), ("attention_mask", ("batch", "tokens")),
    ]  # fmt: skip
    assert artifact.manifest.measured["integer_coverage"] == 1.0 or sums_saturate()
    assert verify(artifact.path).passed
    assert any(note.startswith("model.safetensors: all ") for note in notes)
    row = {
        name: torch.from_numpy(np.ones((2, 9), np.int64) if name == "attention_mask" else ids[:2])
        for name in ("input_ids", "attention_mask")
    }
    named = muntin.export(f"hf:{tmp_path / 'bert'}", path=tmp_path / "named", calibration=[row])
    assert named.manifest.signature.inputs == artifact.manifest.signature.inputs
    assert named.manifest.measured["source"] == f"hf:{tmp_path / 'bert'}" and named.manifest.measured["source_notes"]
    with pytest.raises(RecipeError, match=r"--size: of models for pictures, and .*inputs.npz holds inputs by name"):
        export_source("timm:any", tmp_path / "b", SourceOptions(calibration=options.calibration, size="32"), integer=True, sizes=None)


def test_folders_that_cannot_be_opened(tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(MuntinError, match=message) as caught:
            open_model(f"hf:{tmp_path}", **options)
        assert "\n" not in str(caught.value)

    def set_config(**values: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | values))

    refused("config.json: there is no such file; give the folder of a model of transformers")
    write_classifier(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    refused("2 classes: the model in .* has 3", classes=2)
    refused("4 channels: the model in .* takes 3", channels=4)
    refused("fails on a picture of 40 x 40", size=40)
    set_config(architectures=["MyOwnNet"])
    refused("has no class 'MyOwnNet'.*code in the folder is not run")
    set_config(architectures=["BertModel"])
    refused("takes input_ids, not pictures")
    set_config(architecture="resnet18", pretrained_cfg={})
    refused("holds a model of timm: give timm:resnet18 --weights")
    set_config()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if "classifier" not in key}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(r"2 of the \d+ tensors of ViTForImageClassification are missing \(classifier.bias, classifier.weight\)")
    save_file(tensors | {"classifier.weight": torch.zeros(9, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(r"classifier.weight is \(9, 32\) and in the model \(3, 32\): give the config.json")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors").unlink()
    set_config(architectures=["ViTModel"])
    refused("returns BaseModelOutputWithPooling with last_hidden_state, pooler_output")
    set_config()
    (tmp_path / "preprocessor_config.json").unlink()
    refused("has no preprocessor_config.json.*give --mean and --std")
    assert open_model(f"hf:{tmp_path}", mean=[0.5], std=[0.5]).size == (32, 32)
