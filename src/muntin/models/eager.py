"""What a model has to be for muntin to look into it, copy and rewrite it: a plain module of PyTorch."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

from muntin.errors import MuntinError


def check_module(model: object) -> None:
    """Raises `MuntinError` for what is no module, has no values, or is TorchScript in whole or in part."""
    if not isinstance(model, nn.Module):
        raise MuntinError(
            f"the model is of type {type(model).__name__}: give a torch.nn.Module; weights alone go into one by its load_state_dict"
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise MuntinError(
            "the model is on the meta device, without values: load its weights first (to_empty, or load_state_dict with assign=True)"
        )
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise MuntinError(f"{_called(name)} is TorchScript, which is neither rewritten nor traced: give the module it was made of")


def check_eager(model: object) -> None:
    """As `check_module`, and for what is compiled: such code does not show what goes into layers, nor that one was replaced."""
    check_module(model)
    assert isinstance(model, nn.Module)
    for name, part in model.named_modules():
        if _is_wrapper(part) or getattr(part, "_compiled_call_impl", None) is not None:
            raise MuntinError(
                f"{_called(name)} is compiled by torch.compile: give the module that it was made of (its _orig_mod, or one whose compile() "
                "was not called), and compile what comes of it"
            )


def eager_copy(model: nn.Module) -> nn.Module:
    """A copy without compiled code. Raises `MuntinError` where there can be none, with what to do."""
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # tensors that were computed, or without values; what Python cannot copy
        raise MuntinError(f"cannot be copied: {_copying_advice(model, error)}") from error
    while _is_wrapper(copied):
        copied = copied._orig_mod  # type: ignore[assignment]
    for part in list(copied.modules()):
        for name, child in part._modules.items():  # also the second name of one that has two
            while child is not None and _is_wrapper(child):
                child = child._orig_mod  # type: ignore[assignment]
            part._modules[name] = child
    return copied


def _is_wrapper(part: nn.Module) -> bool:
    """Whether it is what `torch.compile` makes of a module, whose class takes a second to import: it is there where one was compiled."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(part, compiler.OptimizedModule)


def _called(name: str) -> str:
    return f"'{name}', a part of the model," if name else "the model"


def _copying_advice(model: nn.Module, error: Exception) -> str:
    for name, part in model.named_modules():
        if any(key.endswith("_mask") and f"{key[:-5]}_orig" in part._parameters for key in part._buffers):
            return f"'{name}' is pruned by masks: call torch.nn.utils.prune.remove for it first"
        norms = [f"{key[:-2]}_v" for key in part._parameters if key.endswith("_g")]
        norms += [f"{key[:-5]}_u" for key in part._parameters if key.endswith("_orig")]
        if any(key in part._parameters or key in part._buffers for key in norms):
            return "use weight_norm and spectral_norm of torch.nn.utils.parametrizations instead of those of torch.nn.utils"
        for key, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                owner = _called(name) if name else "it"
                return f"{owner} keeps a tensor that was computed with gradients, {key}: set it to None, or call it under no_grad"
    return f"{' '.join(str(error).split())[:200]}; have its modules hold what Python can copy"
