"""Linear layers for inference on a CPU: weights in the order in which oneDNN reads them, GELU in the same pass.

A product of 1,024 tokens runs 1.1 times as fast as `nn.Linear`, one of 4 tokens 2.5 times (docs/experiments.md). The
numbers are those of `nn.Linear` up to the rounding of another order of sums.
"""

# ruff: noqa: SLF001 - oneDNN is reached through operators that torch keeps for its own compiler; `available` asks for them

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

# A weight is laid out for inputs of about so many tokens, and right for all.
_TOKENS = 1024


class FastLinear(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A linear layer that cannot be trained, and GELU after it where asked for."""

    def __init__(self, layer: nn.Linear, *, then: Literal["none", "gelu"] = "none") -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TOKENS)
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.then = then
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, states: Tensor) -> Tensor:
        """Return the product, the bias added, and its GELU where asked for."""
        algorithm = "none" if self.then == "gelu" else ""  # of GELU: exact, by the error function
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, self.then, [], algorithm)
        return product


def quicken(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model on a CPU, where its number format and the build allow it."""
    if not available(dtype):
        return
    for module in list(model.modules()):
        fused = _fuses_gelu(module)
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer.weight.dtype == dtype:
                setattr(module, name, FastLinear(layer, then="gelu" if fused and name == "dense" else "none"))
        if fused:
            module.intermediate_act_fn = nn.Identity()


def _fuses_gelu(module: nn.Module) -> bool:
    """Say whether a module is a linear layer with exact GELU behind it, as the BERT family writes it."""
    act = getattr(module, "intermediate_act_fn", None)
    return type(getattr(module, "dense", None)) is nn.Linear and isinstance(act, GELUActivation) and act.act is nn.functional.gelu


def available(dtype: torch.dtype) -> bool:
    """Say whether this build of torch has such layers for a number format."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
