"""Chunk density of activations (BlockFFN) as a loss. The quantity is `functional.chunk_density`."""

from torch import Tensor, nn

from lightning_reg.functional.activation_density import check_chunk, check_epsilon
from lightning_reg.functional.chunk_density import Probability, check_probability, chunk_tap


class ChunkDensityLoss(nn.Module):
    """Share of neurons that any token of a chunk switches on, minimised.

    Args:
        chunk: Valid tokens in a chunk, >= 1.
        probability: ``"density"`` or ``"share"``: what says how much a neuron is on.
        epsilon: Softness of the density, > 0.
        relative: Scale ``epsilon`` by the mean square of the activations.

    Example:
        >>> import torch
        >>> ChunkDensityLoss()(torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, -3.0]]))
        tensor(0.5000)
    """

    def __init__(
        self,
        chunk: int = 64,
        *,
        probability: Probability = "density",
        epsilon: float = 1e-7,
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.chunk, self.probability = check_chunk(chunk), check_probability(probability, relative)
        self.epsilon, self.relative = check_epsilon(epsilon), relative

    def forward(self, x: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Penalty of activations ``x`` (..., tokens, width), ``documents`` of shape (..., tokens); a scalar up to 1."""
        return self.tap(x, documents)[1]

    def tap(self, x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` unchanged, its penalty joined to the same autograd node, and the detached chunk density."""
        x, density = chunk_tap(
            x, documents=documents, chunk=self.chunk, probability=self.probability, epsilon=self.epsilon,
            relative=self.relative,
        )  # fmt: skip
        return x, density, density.detach()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"chunk={self.chunk}, probability={self.probability!r}, epsilon={self.epsilon}, relative={self.relative}"
