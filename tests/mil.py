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


# --- what frameworks return, in the least code that has their layout -------------------------------------------------


class Pooling(nn.Module):
    """Attention pooling of one bag (instances, 6); what it returns is up to its children."""

    def __init__(self, branches: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.features, self.hidden = nn.Linear(6, 8), nn.Linear(8, 4)
        self.score, self.head = nn.Linear(4, branches), nn.Linear(8, classes)

    def parts(self, x: Tensor, mask: Tensor | None = None, fill: float = -math.inf) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, scores (..., branches, instances) before and weights after the softmax."""
        h = self.features(x).tanh()
        scores = self.score(self.hidden(h).tanh()).transpose(-1, -2)
        scores = scores if mask is None else scores.masked_fill(~mask.bool().unsqueeze(-2), fill)
        weights = scores.softmax(-1)
        return self.head((weights @ h).mean(-2)), scores, weights


class Clam(Pooling):
    """(logits, probabilities, label, scores (1, N) or by class (C, N), results)."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        logits, scores, _ = self.parts(h)
        logits = logits.unsqueeze(0)
        return logits, logits.softmax(1), logits.topk(1, 1)[1], scores, {}


class AmlabAttention(Pooling):
    """(probability, label, weights (1, N)) of a batch of one bag."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, weights = self.parts(x.squeeze(0))
        return logits[:1].sigmoid(), logits[:1] > 0, weights


class Dsmil(Pooling):
    """(instance classes (N, C), bag logits, weights (N, C), bag features)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, _, weights = self.parts(x)
        return self.head(self.features(x).tanh()), logits.unsqueeze(0), weights.T, weights @ x


class AemDsmil(Pooling):
    """(instance classes, bag logits, scores (C, N)): the same model with another layout."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, _ = self.parts(x[0])
        return self.head(self.features(x[0]).tanh()), logits.unsqueeze(0), scores


class Acmil(Pooling):
    """(branch logits, bag logits, scores (1, K, N)), the largest of each branch dropped in training."""

    def __init__(self) -> None:
        super().__init__(branches=5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, scores, _ = self.parts(x[0])
        if self.training:
            scores = scores.scatter(-1, scores.argmax(-1, keepdim=True), -1e9)
        logits = self.head(scores.softmax(-1) @ self.features(x[0]).tanh())
        return logits, logits.mean(0, keepdim=True), scores.unsqueeze(0)


class AemAbmil(Pooling):
    """(logits, scores (1, 1, N))."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, scores, _ = self.parts(x[0])
        return logits.unsqueeze(0), scores.unsqueeze(0)


class AemMha(Pooling):
    """(logits, scores (H, 1, N))."""

    def __init__(self) -> None:
        super().__init__(branches=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, scores, _ = self.parts(x[0])
        return logits.unsqueeze(0), scores.unsqueeze(1)


class TorchmilAbmil(Pooling):
    """(logits (B,), scores (B, N)) of padded bags; the padding is hidden from the softmax and left in the scores."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.parts(x, mask)[0][:, 0], self.parts(x)[1].squeeze(-2)


class TridentAbmil(Pooling):
    """(features (B, branches, 8), scores (B, branches, H, N)) with -1e9 on padding."""

    def __init__(self) -> None:
        super().__init__(branches=6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits, scores, _ = self.parts(x, mask, -1e9)
        return logits.unsqueeze(1), scores.unflatten(1, (2, 3))


class MilLab(Pooling):
    """(results, log): log["attention"] (B, K, N) with finfo.min on padding, a list of bags, or None unless asked."""

    def forward(
        self, h: Tensor | list[Tensor], mask: Tensor | None = None, return_attention: bool = True
    ) -> tuple[dict, dict]:
        if isinstance(h, list):
            found = [self.parts(one.unsqueeze(0)) for one in h]
            logits, attention = torch.cat([logits for logits, _, _ in found]), [scores for _, scores, _ in found]
        else:
            logits, attention, _ = self.parts(h, mask, torch.finfo(h.dtype).min)
        return {"logits": logits, "loss": None}, {"attention": attention if return_attention else None}
