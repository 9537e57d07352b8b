"""Many small Llamas at once: one tensor holds the parameters of all, so a sweep is a single training loop."""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LlamaStack:
    """A Llama over bytes, the same for every run: RMSNorm before, RoPE, SwiGLU, no biases, untied.

    The parameters are one tensor (runs, parameters); a run never sees another, not even one that has become NaN.

    Args:
        width: Of the residual stream.
        layers: Blocks.
        heads: Of each attention.
        hidden: Width of the MLPs.
        vocabulary: Tokens.
        deviation: Of the normal distribution that the matrices are drawn from.
        theta: Base of the rotary embedding.
        qk_norm: An RMSNorm on each head of queries and keys, before the rotation.
    """

    width: int = 64
    layers: int = 4
    heads: int = 4
    hidden: int = 192
    vocabulary: int = 256
    deviation: float = 0.02
    theta: float = 10000.0
    qk_norm: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one run, matrices (inputs, outputs), in the order in which they are stored."""
        width, hidden = self.width, self.hidden
        block = {
            "norm1": (width,), "query": (width, width), "key": (width, width), "value": (width, width),
            "output": (width, width), "norm2": (width,), "gate": (width, hidden), "up": (width, hidden),
            "down": (hidden, width),
        }  # fmt: skip
        if self.qk_norm:
            block |= {"query_norm": (width // self.heads,), "key_norm": (width // self.heads,)}
        blocks = {f"{layer}.{name}": shape for layer in range(self.layers) for name, shape in block.items()}
        return {"embedding": (self.vocabulary, width), **blocks, "norm": (width,), "head": (width, self.vocabulary)}

    def draw(self, seed: int) -> Tensor:
        """Parameters of one run (parameters,): normal matrices, norms of one."""
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([
            (torch.randn(shape, generator=generator) * self.deviation).view(-1) if len(shape) > 1 else torch.ones(shape)
            for shape in self.shapes.values()
        ])  # fmt: skip

    def decayed(self) -> Tensor:
        """Which parameters (parameters,) are in matrices, as weight decay wants to know."""
        return torch.cat([torch.full((prod(shape),), len(shape) > 1) for shape in self.shapes.values()])

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Views (runs, *shape) by name of parameters (runs, parameters)."""
        shapes = self.shapes
        # split and not slices: its backward writes the gradient once
        parts = flat.split([prod(shape) for shape in shapes.values()], dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts)}

    def __call__(self, flat: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and largest attention logit of every run.

        Args:
            flat: Parameters (runs, parameters).
            tokens: (runs, batch, length + 1).

        Returns:
            Mean cross-entropy in nats (runs,), and the largest |q.k| / sqrt(head width) over visible keys, for each
            layer (runs, layers), without gradient.
        """
        weights = self.unpack(flat)
        runs, batch, length = tokens.shape[0], tokens.shape[1], tokens.shape[2] - 1
        offsets = self.vocabulary * torch.arange(runs, device=tokens.device)[:, None, None]
        x = F.embedding(tokens[..., :-1] + offsets, weights["embedding"].flatten(0, 1)).view(runs, -1, self.width)
        rotary = self._rotary(length, flat)
        hidden_keys = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        largest = []
        for layer in range(self.layers):
            block = {name.split(".")[1]: part for name, part in weights.items() if name.startswith(f"{layer}.")}
            mixed, logit = self._attend(_norm(x, block["norm1"]), block, (runs, batch, length), rotary, hidden_keys)
            x = x + mixed
            y = _norm(x, block["norm2"])
            x = x + (F.silu(y @ block["gate"]) * (y @ block["up"])) @ block["down"]
            largest.append(logit)
        scores = _norm(x, weights["norm"]) @ weights["head"]
        losses = F.cross_entropy(scores.flatten(0, 1), tokens[..., 1:].flatten(), reduction="none")
        return losses.view(runs, -1).mean(1), torch.stack(largest, 1)

    def _attend(
        self, x: Tensor, block: dict[str, Tensor], shape: tuple[int, int, int], rotary: tuple[Tensor, Tensor],
        hidden_keys: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        runs, batch, length = shape
        query, key, value = (
            (x @ block[name]).view(runs * batch, length, self.heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        if self.qk_norm:
            query, key = (
                F.rms_norm(x, (x.shape[-1],), eps=1e-6).unflatten(0, (runs, batch)) * weight[:, None, None, None]
                for x, weight in ((query, block["query_norm"]), (key, block["key_norm"]))
            )
            query, key = query.flatten(0, 1), key.flatten(0, 1)
        scores = _rotate(query, *rotary) @ _rotate(key, *rotary).mT * query.shape[-1] ** -0.5
        with torch.no_grad():
            largest = scores.masked_fill(hidden_keys, 0.0).abs().view(runs, -1).amax(1)
        mixed = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1) @ value
        return mixed.transpose(1, 2).reshape(runs, batch * length, self.width) @ block["output"], largest

    def _rotary(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (length, head width), both halves alike."""
        half = self.width // self.heads // 2
        rates = self.theta ** (-torch.arange(half, dtype=like.dtype, device=like.device) / half)
        angles = (torch.arange(length, dtype=like.dtype, device=like.device)[:, None] * rates).repeat(1, 2)
        return angles.cos(), angles.sin()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6) * weight[:, None]


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines
