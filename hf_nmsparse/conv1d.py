"""NMConv1D, transformers' ``Conv1D`` in sparse training: it is a linear layer whose weight lies transposed."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_nmsparse.layers import NMLayer
from hf_nmsparse.srste import masked_linear

__all__ = ["NMConv1D"]


class NMConv1D(NMLayer, Conv1D):
    """The linear layer of GPT-2 and its kin in sparse training; its weight is ``[in_features, out_features]``."""

    stock = Conv1D
    weight: nn.Parameter

    def __repr__(self) -> str:
        return f"NMConv1D(nf={self.nf}, nx={self.nx}, pattern={self.pattern})"

    def sparse_forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[..., in_features]``; returns ``[..., out_features]``."""
        mask = self.current_mask()
        return masked_linear(input, self.weight.t(), self.bias, mask, self.pattern, self.soft, self.pruned_scale)
