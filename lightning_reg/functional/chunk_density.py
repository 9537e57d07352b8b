r"""Share of neurons that any token of a chunk switches on, the chunk sparsity of BlockFFN.

Formula
    With p_ik in [0, 1] the probability that token k switches neuron i on:
    ``P_i = 1 - exp(sum over k of a chunk of ln(1 - p_ik + 1e-5))``, the mean over neurons and chunks. Its gradient is
    the product over the *other* tokens: ``dP_i / dp_ik = exp(sum - ln(1 - p_ik + 1e-5))``.
    ``probability="density"``: ``p = x^2 / (x^2 + epsilon)``. ``"share"``: ``p_ik = |x_ik| / (sum_i |x_ik| + 1e-5)``.
Source
    BlockFFN (Song et al. 2025, arXiv 2507.08771, L_cs) and its public code, where p is the share of an expert in a
    token's scores after ReLU and RMS norm. There chunks lie at fixed places of packed documents, across their borders,
    and those of padding count in the mean; here they begin with each document, and padding does not count. The density
    is DEFT's surrogate (``activation_density``).
Input
    Activations ``x`` (..., tokens, width), normally the input of an MLP's down-projection. ``documents`` (..., tokens)
    says what is padding and where packed documents end.
Unit and range
    Dimensionless, 0 to 1: the soft share of neurons whose weights a chunk of tokens must load. The 1e-5 puts an
    all-zero chunk at -1e-5 for each of its tokens, and lets p = 1 have a finite logarithm and gradient.
Where it acts
    On a neuron that at most one token of the chunk switches on; where two do, each hides the other and the pull is
    their small ``1 - p``. With ``"density"`` it therefore silences the neurons that are rare in a chunk. With
    ``"share"`` and a width above the chunk length the value is near ``chunk / width`` whatever happens, and the pull,
    which is towards concentration, is of second order.
Default and why
    ``chunk=64`` as published. ``"density"``, because the published share is made for tens of experts rather than for
    thousands of neurons; ``epsilon=1e-7`` as in DEFT's public code. For a chunk to be neither full nor empty the p of a
    neuron should sum to about 1 over it, as published shares do (64 tokens, 40 experts): ``relative=True`` with an
    ``epsilon`` near ``chunk``.
Cost
    A few element-wise passes and a sum over each chunk, forward and backward; keeps only ``x``. With integer
    ``documents`` a copy in float32 for a while, because how many chunks there are is known on the device only.
When it hurts
    With ``epsilon`` below the square of the activations nearly every P_i is 1 and has no gradient, even at 90 % zeros:
    64 tokens leave few neurons silent.
Not together with
    An order of tokens that means nothing, as between the images or bags of a batch: (tokens, width) without
    ``documents`` is one sequence.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.functional._tokens import at_least_one, check_documents, check_tokens, upcast, valid_count, valid_sum
from lightning_reg.functional.activation_density import SMALLEST_EPSILON, check_chunk, check_epsilon

Probability = Literal["density", "share"]
DELTA = 1e-5  # of the public code, in the logarithm and in the share


def chunk_density(
    x: Tensor, *, documents: Tensor | None = None, chunk: int = 64, probability: Probability = "density",
    epsilon: float = 1e-7, relative: bool = False,
) -> Tensor:  # fmt: skip
    """Mean over chunks and neurons of the probability that some token of the chunk switches the neuron on.

    Args:
        x: Activations (..., tokens, width).
        documents: Shape of ``x`` without its last axis. Boolean: True = valid, one document a row. Integers: 0 =
            padding, equal neighbours belong to the same document. Chunks begin with each document.
        chunk: Valid tokens in a chunk, >= 1; the last of a document may have fewer.
        probability: ``"density"`` is ``x^2 / (x^2 + epsilon)``; ``"share"`` is the share of the token's magnitude.
        epsilon: Softness of the density, > 0, in squared units of ``x``, or of its mean square with ``relative``.
        relative: Scale ``epsilon`` by the mean square of the valid elements, held fixed.

    Returns:
        Scalar up to 1, float32 (float64 for float64 input); 0 when no position is valid.

    Raises:
        ValueError: If an argument is out of its range or ``x`` or ``documents`` does not fit.

    Example:
        >>> chunk_density(torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, -3.0]]))
        tensor(0.5000)
    """
    return chunk_tap(
        x, documents=documents, chunk=chunk, probability=probability, epsilon=epsilon, relative=relative
    )[1]  # fmt: skip


def chunk_tap(
    x: Tensor, *, documents: Tensor | None = None, chunk: int = 64, probability: Probability = "density",
    epsilon: float = 1e-7, relative: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x`` unchanged, and its chunk density joined to the same autograd node. Arguments as ``chunk_density``."""
    check_probability(probability, relative)
    documents = check_documents(documents, check_tokens(x))
    index, chunks, slots = _layout(documents, x, check_chunk(chunk))
    valid = None if documents is None else documents.bool().unsqueeze(-1)
    inverse = _inverse(x.detach(), valid, check_epsilon(epsilon), relative) if probability == "density" else None
    return _ChunkDensity.apply(x, valid, inverse, index, chunks, chunk, slots)


class _ChunkDensity(torch.autograd.Function):
    """One node for the value and its chunk density."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, valid: Tensor | None, inverse: Tensor | None, index: Tensor | None,
        chunks: Tensor | None, chunk: int, slots: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return ``x`` and its chunk density."""
        ctx.save_for_backward(x, valid, inverse, index, chunks)
        ctx.chunk, ctx.slots = chunk, slots
        ctx.set_materialize_grads(False)
        silent = torch.log1p(DELTA - _probability(x, inverse)[0])
        active = -torch.expm1(_chunk_sums(silent, index, chunk, slots)[:slots])
        return x.view_as(x), active.sum() / _count(x, chunks, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_density: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add ``grad_density * dP / dp * dp / dx / count`` to the gradient of ``x``."""
        x, valid, inverse, index, chunks = ctx.saved_tensors
        if grad_density is not None:
            p, slope = _probability(x, inverse)
            silent = torch.log1p(DELTA - p)
            sums = _chunk_sums(silent, index, ctx.chunk, ctx.slots)
            others = (_at_tokens(sums, x, index, ctx.chunk) - silent).exp()
            if inverse is None:  # a share also falls when another of the same token rises
                others = others - (others * p).sum(-1, keepdim=True)
            pull = others * slope
            if valid is not None:
                pull = pull.masked_fill(~valid, 0.0)
            pull = pull * (grad_density / _count(x, chunks, ctx.slots))
            grad = (pull if grad is None else grad + pull).to(x.dtype)
        return grad, None, None, None, None, None, None


def _probability(x: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(p, dp/dx)``: a density where ``inverse``, 1 / epsilon, is given, else a share with its total held fixed."""
    exact = upcast(x)
    if inverse is None:
        total = exact.abs().sum(-1, keepdim=True) + DELTA
        return exact.abs() / total, exact.sign() / total
    off = 1 / (1 + exact.square() * inverse)
    return 1 - off, off.square() * exact * (2 * inverse)


def _inverse(x: Tensor, valid: Tensor | None, epsilon: float, relative: bool) -> Tensor:
    """``1 / epsilon``, or with ``relative`` one over its product with the mean square of the valid elements."""
    exact = upcast(x)
    if not relative:
        return exact.new_full((), 1 / max(epsilon, SMALLEST_EPSILON))
    square = valid_sum(exact.square(), valid) / at_least_one(valid_count(x, valid))
    return (square * epsilon).clamp_min(SMALLEST_EPSILON).reciprocal()


# --- chunks ----------------------------------------------------------------------------------------------------------


def _layout(documents: Tensor | None, x: Tensor, chunk: int) -> tuple[Tensor | None, Tensor | None, int]:
    """``(index, chunks, slots)``: the slot of each token, how many slots hold a chunk, and how many there are.

    Padding has the slot after the last. Without ``documents`` each slot holds the next ``chunk`` tokens of a row, and
    there is no index. Integer documents have a slot a token, most of them empty: how many are needed is known on the
    device only.
    """
    rows, tokens = x.shape[:-2].numel(), x.shape[-2]
    per_row = (tokens + chunk - 1) // chunk
    if documents is None:
        return None, None, rows * per_row
    documents = documents.reshape(rows, tokens)
    valid = documents.bool()
    rank = valid.cumsum(-1) - 1
    if documents.dtype != torch.bool:
        per_row = tokens
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
        rank = rank - torch.where(begins, rank, 0).cummax(-1).values
    first = valid & (rank % chunk == 0)
    slot = first.cumsum(-1) - 1 + per_row * torch.arange(rows, device=x.device).unsqueeze(-1)
    return torch.where(valid, slot, rows * per_row).flatten(), first.sum(), rows * per_row


def _count(x: Tensor, chunks: Tensor | None, slots: int) -> int | Tensor:
    """Pairs of a chunk and a neuron, at least 1."""
    return at_least_one((slots if chunks is None else chunks) * x.shape[-1])


def _chunk_sums(terms: Tensor, index: Tensor | None, chunk: int, slots: int) -> Tensor:
    """Sums over the tokens of each slot, (slots, width), then that of padding if there is an index."""
    if index is not None:
        return terms.new_zeros(slots + 1, terms.shape[-1]).index_add(0, index, terms.flatten(0, -2))
    padded = F.pad(terms, (0, 0, 0, -terms.shape[-2] % chunk))
    return padded.reshape(slots, chunk, terms.shape[-1]).sum(1)


def _at_tokens(sums: Tensor, x: Tensor, index: Tensor | None, chunk: int) -> Tensor:
    """The sum of each token's slot, in the shape of ``x``."""
    if index is not None:
        return sums.index_select(0, index).reshape(x.shape)
    tokens, rows = x.shape[-2], x.shape[:-2]
    return sums.repeat_interleave(chunk, 0).reshape(*rows, tokens + -tokens % chunk, x.shape[-1])[..., :tokens, :]


def check_probability(probability: Probability, relative: bool) -> Probability:
    """Return ``probability`` or raise a ValueError."""
    if probability not in get_args(Probability):
        raise ValueError(f"`probability` must be 'density' or 'share', got {probability!r}.")
    if relative and probability == "share":
        raise ValueError(
            "`relative=True` scales the `epsilon` of probability='density'; probability='share' does not see the scale "
            "of the activations anyway. Leave `relative` out."
        )
    return probability
