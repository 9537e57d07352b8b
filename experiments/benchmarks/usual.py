"""The usual way to get the same terms: hooks on materialised tensors and torch's own spectral norm, for comparison.

Everything takes a plain network: a timm ViT, a causal Hugging Face model, or the ``Bag`` of ``tasks``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from experiments.models import ImageClassifier

TINY = 1e-8  # keeps log finite, as public code does


class Terms:
    """Penalties that hooks leave in a forward, to be added to the loss."""

    def __init__(self) -> None:
        self._terms: list[tuple[float, list[Tensor]]] = []

    def new(self, weight: float) -> list[Tensor]:
        """A list for the penalties of one term, whose mean counts ``weight``."""
        collected: list[Tensor] = []
        self._terms.append((weight, collected))
        return collected

    def add(self, loss: Tensor) -> Tensor:
        """``loss`` plus every term of the last forward."""
        for weight, collected in self._terms:
            loss = loss + weight * torch.stack(collected).mean()
            collected.clear()
        return loss


class HookedClassifier(ImageClassifier):
    """Adds what forward hooks collect to the loss in ``training_step``."""

    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.terms = Terms()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.terms.add(super().training_step(batch, batch_idx))


def add_entropy(net: nn.Module, terms: Terms, weight: float) -> None:
    """Attention without the fused kernel, so that its probabilities can be hooked; normalised entropy, maximised."""
    collected = terms.new(weight)

    def collect(probs: Tensor, causal: bool) -> None:
        entropy = -(probs * (probs + TINY).log()).sum(-1)
        if causal:  # the first row sees one key
            entropy = entropy[..., 1:]
            visible = torch.arange(2, probs.shape[-1] + 1, device=probs.device)
        else:
            visible = torch.tensor(probs.shape[-1])
        collected.append(-(entropy / visible.log()).mean())

    if hasattr(net, "set_attn_implementation"):
        net.set_attn_implementation("eager")  # type: ignore[operator]
        for attention in _attentions(net):
            attention.register_forward_hook(lambda module, args, output: collect(output[1], causal=True))
    elif hasattr(net, "blocks"):
        for block in net.blocks:  # type: ignore[union-attr]
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_pre_hook(
                _training_only(lambda module, args: collect(args[0], causal=False))
            )
    else:
        net.attention.register_forward_hook(lambda module, args, output: collect(output, causal=False))  # type: ignore[operator, union-attr]


def add_density(net: nn.Module, terms: Terms, weight: float, epsilon: float) -> None:
    """DEFT's public code: ``x^2 / (x^2 + epsilon)`` of the activation's output."""
    collected = terms.new(weight)

    def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
        square = args[0].square()
        collected.append((square / (square + epsilon)).mean())

    for name, module in net.named_modules():
        if name.endswith(("mlp.fc2", "mlp.c_proj", "mlp.down_proj")):
            module.register_forward_pre_hook(_training_only(collect))


def add_spectral_norm(net: nn.Module) -> None:
    """``torch.nn.utils.parametrizations.spectral_norm`` on every matrix: no gain, a power iteration in each forward."""
    for module in matrices(net).values():
        spectral_norm(module)


def add_z_loss(net: nn.Module, terms: Terms, weight: float) -> None:
    """``logsumexp(logits)^2`` of logits in float32."""
    collected = terms.new(weight)
    _head(net).register_forward_hook(
        lambda module, args, output: collected.append(output.float().logsumexp(-1).square().mean())
    )


def add_prediction_entropy(net: nn.Module, terms: Terms, weight: float) -> None:
    """Entropy of ``softmax(logits)`` in float32, in units of log(classes), maximised: the confidence penalty."""
    collected = terms.new(weight)

    def collect(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        log_probs = output.float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        collected.append(-entropy.mean() / torch.tensor(output.shape[-1]).log())

    _head(net).register_forward_hook(collect)


class Clip:
    """QK-clip with materialised scores.

    Args:
        net: A timm ViT or a GPT-2; any, where nothing is clipped.
        threshold: Largest ``|logit|`` allowed.
    """

    def __init__(self, net: nn.Module, threshold: float) -> None:
        self.threshold = threshold
        self.projections = [
            module for name, module in net.named_modules() if name.endswith(("attn.qkv", "attn.c_attn"))
        ]
        self.largest: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, torch's attention also computes the largest ``|logit|`` of each head."""
        attention = F.scaled_dot_product_attention

        def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
                scores = query @ keys.mT * query.shape[-1] ** -0.5
                if kwargs.get("is_causal") or kwargs.get("attn_mask") is not None:  # causal in either form
                    scores = scores.tril()
                self.largest.append(scores.abs().amax((0, 2, 3)))
            return attention(query, key, value, *args, **kwargs)

        F.scaled_dot_product_attention = watched  # type: ignore[assignment]
        try:
            yield
        finally:
            F.scaled_dot_product_attention = attention  # type: ignore[assignment]

    @torch.no_grad()
    def clip(self) -> None:
        """Scale queries and keys of the heads that exceed the threshold, after an optimizer step."""
        for projection, largest in zip(self.projections, self.largest, strict=True):
            factor = (self.threshold / largest.float()).clamp(max=1).sqrt()
            for tensor in (projection.weight, projection.bias):
                assert isinstance(tensor, Tensor)
                # (3 * heads * dim, inputs), and the transpose of it in GPT-2
                rows = tensor.mT if _is_conv1d(projection) and tensor.dim() > 1 else tensor
                heads = rows.unflatten(0, (3, len(largest), -1))
                heads[:2].mul_(factor.view(-1, *[1] * (heads.dim() - 2)))
        self.largest.clear()


def matrices(net: nn.Module) -> dict[str, nn.Module]:
    """Linear maps and convolutions by name, without heads that are tied to an embedding."""
    tied = {id(module.weight) for module in net.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in net.named_modules()
        if (isinstance(module, (nn.Linear, nn.Conv2d)) or _is_conv1d(module)) and id(module.weight) not in tied
    }


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear map, which keeps its weight as (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"


def _attentions(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if type(module).__name__ in ("GPT2Attention", "LlamaAttention")]


def _head(net: nn.Module) -> nn.Module:
    return net.get_submodule("lm_head" if hasattr(net, "lm_head") else "head")


def _training_only(hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: hook(module, args) if module.training else None
