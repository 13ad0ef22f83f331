"""Encoder: the feature maps of a network of timm, which take the place of a HybridNet's stem and convolutional stages.

    image, 0-255 -> pad, if the network needs it -> timm's normalisation -> maps at strides 2, 4, ... 32

Axes: B images, C channels, H W map, O output channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.errors import RecipeError
from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, for_channels, timm_model

PHOTO = 3
"""Channels of the pictures that public weights were trained on."""


class EndPaddedConv2d(nn.Conv2d):
    """A convolution with ceil(size / stride) outputs, and zeros mostly at the end, `(B, C, H, W)`: TensorFlow's "SAME" without its case
    distinction.

    Sides that are multiples of the stride give TensorFlow's own answer. With other sides, TensorFlow pads at the beginning, too, so its
    windows begin elsewhere; here they do not, and the padding is a constant, which deployed graphs fold into the convolution. Takes the
    parameters of `conv`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        kernel_size, stride, dilation = ((one[0], one[-1]) for one in (conv.kernel_size, conv.stride, conv.dilation))
        bias = conv.bias is not None
        super().__init__(conv.in_channels, conv.out_channels, kernel_size, stride, 0, dilation, conv.groups, bias, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        pads: list[int] = []
        for size, spacing, step in zip(kernel_size, dilation, stride, strict=True):
            span = (size - 1) * spacing + 1
            before = max(0, span - step) // 2
            pads = [before, span - 1 - before, *pads]  # F.pad begins with the last axis
        self.pads = tuple(pads)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.conv2d(F.pad(x_BCHW, self.pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Encoder(nn.Module):
    """Feature maps of a timm network with random weights, from fine to coarse, `(B, C_i, H_i, W_i)` at `strides`.

    `name`: `timm:NAME`, a network with `features_only` whose maps halve from one to the next. Input: raw pixels, float 0-255, any
    H, W >= 1; normalised by timm's mean and standard deviation of the network, averaged if `channels` is not 3. A map has the input's
    height and width over its stride, rounded up. A network that rounds down, or refuses odd sides, gets pictures padded to multiples of its
    last stride (`divisor`), by repeating the last row and column, and its maps are those of the padded picture. Raises `RecipeError` for a
    network without such maps. Costs two to four passes of a tiny picture.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        kind, _, network = name.partition(":")
        if kind != "timm" or not network:
            raise RecipeError(f"encoder '{name}': write timm:NAME, a network of timm with feature maps (features_only)")
        self.name = name
        features: Any = timm_model(network, features_only=True, in_chans=channels)
        self.features: nn.Module = features
        for place, conv in list(features.named_modules()):
            if type(conv).__name__ == "Conv2dSame":  # its padding depends on the size, and would be computed in a deployed graph
                features.set_submodule(place, EndPaddedConv2d(conv))
        mean, std = features.default_cfg.get("mean", IMAGENET_MEAN), features.default_cfg.get("std", IMAGENET_STD)
        factor, shift = (torch.tensor(values) for values in (for_channels(std, channels), for_channels(mean, channels)))
        self.register_buffer("factor", (1 / (255 * factor)).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (shift / factor).reshape(1, -1, 1, 1), persistent=False)
        last = {stride: index for index, stride in enumerate(features.feature_info.reduction()) if stride > 1}
        self.strides, self.indices = tuple(last), tuple(last.values())
        """Strides of the maps, and their places among the network's; of several maps of one stride the last is taken."""
        self.channels: tuple[int, ...] = tuple(features.feature_info.channels()[index] for index in self.indices)
        if not last or any(coarse != 2 * fine for fine, coarse in zip(self.strides, self.strides[1:], strict=False)):
            raise RecipeError(f"encoder '{name}': its maps have strides {list(self.strides)}, and each has to be twice the one before")
        self.divisor = 1
        if self._fault():
            self.divisor = self.strides[-1]
            if fault := self._fault():
                raise RecipeError(f"encoder '{name}': it does not take pictures of any size ({fault}): choose a convolutional network")

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        H, W = image_BCHW.shape[2:]
        if self.divisor > 1:  # without a condition on the sides, which an exported graph cannot hold
            image_BCHW = F.pad(image_BCHW, (0, -W % self.divisor, 0, -H % self.divisor), mode="replicate")
        maps = self.features(image_BCHW * self.factor - self.shift)
        return [maps[index] for index in self.indices]

    @torch.no_grad()
    def _fault(self) -> str:
        """Describe a fault in the maps of small pictures; empty if there is none."""
        training, far = self.training, self.strides[-1]
        self.eval()
        try:
            for sides in ((1, 1), (far + 5, 2 * far - 11)):
                expected = [(c, *self._sides(sides, stride)) for c, stride in zip(self.channels, self.strides, strict=True)]
                maps = self(torch.zeros(1, self.factor.shape[1], *sides))
                received = [tuple(map_.shape[1:]) for map_ in maps]
                if received != expected:
                    return f"its maps of {sides[0]} x {sides[1]} pixels are {received}, not {expected}"
        except (AssertionError, RuntimeError, ValueError) as error:
            return " ".join(str(error).split())[:200] or type(error).__name__
        finally:
            self.train(training)
        return ""

    def _sides(self, sides: tuple[int, int], stride: int) -> tuple[int, ...]:
        """Height and width of a map."""
        return tuple(-(-(side + -side % self.divisor) // stride) for side in sides)


def encoder_tensors(encoder: Encoder, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Find the tensors of an encoder, by its own names, among those of timm's network, whole or `features_only`.

    Returns them, the names that are not in the encoder (such as the classifier's), and notes. timm renames modules in `features_only`
    (`stages.0` to `stages_0`), so dots and underscores are compared as one. The weights of a layer that reads 3 channels are turned into
    ones for the encoder's: channels beyond the third, and one or two in place of three, get the mean, and all are scaled so that a grey
    picture gives the same sums.
    """
    own = encoder.features.state_dict()
    names = {_plain(key.removeprefix("model.")): key for key in own}
    tensors, others, notes = {}, [], []
    for key, tensor in stored.items():
        name = names.get(_plain(key)) or names.get(_plain(key.removeprefix("encoder.").removeprefix("model.")))
        if name is None:
            others.append(key)
            continue
        count = encoder.factor.shape[1]
        if count != PHOTO and tensor.ndim == 4 and tensor.shape[1] == PHOTO and own[name].shape[1] == count:
            notes.append(f"{key}: weights of {PHOTO} channels, spread over {count}")
            tensor = _for_inputs(tensor, count)
        tensors[name] = tensor
    return tensors, others, notes


def _plain(key: str) -> str:
    return key.replace("_", ".")


def _for_inputs(weight_OCHW: Tensor, channels: int) -> Tensor:
    """Weights for another number of input channels; see `encoder_tensors`."""
    mean_O1HW = weight_OCHW.mean(1, keepdim=True)
    parts = [mean_O1HW] * channels if channels < PHOTO else [weight_OCHW, *[mean_O1HW] * (channels - PHOTO)]
    return torch.cat(parts, 1) * (PHOTO / channels)
