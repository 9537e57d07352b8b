"""Every kind of attention that has projections of its own, as nets on (batch, tokens, WIDTH), and their logits."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import timm.layers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, HEADS, TOKENS, BATCH = 16, 4, 5, 3
SMALL: dict[str, Any] = dict(
    hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=2 * WIDTH, vocab_size=20,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


class Timm(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attn = timm.layers.Attention(WIDTH, HEADS, qkv_bias=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Torch(nn.Module):
    def __init__(self, cross: bool = False, add_bias_kv: bool = False) -> None:
        super().__init__()
        sizes = {"kdim": WIDTH - 3, "vdim": WIDTH - 5} if cross else {}
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=add_bias_kv, batch_first=True, **sizes)
        self.cross = cross
        nn.init.normal_(self.mha.in_proj_bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x[..., 3:], x[..., 5:]) if self.cross else (x, x)
        return self.mha(x, key, value, need_weights=False)[0]


class HuggingFace(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


class Written(nn.Module):
    """By hand, with grouped keys; the names of the projections are arguments.

    Args:
        names: Of query and key; one name for both and the value; or one of the query and one of key and value.
        norm: Makes a module for queries and keys of a head, as QKNorm should.
    """

    def __init__(
        self, names: tuple[str, ...] = ("to_q", "to_k"), key_heads: int = 2, norm: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = HEADS, key_heads, WIDTH // HEADS
        self.names, keys = names, key_heads * self.dim
        fused = {"qkv": [WIDTH + 2 * keys], "kv": [WIDTH, 2 * keys]}.get(names[-1], [WIDTH, keys])
        for name, size in zip(names, fused, strict=True):
            setattr(self, name, nn.Linear(WIDTH, size))
        if names[-1] not in ("qkv", "kv"):
            self.to_v = nn.Linear(WIDTH, keys)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.inner = None if norm is None else nn.ModuleList([norm(), norm()])

    def forward(self, x: Tensor) -> Tensor:
        made = [getattr(self, name)(x) for name in self.names]
        made += [self.to_v(x)] if hasattr(self, "to_v") else []
        parts = torch.cat(made, -1).split([WIDTH, self.kv_heads * self.dim, self.kv_heads * self.dim], -1)
        q, k, v = (part.unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in parts)
        if self.inner is not None:
            q, k = self.inner[0](q), self.inner[1](k)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != self.heads)
        return self.last(out.transpose(1, 2).flatten(-2))


class Eager(Written):
    """The same with a softmax of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for name in (*self.names, "to_v")
        )
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
        out = (q @ k.transpose(-1, -2) / self.dim**0.5).softmax(-1) @ v
        return self.last(out.transpose(1, 2).flatten(-2))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=HEADS, vocab_size=20, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2Model(config)


def qwen2() -> nn.Module:
    return transformers.Qwen2Model(transformers.Qwen2Config(**SMALL, num_key_value_heads=2))


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertModel(config, add_pooling_layer=False)


NETS: dict[str, Callable[[], nn.Module]] = {
    "timm": Timm,
    "torch": Torch,
    "torch_cross": lambda: Torch(cross=True),
    "torch_bias_kv": lambda: Torch(add_bias_kv=True),
    "bert": lambda: HuggingFace(bert()),
    "gpt2": lambda: HuggingFace(gpt2()),
    "qwen2_rope_gqa": lambda: HuggingFace(qwen2()),
    "written": Written,
    "written_fused_gqa": lambda: Written(("qkv",)),
    "written_kv": lambda: Written(("query", "kv"), key_heads=4),
    "eager": lambda: Eager(("q_lin", "k_lin")),
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name]()


class Fit(pl.LightningModule):
    """A net in a Trainer; with ``lr=0`` the optimizer changes nothing."""

    def __init__(self, net: nn.Module, lr: float = 0.0, batches: int = 1, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net, self.lr, self.batches, self.optimizer = net, lr, batches, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[0].roll(1, 1)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(inputs(self.batches).flatten(0, 1)), batch_size=BATCH)

    val_dataloader = test_dataloader = train_dataloader


def inputs(batches: int = 1) -> Tensor:
    """(batches, BATCH, TOKENS, WIDTH)."""
    return torch.randn(batches, BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


@contextmanager
def recorded() -> Any:
    """Logits of every attention that runs, in float64, (batch, heads, queries, keys); hidden ones are 0."""
    seen: list[Tensor] = []
    plain, softmax = F.scaled_dot_product_attention, Tensor.softmax

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        full = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q.double() @ full.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.tril()
        if attn_mask is not None:
            shown = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4
            scores = scores.masked_fill(~shown, 0.0)
        seen.append(scores)
        return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def own_softmax(self: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(self.double())
        return softmax(self, dim, *args, **kwargs)

    F.scaled_dot_product_attention, Tensor.softmax = attention, own_softmax  # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention, Tensor.softmax = plain, softmax  # type: ignore[assignment, method-assign]


def max_logits(net: nn.Module, x: Tensor) -> Tensor:
    """Largest |logit| of each head of the only attention of a net, (heads,)."""
    with recorded() as seen, torch.no_grad():
        net(x)
    (scores,) = seen
    return scores.detach().abs().amax((0, 2, 3))
