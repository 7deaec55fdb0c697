"""The client's loss: mean cross-entropy against the class bank + mu * L_orth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def alignment_loss(features: Tensor, labels: Tensor, bank: Tensor, logit_scale: float) -> Tensor:
    """Mean CE of softmax_c(logit_scale * v(x).t_c): features (N, D) and bank (C, D) of unit length, labels (N,)."""
    return cross_entropy(logit_scale * features @ bank.T, labels)


def orthogonal_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Return (1 - mean cosine of same-class pairs) + |mean cosine of different-class pairs|; a term without pairs is 0.

    The orthogonal projection loss of Ranasinghe et al., ICCV 2021, over the pairs of a batch of unit features (N, D).
    """
    cosines = features @ features.T
    same = labels[:, None] == labels[None, :]
    pairs = torch.ones_like(same).triu(diagonal=1)
    alike, apart = cosines[same & pairs], cosines[~same & pairs]
    loss = features.new_zeros(())
    if alike.numel():
        loss = loss + 1.0 - alike.mean()
    if apart.numel():
        loss = loss + apart.mean().abs()
    return loss
