"""Singular values of a model's plain weights, followed through a training: their largest, and their effective rank.

The quantities are those of `functional`; here is which weights are looked at, in which order, and what is kept between
two looks so that the next one is cheap.
"""

import math

import torch
from torch import Tensor, nn

from lightning_reg import capture, reparam
from lightning_reg.functional.effective_rank import rank_of, singular_values
from lightning_reg.functional.spectral_norm import leading_singular_triplet, weight_matrices

BLOCK, ROUNDS = 16, 3  # of the subspace iteration for spectral norms: vectors, and products with W and its transpose
MOST_HELD = 2**26  # elements of the weights that are copied at a time
MOST_WORK = 2**22  # cubes of the smaller sides of the matrices that are decomposed at a look, some 5 ms on a CPU


class Weights:
    """Spectral norms of plain weights: exact at first, then by a subspace iteration that goes on where it stopped.

    The power method of `functional.spectral_norm` follows a weight that moves a little in each step. Between two
    logging steps a new direction can take the lead: a few products with a block of vectors find it, with one vector
    take tens (measured on a small ViT, 50 AdamW steps apart: 0.7 % too low at worst, against 35 %).

    Effective ranks need all singular values. Of small models a quarter of the matrices is decomposed at a look, in
    turn, which gives their norms too; of larger ones a matrix or a few, and the norms of all are followed.

    Args:
        model: The model whose weights are followed; those sigma-Reparam has taken are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.entries = dict(default_weights(model))
        self.bases: dict[str, Tensor] = {}  # (parts, columns, block), the leading vector last
        self._known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # norm and rank of each matrix, the last known
        self._turn = 0  # the matrix whose rank comes next

    @torch.no_grad()
    def spectra(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``(norms, ranks)`` of each weight: norms of parts or their largest, ranks of parts, inf if not known."""
        parts = {label: [(label, part) for part in range(entry[2])] for label, entry in self.entries.items()}
        every = [matrix for matrices in parts.values() for matrix in matrices]
        small = sum(self._side(label) ** 3 for label, _ in every) <= MOST_WORK
        share = MOST_WORK // 4 if small and self._known else MOST_WORK
        self._known |= self._decompose(self._next(every, share))
        if not self._known:
            return self.norms(), {}
        unknown = torch.full_like(next(iter(self._known.values()))[1], torch.inf)
        last = {label: [self._known.get(key, (unknown, unknown)) for key in keys] for label, keys in parts.items()}
        ranks = {label: torch.stack([rank for _, rank in pairs]) for label, pairs in last.items()}
        if not small:
            return self.norms(), ranks
        return {label: torch.stack([norm for norm, _ in pairs]) for label, pairs in last.items()}, ranks

    def _next(self, parts: list[tuple[str, int]], most: int) -> list[tuple[str, int]]:
        """The matrices whose turn it is: at least one, at most all."""
        chosen: list[tuple[str, int]] = []
        work = 0
        while len(chosen) < len(parts):
            following = parts[(self._turn + len(chosen)) % len(parts)]
            work += self._side(following[0]) ** 3
            if chosen and work > most:
                break
            chosen.append(following)
        self._turn = (self._turn + len(chosen)) % max(1, len(parts))
        return chosen

    def _side(self, label: str) -> int:
        owner, tensor, parts, transposed = self.entries[label]
        rows, *rest = owner._parameters[tensor].shape  # type: ignore[union-attr]
        columns = math.prod(rest)
        return min(rows, columns // parts) if transposed else min(rows // parts, columns)

    def _decompose(self, chosen: list[tuple[str, int]]) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Spectral norm and effective rank of matrices, those of one shape together."""
        shapes: dict[torch.Size, dict[tuple[str, int], Tensor]] = {}
        whole = {label: self._matrices(label) for label in dict.fromkeys(label for label, _ in chosen)}
        for label, part in chosen:
            shapes.setdefault(whole[label].shape[1:], {})[label, part] = whole[label][part]
        found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        for group in shapes.values():
            values = singular_values(torch.stack(list(group.values())))
            pairs = zip(values[:, -1].unbind(), rank_of(values).unbind(), strict=True)
            found |= dict(zip(group, pairs, strict=True))
        return found

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Largest spectral norm of the parts of each weight, scalars."""
        norms: dict[str, Tensor] = {}
        for group in self._groups():
            matrices = {label: self._matrices(label) for label in group}
            for label in group:
                if label not in self.bases:
                    self.bases[label] = _first_basis(matrices[label])
            bases = {label: self.bases[label] for label in group}
            for _ in range(ROUNDS):
                images = _orthonormal({label: matrices[label] @ basis for label, basis in bases.items()})
                bases = _orthonormal({label: matrices[label].mT @ image for label, image in images.items()})
            for label, basis in bases.items():
                norms[label] = _norm_along(matrices[label], basis[..., -1])
                self.bases[label] = _revived(basis)
        return norms

    def _groups(self) -> list[list[str]]:
        """Labels whose weights are held at a time: in half precision or sharded they are copies."""
        groups: list[list[str]] = []
        held = MOST_HELD
        for label, (owner, tensor, *_) in self.entries.items():
            size = owner._parameters[tensor].numel()  # type: ignore[union-attr]
            if held + size > MOST_HELD:
                groups.append([])
                held = 0
            groups[-1].append(label)
            held += size
        return groups

    def _matrices(self, label: str) -> Tensor:
        owner, tensor, parts, transposed = self.entries[label]
        weight = reparam.whole_tensor(owner._parameters[tensor].detach())  # type: ignore[union-attr]
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight_matrices(exact, parts, transposed)


def _first_basis(matrices: Tensor) -> Tensor:
    """Random vectors, and the exact leading one, (parts, columns, block)."""
    _, _, leading = leading_singular_triplet(matrices)
    basis = _random_basis(matrices.shape[-1], min(BLOCK, *matrices.shape[1:]), leading)
    return torch.cat([basis.expand(len(matrices), -1, -1)[..., 1:], leading.nan_to_num(0.0).unsqueeze(-1)], -1)


def _random_basis(columns: int, block: int, like: Tensor) -> Tensor:
    basis = torch.randn(columns, block, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(basis, dim=0).to(like)


def _orthonormal(blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal bases of the columns of each block (parts, rows, block), the leading singular vector last.

    From the eigenvectors of the Gram matrices, all in one batch: a QR for each would be hundreds of small calls.
    """
    grams = [(block.mT @ block).nan_to_num(0.0, 0.0, 0.0) for block in blocks.values()]
    wide = [nn.functional.pad(gram, (0, BLOCK - gram.shape[-1]) * 2) for gram in grams]
    values, vectors = torch.linalg.eigh(torch.cat(wide))
    # directions below the rounding of the largest stay short, so that they are not taken for anything
    limits = torch.finfo(values.dtype)
    scale = values.maximum(values[:, -1:] * limits.eps).clamp_min(limits.tiny).rsqrt().unsqueeze(-2)
    turns = (vectors * scale).split([len(gram) for gram in grams])
    return {
        label: block @ turn[:, : block.shape[-1], -block.shape[-1] :]
        for (label, block), turn in zip(blocks.items(), turns, strict=True)
    }


def _norm_along(matrices: Tensor, vectors: Tensor) -> Tensor:
    # matrix-vector products do not round through TF32, whatever the user allowed
    vectors = nn.functional.normalize(vectors, dim=-1)
    return torch.stack(
        [torch.mv(matrix, vector).norm() for matrix, vector in zip(matrices, vectors, strict=True)]
    ).max()


def _revived(basis: Tensor) -> Tensor:
    """Replace what a weight of 0 (LoRA, adaLN-zero) or one that is not finite left behind by random vectors."""
    alive = basis.norm(dim=-2, keepdim=True) > 0.5
    return torch.where(alive, basis, _random_basis(basis.shape[-2], basis.shape[-1], basis))


def default_weights(model: nn.Module) -> list[tuple[str, tuple[nn.Module, str, int, bool]]]:
    """The weights that `SigmaReparam` takes by default and has not taken: label, owner, tensor, parts, transposed."""
    modules = capture.named_modules(model)
    owners = reparam._owners(modules)
    found: dict[int, tuple[str, tuple[nn.Module, str, int, bool]]] = {}
    for name, module in modules.items():
        for tensor in reparam._weight_names(module):
            weight = module._parameters.get(tensor)
            if weight is None or reparam._unsupported(module, tensor, weight) or weight.dim() < 2:
                continue
            if id(weight) in found or any(isinstance(owner, nn.Embedding) for _, owner, _ in owners[id(weight)]):
                continue
            parts = reparam._parts(name, module, tensor, modules.get(name.rpartition(".")[0]))
            entry = module, tensor, parts, reparam._is_transposed(module)
            found[id(weight)] = reparam._label(name, tensor), entry
    return list(found.values())
