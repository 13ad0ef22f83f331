"""Checks that a model is a plain PyTorch module, which muntin can inspect, copy and rewrite."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

from muntin.errors import MuntinError


def check_module(model: object) -> None:
    """Raise `MuntinError` for a model that is no module, is on the meta device, or has TorchScript in it."""
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
            raise MuntinError(f"{_title(name)} is TorchScript, which is neither rewritten nor traced: give the original module")


def check_eager(model: object) -> None:
    """Like `check_module`, and raise for compiled code, which ignores hooks and replaced layers."""
    check_module(model)
    assert isinstance(model, nn.Module)
    for name, part in model.named_modules():
        if _is_wrapper(part) or getattr(part, "_compiled_call_impl", None) is not None:
            raise MuntinError(
                f"{_title(name)} is compiled by torch.compile: give the module that it was made of (its _orig_mod, or one whose compile() "
                "was not called), and compile the result"
            )


def eager_copy(model: nn.Module) -> nn.Module:
    """Copy a model without compiled code. Raises `MuntinError`, with advice, if it cannot be copied."""
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # computed tensors, tensors without values, objects that Python cannot copy
        raise MuntinError(f"cannot be copied: {_copying_advice(model, error)}") from error
    while _is_wrapper(copied):
        copied = copied._orig_mod  # type: ignore[assignment]
    for part in list(copied.modules()):
        for name, child in part._modules.items():  # second names too
            while child is not None and _is_wrapper(child):
                child = child._orig_mod  # type: ignore[assignment]
            part._modules[name] = child
    return copied


def _is_wrapper(part: nn.Module) -> bool:
    """Return True for the wrapper of `torch.compile`. Its class takes a second to import, and is loaded if a module was compiled."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(part, compiler.OptimizedModule)


def _title(name: str) -> str:
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
                owner = _title(name) if name else "it"
                return f"{owner} keeps a tensor that was computed with gradients, {key}: set it to None, or call it under no_grad"
    return f"{' '.join(str(error).split())[:200]}; its modules must hold objects that Python can copy"
