r"""Shannon entropy of attention rows, from queries and keys, from scores, or from probabilities.

Formula
    ``p = softmax(scale * q k^T + bias)``, ``H_i = -sum_j p_ij log p_ij``; with ``top_k`` the row is first cut to its
    ``top_k`` largest scores and renormalised. Gradient: ``dH/ds_j = -p_j (log p_j + H)``.
Source
    sigma-Reparam (Zhai et al. 2023, arXiv 2303.06296, section 3) monitors this quantity; AEM (arXiv 2406.15303)
    maximises it and its public code sums it in nats, which is ``normalize=False`` here, also in its top-k form.
Input
    ``query`` (batch, heads, queries, dim), ``key`` (batch, key_heads, keys, dim); or scores or probabilities with the
    keys on ``dim``. Everything after rotary embedding or QK-norm and before dropout.
Unit and range
    Nats, from 0 (one key holds all the weight) to log(visible keys) (uniform); with ``normalize=True`` divided by
    log(visible keys), so in [0, 1]. A row that sees no key, or a single key when normalised, has no choice to make: it
    is 0 here, and losses and metrics leave it out of their means.
Masks
    Boolean (True = visible) or additive. A bias, or a score, at or below ``MASKED_BIAS`` hides its key, which covers
    -inf, ``finfo.min``, -1e9 and the -1e4 that older models add to their scores. NaN is not a mask and stays NaN.
Default and why
    ``normalize`` is off in the functions, which state the quantity of the papers, and on in losses and callbacks, where
    a weight should not depend on the number of keys.
Cost
    From queries and keys: one matrix product forward and three backward, in blocks of about ``BLOCK_SCORES`` scores;
    memory linear in the number of tokens. Computed in float32 (float64 stays).
When it hurts
    The gradient vanishes where ``p_j`` is 0: the term shapes healthy heads and cannot revive a collapsed one.
    Maximising flattens attention: heads that must be sharp (induction, pointing) get worse. Evidence in
    multiple-instance learning is mixed: the authors gain on three sets of slides, tuning the weight on each from 0.001
    to 0.2; public trials of CLAM with strong encoders lost 0.01 to 0.08 of their score at every weight tried (single
    seeds), and where attention is near uniform anyway the term does nothing. Try ``floor``, which leaves sparse lesions
    alone. Made to collapse on purpose (``experiments/results/collapse.md``), attention whose rows were one key to
    rounding was lifted by no entropy term, while maximizing from the start prevented it: it shapes, it does not rescue.
Not together with
    Products that are not distributions, such as Nystrom attention: their "entropy" has no meaning.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED_BIAS = -5e3  # half the smallest fill in common use, which comes added to a score; ALiBi this low is 0 anyway
HIDDEN_SCORE = -1e30  # probability 0 and, unlike with -inf, no NaN in 0 * log(0), also when differentiated twice
BLOCK_SCORES = 2**17  # scores held at a time: 512 KiB in float32, which stay in a CPU's cache
LARGE_BLOCKS = 128  # times as many on an accelerator, where launches cost, and in compiled code, which unrolls blocks

Block = tuple[slice, slice]  # of batch and queries
WHOLE: Block = (slice(0, None), slice(0, None))

# bound now: capture.py replaces the attribute while a training batch is in flight
_softmax = torch.softmax


def attention_entropy_from_probs(
    probs: Tensor, *, mask: Tensor | None = None, dim: int = -1, normalize: bool = False
) -> Tensor:
    """Entropy of attention probabilities.

    Args:
        probs: Probabilities, rows along ``dim`` sum to 1, any shape.
        mask: Visible keys, True = visible, broadcastable to ``probs``; without it every key counts as visible.
        dim: Axis of the keys.
        normalize: Divide by log(visible keys).

    Returns:
        Shape of ``probs`` without ``dim``, float32 or float64; nats, or [0, 1] when normalised.

    Raises:
        ValueError: If a shape does not fit, or, outside torch.compile, a probability is negative or a row does not
            sum to 1 over the visible keys (scores, dropped-out weights, or a product that is no distribution).

    Example:
        >>> attention_entropy_from_probs(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), normalize=True)
        tensor([0.5000])
    """
    probs = _upcast(_check_floating("probs", probs))
    if mask is not None:
        probs = probs.masked_fill(~_check_mask(mask, probs.shape), 0.0)
    if not torch.compiler.is_compiling():
        _check_distribution(probs, dim)
    entropy = _entropy(probs, _log(probs), dim)
    return normalize_entropy(entropy, visible_keys(probs, mask, dim)) if normalize else entropy


def attention_entropy_from_scores(
    scores: Tensor, *, mask: Tensor | None = None, dim: int = -1, normalize: bool = False, top_k: int | None = None
) -> Tensor:
    """Entropy of ``softmax(scores)``.

    Args:
        scores: Attention scores before softmax, any shape; values at or below ``MASKED_BIAS`` count as masked.
        mask: Visible keys, True = visible, broadcastable to ``scores``.
        dim: Axis of the keys.
        normalize: Divide by log(visible keys).
        top_k: Keep the ``top_k`` largest scores of a row and renormalise (AEM's top-k form).

    Returns:
        Shape of ``scores`` without ``dim``, float32 or float64; nats, or [0, 1] when normalised.

    Example:
        >>> attention_entropy_from_scores(torch.zeros(1, 4))
        tensor([1.3863])
    """
    _, entropy, visible = scores_tap(scores, mask=mask, dim=dim, top_k=top_k)
    return normalize_entropy(entropy, visible) if normalize else entropy


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    normalize: bool = False,
    top_k: int | None = None,
) -> Tensor:
    """Entropy of each attention row, from queries and keys, without materialising the attention matrix.

    Arguments named as in ``torch.nn.functional.scaled_dot_product_attention`` mean the same.

    Args:
        query: (batch, heads, queries, dim); any number of leading axes, also none.
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        scale: Factor on the scores, default ``dim ** -0.5``.
        is_causal: Query i sees keys 0..i.
        attn_mask: Boolean (True = visible) or additive, broadcastable to (batch, heads, queries, keys). A learned
            additive bias receives its gradient.
        enable_gqa: Share each key head among ``heads / key_heads`` query heads.
        normalize: Divide by log(visible keys).
        top_k: Keep the ``top_k`` largest scores of a row and renormalise.

    Returns:
        (batch, heads, queries), float32 or float64; nats, or [0, 1] when normalised.

    Raises:
        ValueError: If shapes do not fit, naming the argument.

    Example:
        >>> query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
        >>> attention_entropy(query, key, is_causal=True)
        tensor([[[0.0000, 0.6931]]])
    """
    *_, entropy, visible = entropy_tap(
        query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, top_k=top_k
    )
    return normalize_entropy(entropy, visible) if normalize else entropy


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention output and the entropy of its rows.

    Args:
        query: (batch, heads, queries, dim).
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        value: (batch, heads, keys, value_dim).
        scale: Factor on the scores, default ``dim ** -0.5``.
        is_causal: Query i sees keys 0..i.
        attn_mask: Boolean (True = visible) or additive.
        enable_gqa: Share key heads among query heads.
        normalize: Divide the entropy by log(visible keys).

    Returns:
        Output (batch, heads, queries, value_dim), equal to torch's attention up to rounding, and entropy
        (batch, heads, queries).

    Example:
        >>> query, key = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
        >>> attention_with_entropy(query, key, torch.eye(2)[None, None])
        (tensor([[[[0.5000, 0.5000]]]]), tensor([[[0.6931]]]))
    """
    output, entropy, visible = attention_tap(
        query, key, value, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
    )
    return output, normalize_entropy(entropy, visible) if normalize else entropy


def attention_tap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    top_k: int | None = None,
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Attention and the entropy of its rows before dropout, whichever way is cheapest.

    Small attention is computed here, in one node; any other by ``attention``, torch's unless another is given, behind
    an ``entropy_tap``.

    Returns:
        ``(output, entropy, visible)``, as torch's attention and as ``entropy_tap`` return them.
    """
    if _is_small(query, key, value, attn_mask, dropout_p, top_k):
        _check_query_key(query, key, attn_mask, enable_gqa)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output, entropy = _SmallAttention.apply(query, key, value, scale, is_causal)
        return output, entropy, _visible_to_queries(query, key, None, is_causal, None)
    query, key, attn_mask, entropy, visible = entropy_tap(
        query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, top_k=top_k
    )
    output = attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip
    return output, entropy, visible


def entropy_tap(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | int]:
    """Queries, keys and mask unchanged, with the entropy of their attention rows joined to the same autograd node.

    Feed the returned tensors to the attention: its gradient and the entropy's meet in one backward.

    Returns:
        ``(query, key, attn_mask, entropy, visible)``, entropy in nats and the number of visible keys, both
        (batch, heads, queries); one number where every query sees as many keys.
    """
    _check_query_key(query, key, attn_mask, enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    visible = _visible_to_queries(query, key, attn_mask, is_causal, check_top_k(top_k))
    if attn_mask is None or attn_mask.dtype == torch.bool:
        query, key, entropy = _QueryKeyEntropy.apply(query, key, None, attn_mask, scale, is_causal, top_k)
    else:
        query, key, attn_mask, entropy = _QueryKeyEntropy.apply(query, key, attn_mask, None, scale, is_causal, top_k)
    if attn_mask is not None:
        entropy = entropy.masked_fill(visible == 0, 0.0)
    return query, key, attn_mask, entropy, visible


def scores_tap(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    dim: int = -1,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``softmax(scores, dim, dtype)``, with the entropy of its rows joined to the same autograd node.

    Returns:
        ``(probs, entropy, visible)``: probabilities like ``scores``, entropy in nats and visible keys without ``dim``.
    """
    _check_floating("scores", scores)
    if mask is not None:
        scores = scores.masked_fill(~_check_mask(mask, scores.shape), -math.inf)
    return _SoftmaxEntropy.apply(scores, dim % scores.dim(), dtype, check_top_k(top_k))


def normalize_entropy(entropy: Tensor, visible: Tensor | int) -> Tensor:
    """``entropy / log(visible)``, and 0 for rows with fewer than two visible keys."""
    if isinstance(visible, int):
        return entropy / math.log(visible) if visible > 1 else torch.zeros_like(entropy)
    return entropy / torch.where(visible > 1, visible, math.inf).to(entropy.dtype).log()


def rows_with_choice(entropy: Tensor, visible: Tensor | int, normalize: bool) -> Tensor:
    """Rows of ``entropy`` that means count: those that see a key, or two keys where the entropy is normalised."""
    chosen = visible > (1 if normalize else 0)
    return chosen if isinstance(chosen, Tensor) else torch.full_like(entropy, chosen, dtype=torch.bool)


def visible_keys(probs: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Number of keys each row of probabilities sees, the shape of ``probs`` without ``dim``."""
    shown = torch.ones_like(probs, dtype=torch.bool) if mask is None else mask.expand(probs.shape)
    return shown.sum(dim)


class _SoftmaxEntropy(torch.autograd.Function):
    """``softmax(scores, dim, dtype)``, its entropy in nats and the visible keys; keeps what a softmax keeps."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, dim: int, dtype: torch.dtype | None, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities like ``scores``, entropy and visible keys without ``dim``."""
        probs = _softmax(scores, dim, dtype=dtype)
        visible = scores.shape[dim] - (scores <= MASKED_BIAS).sum(dim)
        # probabilities in half precision are too coarse for their logarithm: take the scores again
        exact = top_k is None and probs.dtype in (torch.float32, torch.float64)
        p, log_p = (probs, _log(probs)) if exact else _probs(_exact_scores(scores), dim, top_k)
        entropy = _entropy(p, log_p, dim).masked_fill(visible == 0, 0.0)
        ctx.save_for_backward(probs, None if exact else scores, entropy, visible)
        ctx.dim, ctx.top_k, ctx.dtype = dim, top_k, scores.dtype
        visible = visible if top_k is None else visible.clamp_max(top_k)
        ctx.mark_non_differentiable(visible)
        ctx.set_materialize_grads(False)
        return probs, entropy, visible

    @staticmethod
    def backward(ctx: Any, grad_probs: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple:
        """Join the gradient of the probabilities with that of the entropy."""
        probs, scores, entropy, visible = ctx.saved_tensors
        grad = None
        if grad_probs is not None:
            grad = torch._softmax_backward_data(grad_probs, probs, ctx.dim, probs.dtype)
        if grad_entropy is not None:
            p, log_p = (probs, _log(probs)) if scores is None else _probs(_exact_scores(scores), ctx.dim, ctx.top_k)
            pull = _entropy_push(p, log_p, entropy.unsqueeze(ctx.dim)).mul_(-grad_entropy.unsqueeze(ctx.dim))
            pull.masked_fill_((visible == 0).unsqueeze(ctx.dim), 0.0)  # a row of -inf has probabilities NaN
            grad = pull if grad is None else pull.add_(grad)
        return (None if grad is None else grad.to(ctx.dtype)), None, None, None


class _QueryKeyEntropy(torch.autograd.Function):
    """Tap on queries, keys and an additive bias; the backward recomputes the scores block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        top_k: int | None,
    ) -> tuple[Tensor, ...]:
        """Return query, key, the bias if there is one, and the entropy (batch, heads, queries)."""
        entropy, push = _Scores(query, key, bias, mask, scale, is_causal, top_k).entropy()
        ctx.save_for_backward(query, key, bias, mask, entropy, push)
        ctx.arguments = (scale, is_causal, top_k)
        ctx.set_materialize_grads(False)
        passed = (tensor.view_as(tensor) for tensor in (query, key, bias) if tensor is not None)
        return (*passed, entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add the entropy's gradient to those of query, key and bias."""
        query, key, bias, mask, entropy, push = ctx.saved_tensors
        *passed, grad_entropy = (*grads[:2], None, grads[2]) if bias is None else grads
        if grad_entropy is not None:
            scores = _Scores(query, key, bias, mask, *ctx.arguments)
            # what was kept knows nothing of its own derivative
            kept = None if torch.is_grad_enabled() else push
            with_bias = bias is not None and ctx.needs_input_grad[2]
            pulls = scores.gradients(entropy, grad_entropy, with_bias, kept)
            passed = [
                _joined(grad, pull, tensor)
                for grad, pull, tensor in zip(passed, pulls, (query, key, bias), strict=True)
            ]
        return (*passed, None, None, None, None)


def _joined(grad: Tensor | None, pull: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """Sum of two gradients of ``tensor``; overwrites ``pull``."""
    if pull is None or tensor is None:
        return grad
    if grad is not None:
        pull = pull + grad if torch.is_grad_enabled() else pull.add_(grad)
    return pull.to(tensor.dtype)


class _SmallAttention(torch.autograd.Function):
    """Attention and its entropy in one node, for scores that fit a block.

    It costs less than torch's attention alone on a CPU: the probabilities, kept, serve both outputs in both passes.
    Letters as in ``_Scores``; the leading axes are flattened.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the output (..., M, value dim) and the entropy (..., M)."""
        probs, log_probs = _small_probs(query, key, scale, is_causal)
        entropy = _entropy(probs, log_probs, -1).unsqueeze(-1)
        push = log_probs.addcmul_(probs, entropy)  # `_entropy` left p log p in log_probs
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
            push = _entropy_push(probs, log_probs, entropy.reshape(*probs.shape[:-1], 1))
        q, k, v = _grouped(query, key), _flat(key), _flat(value)
        grad_output = grad_output.reshape(*probs.shape[:-1], v.shape[-1])
        pull = torch._softmax_backward_data(torch.bmm(grad_output, v.mT), probs, -1, probs.dtype)
        pull = torch.addcmul(pull, push, grad_entropy.reshape(*probs.shape[:-1], 1), value=-1) * ctx.scale
        for_query, for_key, for_value = torch.bmm(pull, k), torch.bmm(pull.mT, q), torch.bmm(probs.mT, grad_output)
        return for_query.reshape(query.shape), for_key.reshape(key.shape), for_value.reshape(value.shape), None, None


def _is_small(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, top_k: int | None
) -> bool:
    """Whether ``_SmallAttention`` can compute this, and is the cheapest to do so."""
    if attn_mask is not None or top_k is not None or dropout_p or torch.compiler.is_compiling():
        return False
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    exact = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.float64)
    alike = min(query.dim(), key.dim()) > 1 and value.shape[:-1] == key.shape[:-1]
    return exact and alike and 0 < query[..., 0].numel() * key.shape[-2] <= BLOCK_SCORES


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
    return _probs(scores, -1, None)


class _Scores:
    """Attention scores in blocks of about ``BLOCK_SCORES``, cut over the batch and, for long rows, over the queries.

    Letters: B batch, H heads, G key heads, R = H / G heads that share a key, M queries, N keys, D dim.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        top_k: int | None,
    ) -> None:
        lead = query.shape[:-2]
        # (batch, tokens, dim) is one head, so that blocks cut the batch, unless its first axis groups heads
        axis = 0 if query.shape[0] != key.shape[0] else 1
        self.query, self.key = _as_bhmd(query, lead, axis), _as_bhmd(key, lead, axis)  # (B, H, M, D), (B, G, N, D)
        # broadcastable to (B, H, M, N)
        self.bias = None if bias is None else _as_bhmd(bias, lead, axis)
        self.mask = None if mask is None else _as_bhmd(mask, lead, axis)
        self.shapes, self.bias_shape = (query.shape, key.shape), None if bias is None else bias.shape
        self.scale, self.is_causal, self.top_k = scale, is_causal, top_k

    def entropy(self) -> tuple[Tensor, Tensor | None]:
        """Entropy of every row in nats, (batch, heads, queries), without meaning where a row sees no key.

        Scores that fit a block also leave ``p (log p + H)``, so that the backward need not take them again.
        """
        entropy = push = None
        with _full_precision(self.query):
            for block, q, k in self._blocks():
                probs, log_probs = self._probs(block, q, k)
                part = _entropy(probs, log_probs, -1).unsqueeze(-1)
                if block is WHOLE and probs.numel() <= BLOCK_SCORES:
                    # `_entropy` left p log p in log_probs
                    entropy, push = part, log_probs.addcmul_(probs, part)
                elif block is WHOLE:
                    entropy = part
                else:
                    entropy = part.new_empty(*self.query.shape[:3], 1) if entropy is None else entropy
                    _cut(entropy, block).copy_(part)
        if entropy is None:  # no queries
            entropy = self.query.new_zeros(*self.query.shape[:3], 1, dtype=_exact_dtype(self.query))
        return entropy.reshape(self.shapes[0][:-1]), push

    def gradients(
        self, entropy: Tensor, grad_entropy: Tensor, with_bias: bool, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient of ``(entropy * grad_entropy).sum()`` in query, key and bias."""
        rows = (*self.query.shape[:3], 1)
        entropy, grad_entropy = entropy.reshape(rows), grad_entropy.reshape(rows)
        for_query = for_key = None
        for_bias = torch.zeros_like(self.bias, dtype=entropy.dtype) if with_bias and self.bias is not None else None
        with _full_precision(self.query):
            for block, q, k in self._blocks():
                push = kept if kept is not None else _entropy_push(*self._probs(block, q, k), _cut(entropy, block))
                weight = _cut(grad_entropy, block)  # (B, H, M, 1)
                if for_bias is not None:
                    part = _cut(for_bias, block)
                    part.sub_((push * weight).sum_to_size(part.shape))
                pull = (push * (weight * -self.scale)).reshape(*q.shape[:3], k.shape[2])
                in_query, in_key = pull @ k, pull.transpose(-1, -2) @ q
                if block is WHOLE:
                    for_query, for_key = in_query, in_key
                else:
                    if for_query is None or for_key is None:
                        for_query = torch.empty_like(self.query, dtype=entropy.dtype)
                        for_key = torch.zeros_like(self.key, dtype=entropy.dtype)
                    part = _cut(for_query, block)
                    part.copy_(in_query.reshape(part.shape))
                    for_key[block[0]].add_(in_key)
        if for_query is None or for_key is None:  # no queries
            for_query, for_key = torch.zeros_like(self.query), torch.zeros_like(self.key)
        return for_query.reshape(self.shapes[0]), for_key.reshape(self.shapes[1]), self._as_given(for_bias)

    def _as_given(self, for_bias: Tensor | None) -> Tensor | None:
        """Undo ``_as_bhmd``: sum over the batch axes that were expanded."""
        if for_bias is None or self.bias_shape is None:
            return None
        lead = self.shapes[0][:-3]
        if len(lead) > 1 and len(self.bias_shape) > 3:
            for_bias = for_bias.unflatten(0, lead).sum_to_size(self.bias_shape)
        return for_bias.reshape(self.bias_shape)

    def _blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Slices of B and M with their queries (B, G, R M, D) and keys (B, G, N, D), upcast."""
        batch, heads, rows, dim = self.query.shape
        large = self.query.device.type != "cpu" or torch.compiler.is_compiling()
        limit = BLOCK_SCORES * (LARGE_BLOCKS if large else 1)
        row = max(1, heads * self.key.shape[2])
        row_step = max(1, min(rows, limit // row))
        batch_step = max(1, limit // (row * row_step)) if row_step == rows else 1
        if batch_step >= batch and row_step >= rows:
            q, k = _upcast(self.query), _upcast(self.key)
            yield WHOLE, q.reshape(*k.shape[:2], -1, dim) if heads != k.shape[1] else q, k
            return
        for b in range(0, batch, batch_step):
            k = _upcast(self.key[b : b + batch_step])
            for m in range(0, rows, row_step):
                block = slice(b, b + batch_step), slice(m, m + row_step)
                q = _upcast(_cut(self.query, block))
                yield block, q.reshape(*k.shape[:2], heads // k.shape[1] * q.shape[2], dim), k

    def _probs(self, block: Block, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of a block (B, H, M, N) and their logarithms; uniform where a row sees nothing."""
        scores, hidden = self._logits(block, q, k)
        if hidden is not None:
            scores = scores.masked_fill_(hidden, HIDDEN_SCORE)
        return _probs(scores, -1, self.top_k)

    def _logits(self, block: Block, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of a block (B, H, M, N), and which of them are hidden."""
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        heads = self.query.shape[1]
        scores = scores.reshape(len(q), heads, q.shape[1] * q.shape[2] // heads, k.shape[2])
        hidden = None
        if self.mask is not None:
            hidden = ~_cut(self.mask, block)
        if self.bias is not None:
            bias = _cut(self.bias, block)
            scores, hidden = scores + bias, bias <= MASKED_BIAS
        if self.is_causal:
            queries = torch.arange(block[1].start, block[1].start + scores.shape[2], device=q.device)
            future = torch.arange(scores.shape[3], device=q.device) > queries[:, None]
            hidden = future if hidden is None else hidden | future
        return scores, hidden


def _full_precision(tensor: Tensor) -> Any:
    """Autocast off; nothing at all where it is not on, which saves entering it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _as_bhmd(tensor: Tensor, lead: torch.Size, axis: int) -> Tensor:
    """Bring (*lead, rows, columns), or a mask broadcastable to it, to four axes."""
    if len(lead) == 2 and tensor.dim() == 4:
        return tensor
    if len(lead) == 1 and tensor.dim() == 3:
        return tensor.unsqueeze(axis)
    if len(lead) > 2 and tensor.dim() > 3:
        return tensor.expand(*lead[:-1], *tensor.shape[-3:]).flatten(0, -4)
    return tensor.reshape((1,) * (4 - tensor.dim()) + tensor.shape)


def _cut(tensor: Tensor, block: Block) -> Tensor:
    """The block's part of a tensor (B, H, M, ...), whose broadcast axes stay."""
    if block is WHOLE:
        return tensor
    if tensor.shape[0] > 1:
        tensor = tensor[block[0]]
    return tensor[:, :, block[1]] if tensor.shape[2] > 1 else tensor


def _visible_to_queries(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, top_k: int | None
) -> Tensor | int:
    """Number of keys each query sees, broadcast to (batch, heads, queries); one number when all see as many."""
    if attn_mask is None and not is_causal:
        return key.shape[-2] if top_k is None else min(top_k, key.shape[-2])
    if attn_mask is None:
        shown = torch.ones(1, dtype=torch.bool, device=query.device)
    else:
        shown = attn_mask if attn_mask.dtype == torch.bool else ~(attn_mask <= MASKED_BIAS)
    visible = _count_shown(shown, query.shape[-2], key.shape[-2], is_causal)
    visible = visible if top_k is None else visible.clamp_max(top_k)
    return visible.expand(query.shape[:-1])


def _count_shown(shown: Tensor, rows: int, keys: int, is_causal: bool) -> Tensor:
    """Number of shown keys of each query, in memory of the mask's own size."""
    if not is_causal:
        return shown.sum(-1) * (keys if shown.shape[-1] == 1 else 1)
    past = torch.arange(1, rows + 1, device=shown.device).clamp_max(keys)
    if shown.shape[-1] == 1:
        return shown.squeeze(-1) * past
    if shown.dim() > 1 and shown.shape[-2] > 1:
        return shown.tril().sum(-1)
    counts = shown.cumsum(-1)[..., past - 1]
    return counts.squeeze(-2) if shown.dim() > 1 else counts


def _probs(scores: Tensor, dim: int, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms, finite for finite scores."""
    if top_k is not None and top_k < scores.shape[dim]:
        kept = scores.topk(top_k, dim)
        scores = torch.full_like(scores, HIDDEN_SCORE).scatter(dim, kept.indices, kept.values)
    log_probs = torch.log_softmax(scores, dim)
    return log_probs.exp(), log_probs


def _log(probs: Tensor) -> Tensor:
    """Logarithm, finite at 0, where it only ever meets its factor 0."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log_()


def _entropy(probs: Tensor, log_probs: Tensor, dim: int) -> Tensor:
    """Entropy of rows; overwrites ``log_probs``, because a fresh tensor costs more than the product."""
    return 0 - log_probs.mul_(probs).sum(dim)  # not -0.0


def _entropy_push(probs: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """Negative gradient of the entropy in the scores, ``p (log p + H)``."""
    return (probs * log_probs).addcmul_(probs, entropy)


def _exact_scores(scores: Tensor) -> Tensor:
    return _upcast(scores).clamp_min(HIDDEN_SCORE)


def _exact_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(_exact_dtype(tensor))


def check_top_k(top_k: int | None) -> int | None:
    """Return ``top_k`` or raise a ValueError."""
    if top_k is not None and top_k < 2:
        raise ValueError(f"`top_k` must be at least 2 (one key has no entropy) or None for all keys, got {top_k}.")
    return top_k


def _check_floating(name: str, tensor: Tensor) -> Tensor:
    if not torch.is_floating_point(tensor) or tensor.dim() == 0:
        raise ValueError(f"`{name}` must be a floating-point tensor with at least one axis, got {_describe(tensor)}.")
    return tensor


def _check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be boolean (True = visible), got {mask.dtype}; use `mask.bool()`.")
    if not _broadcastable(mask.shape, shape):
        raise ValueError(f"`mask` must be broadcastable to {tuple(shape)}, got {tuple(mask.shape)}.")
    return mask


def _broadcastable(shape: torch.Size, full: torch.Size) -> bool:
    pairs = zip(shape[::-1], full[::-1], strict=False)
    return len(shape) <= len(full) and all(size in (1, wanted) for size, wanted in pairs)


def _check_distribution(probs: Tensor, dim: int) -> None:
    detached = probs.detach()
    total = detached.sum(dim)
    wrong = (detached < 0).any() | ((total != 0) & ((total - 1).abs() > 0.05)).any()
    if wrong:
        raise ValueError(
            "`probs` must be non-negative with rows that sum to 1 over the visible keys: these are scores or a product "
            "that is no distribution. Use `attention_entropy_from_scores` for scores before softmax, or set `dim`."
        )


def _check_query_key(query: Tensor, key: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if not torch.is_floating_point(tensor) or tensor.dim() < 2:
            raise ValueError(
                f"`{name}` must be floating point of shape (batch, heads, tokens, dim), got {_describe(tensor)}."
            )
    if query.shape[-1] != key.shape[-1] or query.dim() != key.dim() or query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"`query` and `key` must share batch and dim, got {_describe(query)} and {_describe(key)}.")
    if query.dim() > 2 and query.shape[-3] != key.shape[-3]:
        if not enable_gqa:
            raise ValueError(
                f"`key` must have the {query.shape[-3]} heads of `query`, got {key.shape[-3]}; "
                "set `enable_gqa=True` for grouped-query attention."
            )
        if query.shape[-3] % key.shape[-3]:
            raise ValueError(f"`query` heads {query.shape[-3]} must be a multiple of `key` heads {key.shape[-3]}.")
    if attn_mask is None:
        return
    full = torch.Size((*query.shape[:-1], key.shape[-2]))
    if attn_mask.dtype != torch.bool and not torch.is_floating_point(attn_mask):
        raise ValueError(f"`attn_mask` must be boolean or floating point, got {attn_mask.dtype}; use `mask.bool()`.")
    if attn_mask.dim() == 0 or not _broadcastable(attn_mask.shape, full):
        raise ValueError(f"`attn_mask` must be broadcastable to {tuple(full)}, got {tuple(attn_mask.shape)}.")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
