"""Documents of a batch, found token by token: the reference for penalties over tokens."""

import numpy as np
import torch
from torch import Tensor

Span = tuple[int, list[int]]  # a row and its tokens of one document

INTEGERS = torch.tensor(
    [
        [1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0],  # two documents, padding after them
        [0, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5],  # padding before
        [1, 1, 0, 1, 1, 3, 3, 3, 1, 4, 7],  # the same number again is another document; documents of one token
    ]
)
BOOLEAN = torch.tensor([[1] * 8 + [0] * 3, [0] * 2 + [1] * 9, [1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1]]).bool()
DOCUMENTS = {"none": None, "integers": INTEGERS, "boolean": BOOLEAN, "nothing": torch.zeros(3, 11).bool()}
SHAPE = (3, 11, 5)


def spans(x: Tensor, documents: Tensor | None) -> list[Span]:
    rows, tokens = x.shape[:2]
    if documents is None:
        return [(row, list(range(tokens))) for row in range(rows)]
    if documents.dtype == torch.bool:
        found = [(row, [t for t in range(tokens) if documents[row, t]]) for row in range(rows)]
        return [span for span in found if span[1]]
    found = []
    for row, numbers in enumerate(documents.tolist()):
        for token, number in enumerate(numbers):
            if number and token and numbers[token - 1] == number:
                found[-1][1].append(token)
            elif number:
                found.append((row, [token]))
    return found


def pairs(x: Tensor, documents: Tensor | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each token with the next one of its document, in float64."""
    values = x.detach().double().numpy()
    return [
        (values[row, token], values[row, token + 1])
        for row, tokens in spans(x, documents)
        for token in tokens
        if token + 1 in tokens
    ]


def valid_rows(x: Tensor, documents: Tensor | None) -> np.ndarray:
    values = x.detach().double().numpy()
    return np.array([values[row, token] for row, tokens in spans(x, documents) for token in tokens])
