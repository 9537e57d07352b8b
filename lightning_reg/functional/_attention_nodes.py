"""Autograd nodes of attention entropy, one for each way: in blocks, in one go, in a kernel, by torch's attention twice.

All give the same numbers; ``attention_entropy.attention_path`` chooses. Letters as in ``_scores``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional._scores import (
    HIDDEN_SCORE,
    Block,
    Scores,
    cut,
    entropy_of,
    entropy_push,
    exact_dtype,
    full_precision,
    probs_of,
    upcast,
)

# bound now: capture.py replaces the attribute while a training batch is in flight
_attention = F.scaled_dot_product_attention


# --- in blocks of scores ---------------------------------------------------------------------------------------------


class BlockwiseEntropy(torch.autograd.Function):
    """Tap on queries, keys and an additive bias; the backward recomputes the scores block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        scale: float,
        is_causal: bool,
        top_k: int | None,
        window: int | None,
    ) -> tuple[Tensor, ...]:
        """Return query, key, the bias if there is one, and the entropy (batch, heads, queries)."""
        entropy, push = Scores(query, key, bias, mask, scale, is_causal, top_k, window, positions).entropy()
        ctx.save_for_backward(query, key, bias, mask, positions, entropy, push)
        ctx.arguments = (scale, is_causal, top_k, window)
        ctx.set_materialize_grads(False)
        passed = (tensor.view_as(tensor) for tensor in (query, key, bias) if tensor is not None)
        return (*passed, entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add the entropy's gradient to those of query, key and bias."""
        query, key, bias, mask, positions, entropy, push = ctx.saved_tensors
        *passed, grad_entropy = (*grads[:2], None, grads[2]) if bias is None else grads
        if grad_entropy is not None:
            scale, is_causal, top_k, window = ctx.arguments
            scores = Scores(query, key, bias, mask, scale, is_causal, top_k, window, positions)
            # what was kept knows nothing of its own derivative
            kept = None if torch.is_grad_enabled() else push
            with_bias = bias is not None and ctx.needs_input_grad[2]
            pulls = scores.gradients(entropy, grad_entropy, with_bias, kept)
            passed = [
                _joined(grad, pull, tensor)
                for grad, pull, tensor in zip(passed, pulls, (query, key, bias), strict=True)
            ]
        return (*passed, *(None,) * 6)


def _joined(grad: Tensor | None, pull: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """Sum of two gradients of ``tensor``; overwrites ``pull``."""
    if pull is None or tensor is None:
        return grad
    if grad is not None:
        pull = pull + grad if torch.is_grad_enabled() else pull.add_(grad)
    return pull.to(tensor.dtype)


# --- in one go -------------------------------------------------------------------------------------------------------


class SmallAttention(torch.autograd.Function):
    """Attention and its entropy in one node, for scores that fit a block.

    It costs less than torch's attention alone on a CPU: the probabilities, kept, serve both outputs in both passes.
    The leading axes are flattened.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the output (..., M, value dim) and the entropy (..., M)."""
        probs, log_probs = _small_probs(query, key, scale, is_causal)
        entropy = entropy_of(probs, log_probs, -1).unsqueeze(-1)
        push = log_probs.addcmul_(probs, entropy)  # `entropy_of` left p log p in log_probs
        output = torch.bmm(probs, _flat(value))
        entropy = entropy.reshape(query.shape[:-1])
        ctx.save_for_backward(query, key, value, entropy, probs, push)
        ctx.scale, ctx.is_causal = scale, is_causal
        return output.reshape(*query.shape[:-1], value.shape[-1]), entropy

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Join the gradients of output and entropy at the scores."""
        query, key, value, entropy, probs, push = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was kept knows nothing of its own derivative
            probs, log_probs = _small_probs(query, key, ctx.scale, ctx.is_causal)
            push = entropy_push(probs, log_probs, entropy.reshape(*probs.shape[:-1], 1))
        q, k, v = _grouped(query, key), _flat(key), _flat(value)
        grad_output = grad_output.reshape(*probs.shape[:-1], v.shape[-1])
        pull = torch._softmax_backward_data(torch.bmm(grad_output, v.mT), probs, -1, probs.dtype)
        pull = torch.addcmul(pull, push, grad_entropy.reshape(*probs.shape[:-1], 1), value=-1) * ctx.scale
        for_query, for_key, for_value = torch.bmm(pull, k), torch.bmm(pull.mT, q), torch.bmm(probs.mT, grad_output)
        return for_query.reshape(query.shape), for_key.reshape(key.shape), for_value.reshape(value.shape), None, None


def _flat(tensor: Tensor) -> Tensor:
    """(..., rows, columns) with its leading axes as one."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """(B G, R M, D): the queries that share a key head as one set."""
    return query.reshape(key.shape[:-2].numel(), -1, query.shape[-1])


def _small_probs(query: Tensor, key: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Probabilities (B G, R M, N) and their logarithms."""
    scores = torch.bmm(_grouped(query, key), _flat(key).mT).mul_(scale)
    if is_causal:
        rows, keys = query.shape[-2], key.shape[-2]
        future = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.view(-1, rows, keys).masked_fill(future, HIDDEN_SCORE).view(scores.shape)
    return probs_of(scores, -1, None)


# --- in a kernel -----------------------------------------------------------------------------------------------------


class KernelAttention(torch.autograd.Function):
    """Attention and its entropy in one kernel forward and one backward, (B, H, M, D) by (B, G, N, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        window: int | None,
        offset: int,
        sized: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output (B, H, M, value dim), the entropy (B, H, M) and, if ``sized``, the largest ``|score|``."""
        output, entropy, lse, largest = attend(
            query, key, value, bias, mask, scale, is_causal, window, offset, 1, sized
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, bias, mask, output, entropy, lse)
        ctx.arguments = (scale, is_causal, window, offset)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(largest)
        return output, entropy, largest

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        """Join the gradients of output and entropy at the scores."""
        return (*_kernel_gradients(ctx, grad_output, grad_entropy), *(None,) * 7)


class KernelEntropy(torch.autograd.Function):
    """Tap on queries and keys: the entropy alone in a kernel, beside any attention."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        window: int | None,
        offset: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and the entropy (B, H, M)."""
        output, entropy, lse, _ = attend(
            query, key, None, bias, mask, scale, is_causal, window, offset, 1, False
        )  # fmt: skip
        ctx.save_for_backward(query, key, None, bias, mask, output, entropy, lse)
        ctx.arguments = (scale, is_causal, window, offset)
        ctx.set_materialize_grads(False)
        return query.view_as(query), key.view_as(key), entropy

    @staticmethod
    def backward(
        ctx: Any, grad_query: Tensor | None, grad_key: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Add the entropy's gradient to those of query and key."""
        query, key = ctx.saved_tensors[:2]
        if grad_entropy is not None:
            for_query, for_key, _ = _kernel_gradients(ctx, None, grad_entropy)
            grad_query, grad_key = _joined(grad_query, for_query, query), _joined(grad_key, for_key, key)
        return (grad_query, grad_key, *(None,) * 6)


def _kernel_gradients(
    ctx: Any, grad_output: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    query, key, value, bias, mask, output, entropy, lse = ctx.saved_tensors
    if grad_output is None and grad_entropy is None:
        return None, None, None
    if torch.is_grad_enabled():  # a second derivative: what was kept knows nothing of its own
        scale, is_causal, window, offset = ctx.arguments
        return _torch_gradients(
            query, key, value, bias, mask, grad_output, grad_entropy, scale, is_causal, window, offset, True
        )  # fmt: skip
    deterministic = torch.are_deterministic_algorithms_enabled()
    for_query, for_key, for_value, _ = attend_backward(
        grad_output, grad_entropy, query, key, value, bias, mask, output, entropy, lse, *ctx.arguments, 1,
        deterministic, False,
    )  # fmt: skip
    return for_query, for_key, None if value is None else for_value


def _fake_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    offset: int,
    step: int,
    sized: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = query.new_empty(query.shape[:3], dtype=exact_dtype(query))
    output = _token_major(query, None if value is None else value.shape[-1])
    return output, rows, torch.empty_like(rows), rows.new_empty(rows.shape if sized else 0)


def _token_major(tensor: Tensor, width: int | None) -> Tensor:
    """Empty (B, H, M, width) in memory as (B, M, H, width), as models go on with it; (0,) without a width."""
    if width is None:
        return tensor.new_empty(0)
    batch, heads, rows = tensor.shape[:3]
    return tensor.new_empty(batch, rows, heads, width).transpose(1, 2)


@kernels.operator("attention_entropy.forward", fake=_fake_attend)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    offset: int,
    step: int,
    sized: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, H, M, value dim), entropy, log of the sum of exponentials, largest ``|score|``.

    The first is (0,) without values, the last unless ``sized``. Rows that see no key have 0 of all. Query i is at
    ``offset + step * i``.
    """
    arguments = (scale, is_causal, window, offset, step)
    output, entropy, lse, largest = _fake_attend(query, key, value, bias, mask, *arguments, sized)
    scores = _placed(query, key, bias, mask, *arguments)
    with full_precision(query):
        for block, q, k in scores.blocks():
            v = None if value is None else upcast(value[block[0]])
            parts = _attended(scores, block, q, k, v)
            for whole, part in zip((entropy, lse, largest if sized else None, output), parts, strict=True):
                if whole is not None and part is not None:
                    cut(whole, block).copy_(part)
    return output, entropy, lse, largest


@kernels.operator(
    "attention_entropy.backward",
    fake=lambda grad_output, grad_entropy, query, key, value, *_: (
        _token_major(query, query.shape[-1]),
        _token_major(key, key.shape[-1]),
        _token_major(key, None if value is None else value.shape[-1]),
        query.new_empty(0),
    ),
)
def attend_backward(
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
    entropy: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    offset: int,
    step: int,
    deterministic: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, the last one (0,) without values."""
    grads = _torch_gradients(
        query, key, value, bias, mask, grad_output, grad_entropy, scale, is_causal, window, offset
    )  # fmt: skip
    tensors = (query, key) if value is None else (query, key, value)
    laid = [_token_major(tensor, tensor.shape[-1]) for tensor in tensors]
    for whole, grad in zip(laid, grads, strict=False):
        whole.copy_(grad)  # type: ignore[arg-type]
    return laid[0], laid[1], laid[2] if value is not None else _token_major(key, None), query.new_empty(0)


def _placed(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, is_causal: bool,
    window: int | None, offset: int, step: int = 1,
) -> Scores:  # fmt: skip
    positions = offset + step * torch.arange(query.shape[2], device=query.device)
    return Scores(query, key, bias, mask, scale, is_causal, None, window, positions)


def _attended(
    scores: Scores, block: Block, q: Tensor, k: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Entropy, log of the sum of exponentials, largest ``|score|`` and, with values, the output of a block."""
    logits, hidden = scores.logits(block, q, k)
    shown = logits if hidden is None else logits.masked_fill(hidden, 0.0)
    if hidden is not None:
        logits = logits.masked_fill(hidden, HIDDEN_SCORE)
    probs, log_probs = probs_of(logits, -1, None)
    seen = torch.ones_like(probs[..., 0], dtype=torch.bool) if hidden is None else ~hidden.expand_as(probs).all(-1)
    if not k.shape[2]:
        seen = torch.zeros_like(seen)
    probs = probs * seen.unsqueeze(-1)
    entropy = 0 - (probs * log_probs).sum(-1)
    lse = torch.logsumexp(logits, -1).masked_fill(~seen, 0.0)
    largest = shown.abs().amax(-1) if k.shape[2] else torch.zeros_like(lse)
    if v is None:
        return entropy, lse, largest, None
    rows = probs.reshape(*v.shape[:2], -1, v.shape[2])
    return entropy, lse, largest, (rows @ v).reshape(*probs.shape[:3], v.shape[-1])


def _torch_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    offset: int = 0,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by autograd, block by block."""
    inputs = [tensor for tensor in (query, key, value) if tensor is not None]
    if not create_graph:
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    totals: list[Tensor] = []
    with torch.enable_grad(), full_precision(query):
        scores = _placed(inputs[0], inputs[1], bias, mask, scale, is_causal, window, offset)
        for block, q, k in scores.blocks():
            v = None if value is None else upcast(inputs[2][block[0]])
            entropy, _, _, output = _attended(scores, block, q, k, v)
            pairs = [(entropy, grad_entropy)] if output is None else [(entropy, grad_entropy), (output, grad_output)]
            # not a sum of products: what comes from above may depend on the inputs itself
            ends, upstream = zip(*((part, cut(grad, block)) for part, grad in pairs if grad is not None), strict=True)
            parts = torch.autograd.grad(
                ends, inputs, [grad.to(end.dtype) for end, grad in zip(ends, upstream, strict=True)],
                create_graph=create_graph, allow_unused=True,
            )  # fmt: skip
            found = [torch.zeros_like(x) if part is None else part for x, part in zip(inputs, parts, strict=True)]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    totals = totals or [torch.zeros_like(tensor) for tensor in inputs]
    return totals[0], totals[1], totals[2] if value is not None else None


# --- by torch's attention twice --------------------------------------------------------------------------------------


class TwiceEntropy(torch.autograd.Function):
    """Tap on queries and keys: the entropy from torch's attention, with the keys as values.

    ``H = lse - scale * q . o`` with ``o = attention(q, k, k)``. With ``lse``, the ``q`` beside ``o`` and the keys in
    the place of values held fixed, the gradient through ``o`` is that of H: ``d lse`` cancels what is left out. In
    float32, because a rounded ``o`` would leave an error of its size in H.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and the entropy (B, H, M)."""
        q, k = query.float(), key.float()
        with full_precision(query):
            output, lse = _with_lse(q, k, scale, is_causal)
        ctx.save_for_backward(query, key)
        ctx.arguments = (scale, is_causal)
        ctx.set_materialize_grads(False)
        # a row of one key has none, not its rounding
        entropy = (lse - scale * (q * output).sum(-1)).clamp_min_(0.0)
        return query.view_as(query), key.view_as(key), entropy

    @staticmethod
    def backward(
        ctx: Any, grad_query: Tensor | None, grad_key: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Add the entropy's gradient to those of query and key."""
        query, key = ctx.saved_tensors
        scale, is_causal = ctx.arguments
        if grad_entropy is not None and torch.is_grad_enabled():
            inputs = (query, key, None, None, None)
            pulls = _torch_gradients(*inputs, None, grad_entropy, scale, is_causal, None, create_graph=True)
            grad_query, grad_key = _joined(grad_query, pulls[0], query), _joined(grad_key, pulls[1], key)
        elif grad_entropy is not None:
            with torch.enable_grad(), full_precision(query):
                q, k = query.float().detach().requires_grad_(), key.float().detach().requires_grad_()
                output = _attention(q, k, k.detach(), is_causal=is_causal, scale=scale)
                upstream = q.detach() * (grad_entropy * -scale).unsqueeze(-1)
                for_query, for_key = torch.autograd.grad(output, (q, k), upstream)
            grad_query, grad_key = _joined(grad_query, for_query, query), _joined(grad_key, for_key, key)
        return grad_query, grad_key, None, None


def _with_lse(query: Tensor, key: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attention with the keys as values, and the log of the sum of exponentials of each row."""
    if query.is_cuda:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, key, None, True, 0.0, is_causal, scale=scale
        )
        return output, lse[..., : query.shape[2]]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, key, 0.0, is_causal, attn_mask=None, scale=scale
    )
    return output, lse
