"""What is trained in the GPU benchmarks: a model of a given size, random batches, and the loss of a step."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["vit", "gpt2", "llama", "bag"]
Batch = tuple[Tensor, Tensor]

DEVIATION = 0.02  # of the normal distribution that all but the bag draw their weights from
CHECKED_TOKENS = 2048  # up to which a check keeps the length: the usual way needs its square
PATCH = 16


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on.

    Args:
        name: In tables.
        kind: Vision transformer of timm, causal language model of Hugging Face, or pooling of a bag of instances.
        layers: Blocks.
        width: Of the residual stream; of the instances of a bag.
        heads: Of each attention.
        length: Tokens of a sequence, without a class token; instances of a bag.
        batch: Sequences in a step.
        classes: Classes, or size of the vocabulary.
        key_heads: Heads of keys and values, as many as ``heads`` when left out; Llama only.
        hidden: Width of the MLPs, 4 times ``width`` when left out.
    """

    name: str
    kind: Kind
    layers: int
    width: int
    heads: int
    length: int
    batch: int
    classes: int = 1000
    key_heads: int = 0
    hidden: int = 0

    @property
    def causal(self) -> bool:
        """Whether it is a language model."""
        return self.kind in ("gpt2", "llama")

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // (self.key_heads or self.heads)

    def small(self) -> "Task":
        """The same in what a kernel sees (tokens, heads, widths), with two layers and a small batch."""
        length = min(self.length, CHECKED_TOKENS) if self.causal else self.length
        return replace(self, layers=min(self.layers, 2), batch=min(self.batch, 2), length=length)

    def model(self) -> nn.Module:
        """A new model, without dropout, in training mode, on torch's default device."""
        hidden = self.hidden or 4 * self.width
        if self.kind == "vit":
            return self._vit(hidden)
        if self.kind == "bag":
            return Bag(self.width, 512, 256, self.classes)
        import transformers

        common: dict[str, Any] = {"use_cache": False, "vocab_size": self.classes, "bos_token_id": 0, "eos_token_id": 0}
        if self.kind == "gpt2":
            config: Any = transformers.GPT2Config(
                n_embd=self.width, n_layer=self.layers, n_head=self.heads, n_inner=hidden, n_positions=self.length,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
            )  # fmt: skip
        else:
            config = transformers.LlamaConfig(
                hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
                num_key_value_heads=self.key_heads or self.heads, intermediate_size=hidden,
                max_position_embeddings=self.length, tie_word_embeddings=False, **common,
            )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        return model.float().train()

    def _vit(self, hidden: int) -> nn.Module:
        from timm.models import VisionTransformer

        side = round(self.length**0.5)
        if side * side != self.length:
            raise ValueError(f"`length` of a ViT must be a square number, got {self.length}.")
        return VisionTransformer(
            img_size=side * PATCH, patch_size=PATCH, embed_dim=self.width, depth=self.layers, num_heads=self.heads,
            mlp_ratio=hidden / self.width, num_classes=self.classes,
        ).train()  # fmt: skip

    def batches(self, device: torch.device, count: int = 2) -> list[Batch]:
        """Random inputs and labels on ``device``: images, tokens, or a bag (1, instances, width)."""
        source: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        return [self._batch(source) for _ in range(count)]

    def _batch(self, source: dict[str, Any]) -> Batch:
        labels = torch.randint(self.classes, (self.batch,), **source)
        if self.kind == "vit":
            side = round(self.length**0.5) * PATCH
            return torch.randn(self.batch, 3, side, side, **source), labels
        if self.kind == "bag":
            return torch.randn(self.batch, self.length, self.width, **source), labels
        tokens = torch.randint(self.classes, (self.batch, self.length + 1), **source)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy in nats."""
        inputs, labels = batch
        logits = model(inputs)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def blocks(self, model: Any) -> list[nn.Module]:
        """What is compiled where blocks are."""
        if self.kind == "gpt2":
            return list(model.transformer.h)
        if self.kind == "llama":
            return list(model.model.layers)
        return list(model.blocks) if self.kind == "vit" else [model]

    @torch.no_grad()
    def sharpen(self, model: nn.Module) -> None:
        """Enlarge queries and keys so that scores have a deviation of about 1.4, as in a trained model.

        At the start attention is all but uniform, where entropy has no gradient to be checked.
        """
        if self.kind == "bag":
            model.attention.score.weight.mul_(10)  # type: ignore[union-attr, operator]
            return
        factor = (2 / (DEVIATION**2 * self.width)) ** 0.5
        for name, parameter in model.named_parameters():
            if name.endswith(("attn.qkv.weight", "q_proj.weight", "k_proj.weight")):
                parameter[: 2 * self.width].mul_(factor)  # of timm's 3 * width rows not those of the values
            elif name.endswith("c_attn.weight"):
                parameter[:, : 2 * self.width].mul_(factor)


class GatedAttention(nn.Module):
    """Weights of the instances of a bag (bags, instances, width) -> (bags, 1, instances), as in CLAM."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.value, self.gate, self.score = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(self.value(x).tanh() * self.gate(x).sigmoid())
        return scores.transpose(-1, -2).softmax(-1)


class Bag(nn.Module):
    """Attention pooling of a bag, of CLAM's sizes: (bags, instances, width) -> (bags, classes)."""

    def __init__(self, width: int, hidden: int, gate: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Linear(width, hidden)
        self.attention, self.head = GatedAttention(hidden, gate), nn.Linear(hidden, classes)

    def forward(self, bags: Tensor) -> Tensor:
        h = self.features(bags).relu()
        return self.head((self.attention(h) @ h).squeeze(1))


def gpt2(length: int, tokens: int = 16384) -> Task:
    """GPT-2 small, ``tokens`` in a step."""
    return Task(f"GPT-2 small, {length} tokens", "gpt2", 12, 768, 12, length, max(1, tokens // length), 50257)


TASKS = {
    "vit": Task("ViT-B/16, batch 128", "vit", 12, 768, 12, 196, 128),
    "gpt2-1k": gpt2(1024),
    "gpt2-4k": gpt2(4096),
    "gpt2-16k": gpt2(16384),
    "llama": Task("Llama, 125 M, 2048 tokens", "llama", 12, 768, 12, 2048, 8, 32000, key_heads=4, hidden=2048),
    "bag": Task("CLAM's attention, a bag of 50k", "bag", 1, 1024, 1, 50_000, 1, 2),
}
TINY = {
    "vit": Task("tiny ViT", "vit", 2, 32, 2, 4, 2, 5),
    "gpt2-1k": Task("tiny GPT-2", "gpt2", 2, 32, 2, 8, 2, 11),
    "llama": Task("tiny Llama", "llama", 2, 32, 4, 8, 2, 11, key_heads=2, hidden=48),
    "bag": Task("tiny bag", "bag", 1, 16, 1, 20, 1, 2),
}
# one axis of growth each; the other sizes stay
GROWTH = {
    "length": [
        replace(gpt2(length), name=f"GPT-2, 4 layers, {length} tokens", layers=4)
        for length in (512, 1024, 2048, 4096, 8192, 16384)
    ],
    "layers": [
        Task(f"ViT, {layers} layers", "vit", layers, 768, 12, 196, 64) for layers in (3, 6, 12, 24)
    ],
    "width": [
        Task(f"ViT, width {width}", "vit", 12, width, width // 64, 196, 64) for width in (192, 384, 768, 1536)
    ],
}  # fmt: skip
TINY_GROWTH = {"layers": [replace(TINY["vit"], name=f"tiny ViT, {layers} layers", layers=layers) for layers in (1, 2)]}
