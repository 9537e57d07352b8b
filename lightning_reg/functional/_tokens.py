"""What the quantities of activations share: valid elements, their sums, neighbouring tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.kernels import compiling


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def valid_count(x: Tensor, mask: Tensor | None) -> int | Tensor:
    """Number of valid elements."""
    return x.numel() if mask is None else mask.sum() * x.shape[-1]


def at_least_one(count: int | Tensor) -> int | Tensor:
    """A number to divide by."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(1, count)


def valid_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of the valid elements, whatever the others hold."""
    if mask is not None:
        return torch.where(mask, _row_sums(x).unsqueeze(-1), 0.0).sum()
    return _row_sums(x).sum() if compiling() else x.sum()


def _row_sums(x: Tensor) -> Tensor:
    """Sums over the last axis; in compiled code of pieces first, which are summed where ``x`` is computed."""
    if compiling():
        for piece in (1024, 512, 256, 128):
            if x.shape[-1] > piece and x.shape[-1] % piece == 0:
                return x.unflatten(-1, (-1, piece)).sum(-1).sum(-1)
    return x.sum(-1)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The earlier and the later token of each pair of neighbours, each (..., tokens - 1, width)."""
    return x[..., :-1, :], x[..., 1:, :]


def join(earlier: Tensor, later: Tensor, pairs: Tensor | None, tokens: int) -> Tensor:
    """Counterpart of ``split``, a sum where two pairs share a token; pairs that do not count give 0."""
    if pairs is not None:
        earlier, later = earlier.masked_fill(~pairs, 0.0), later.masked_fill(~pairs, 0.0)
    return (F.pad(earlier, (0, 0, 0, 1)) + F.pad(later, (0, 0, 1, 0)))[..., :tokens, :]


def neighbours(documents: Tensor | None) -> Tensor | None:
    """Whether each token and the next are of the same document, (..., tokens - 1, 1); None when all are."""
    if documents is None:
        return None
    earlier, later = documents[..., :-1], documents[..., 1:]
    return ((earlier == later) & later.bool()).unsqueeze(-1)


def check_activations(x: Tensor) -> Tensor:
    """Return ``x`` or raise a ValueError."""
    if not torch.is_floating_point(x) or x.dim() == 0:
        raise ValueError(f"`x` must be floating point of shape (..., width), got {tuple(x.shape)} {x.dtype}.")
    return x


def check_tokens(x: Tensor) -> Tensor:
    """Return ``x`` or raise a ValueError."""
    if check_activations(x).dim() < 2:
        raise ValueError(
            f"`x` must have an axis of tokens before the last, (..., tokens, width), got {tuple(x.shape)}. Use "
            "`targets=` to leave out what does not run on sequences."
        )
    return x


def check_token_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``mask`` as (..., 1) for ``x`` (..., width), or raise a ValueError."""
    if mask is None:
        return None
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"`mask` must have the shape of `x` without its last axis, {tuple(x.shape[:-1])}, got {tuple(mask.shape)}."
        )
    if torch.is_floating_point(mask):
        raise ValueError(f"`mask` must be boolean or 0/1 integers (True = valid), got {mask.dtype}; use `mask.bool()`.")
    return mask.bool().unsqueeze(-1)


def check_documents(documents: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``documents`` or raise a ValueError."""
    if documents is None:
        return None
    if documents.shape != x.shape[:-1]:
        raise ValueError(
            f"`documents` must have the shape of `x` without its last axis, {tuple(x.shape[:-1])}, got "
            f"{tuple(documents.shape)}. They are what the `mask` of a callback selects."
        )
    if documents.is_floating_point() or documents.is_complex():
        raise ValueError(
            "`documents` must be boolean (True = valid) or integers (0 = padding, equal neighbours = same document), "
            f"got {documents.dtype}; use `documents.bool()` or `.long()`."
        )
    return documents
