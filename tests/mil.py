"""Attention pooling over bags of instances, as ABMIL's public code writes it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ABMIL(nn.Module):
    """Plain or gated attention pooling; the softmax in four spellings."""

    def __init__(self, gated: bool, spelling: str = "torch") -> None:
        super().__init__()
        self.features = nn.Linear(6, 8)
        self.value, self.gate = nn.Linear(8, 4), nn.Linear(8, 4) if gated else None
        self.score, self.head = nn.Linear(4, 1), nn.Linear(8, 1)
        module = nn.Softmax(dim=1)
        self.softmax = {
            "torch": lambda scores: torch.softmax(scores, 1),
            "functional": lambda scores: F.softmax(scores, dim=1),
            "method": lambda scores: scores.softmax(dim=1),
            "module": lambda scores: module(scores),
        }[spelling]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Bag logits (batch, 1) of instances (batch, instances, 6), mask True = valid."""
        h = self.features(x).relu()
        gated = self.value(h).tanh() if self.gate is None else self.value(h).tanh() * self.gate(h).sigmoid()
        scores = self.score(gated).masked_fill(~mask.unsqueeze(-1), -math.inf)
        return self.head((self.softmax(scores) * h).sum(1))


def bags(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Padded bags and their mask."""
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return torch.randn(len(sizes), max(sizes), 6), mask
