"""Similarity of embeddings: the cosine, or minus half the squared Euclidean distance of the embeddings as they are.

Similarities are compared in float64. Those within `TIE` of each other, far above their rounding error, are equal.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import USUAL, check_embeddings, checked_labels, one_of, refuse_not_finite, row_norms, to_normalize

TIE = 1e-13  # Relative to the squared norms that a similarity is computed from (1 for cosines).
METRICS = ("cosine", "euclidean")
ROWS, GPU_ROWS = 2**10, 2**14  # Rows that are converted at once.
UNDERFLOW = 1e-35  # Above the error of a float32 product whose terms are too small for float32.
SAMPLE = 1024  # Rows whose median replaces the mean as the centre if outliers move it.


class SimilaritySpace:
    """The similarity of all pairs of embeddings from `checked_embeddings`."""

    def __init__(self, embeddings: Tensor, metric: str) -> None:
        self.embeddings, self.metric = embeddings, metric
        self.centre = centre(embeddings) if metric == "euclidean" else None
        working = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        self.vectors = torch.empty(embeddings.shape, dtype=working, device=embeddings.device)
        self.squares = torch.ones(len(embeddings), dtype=torch.float64, device=embeddings.device)
        for rows in slices(len(embeddings), GPU_ROWS if embeddings.is_cuda else ROWS):
            exact = self.exact_vectors(rows)
            self.vectors[rows] = exact.to(working)
            self.squares[rows] = self.squares_of(exact)
        self.half_squares = self.vectors.square().sum(1) / 2
        # Seven standard deviations of the error of a float32 product of unit vectors; float64 products need none.
        rounding: float = 2 * (embeddings.shape[1] ** 0.5 + 2) * torch.finfo(torch.float32).eps
        self.rounding, self.underflow = (rounding, UNDERFLOW) if working == torch.float32 else (0.0, 0.0)

    def exact_vectors(self, rows: Tensor | slice) -> Tensor:
        """Return float64 vectors (rows, d) for `products`."""
        vectors = self.embeddings[rows].double()
        return F.normalize(vectors) if self.centre is None else vectors - self.centre

    def exact(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """Return the float64 similarity (rows, columns)."""
        return self.products(self.exact_vectors(rows), self.exact_vectors(columns))

    def approximate(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Write the similarity (rows, columns) in the working precision to `out`."""
        torch.mm(self.vectors[rows], self.vectors[columns].T, out=out)
        if self.metric == "euclidean":
            out.sub_(self.half_squares[rows, None]).sub_(self.half_squares[columns])

    def products(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Return the similarity of vectors from `exact_vectors`."""
        similarity = queries @ gallery.T
        if self.metric == "euclidean":
            similarity -= queries.square().sum(1, keepdim=True) / 2 + gallery.square().sum(1) / 2
        return similarity

    def squares_of(self, vectors: Tensor) -> Tensor:
        """Return the squared norms (rows,) of vectors from `exact_vectors`: 1 for cosines."""
        return vectors.square().sum(1) if self.metric == "euclidean" else vectors.new_ones(len(vectors))

    def edge(self, similarity: Tensor, squares: Tensor) -> Tensor:
        """Return the least similarity that is equal to the given one up to rounding; `squares` are the queries'."""
        return similarity - TIE * self._scale(similarity, squares)

    def doubt(self, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds between which an approximate similarity may reach the `edge` (n,) of its row or not."""
        slack = self.rounding * self._scale(edge, self.squares) + self.underflow
        working = self.vectors.dtype
        return (edge - slack).to(working), (edge + slack).to(working)

    def _scale(self, similarity: Tensor, squares: Tensor) -> Tensor:
        """Return a bound of the squared norms of queries and of images about as similar to them: (|q| + D)^2."""
        if self.metric == "cosine":
            return squares
        return (2 * squares - 4 * similarity).clamp(min=0).minimum(self.squares.max())


def centre(embeddings: Tensor) -> Tensor:
    """Return the mean (d,), float64, or the median of a sample of rows if outliers move the mean away from it.

    Vectors from the centre have the same distances as the embeddings, and lose fewer digits.
    """
    mean = embeddings.mean(0, dtype=torch.float64)
    sample = embeddings[:: -(-len(embeddings) // SAMPLE)].double()
    median = sample.median(0).values
    spread = (sample - median).square().sum(1).median()
    return mean.where((mean - median).square().sum() <= 100 * spread, median)


def checked_embeddings(name: str, embeddings: Tensor, metric: str) -> tuple[Tensor, float]:
    """Return detached embeddings, and by what they were multiplied so that their squares are finite.

    Raise ValueError if a shape or dtype is wrong, or a row is NaN, infinite or, for the cosine, zero.
    """
    one_of("metric", metric, METRICS)
    check_embeddings(name, embeddings)
    if not len(embeddings):
        raise ValueError(f"{name} must have at least one row: got none")
    embeddings = embeddings.detach()
    shortest, longest = torch.stack(row_norms(embeddings).aminmax()).tolist()
    if USUAL[0] <= (shortest if metric == "cosine" else longest) and longest <= USUAL[1]:
        return embeddings, 1.0
    if metric == "cosine":
        return to_normalize(name, embeddings.double(), shortest, longest), 1.0
    refuse_not_finite(name, ~embeddings.isfinite().all(1))
    exponent = math.frexp(embeddings.abs().max().item())[1]
    scale = 2.0 ** -max(min(exponent, 1000), -1000)
    return embeddings.double() * scale, scale


def checked_set(embeddings: Tensor, labels: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return the embeddings from `checked_embeddings`, and the labels on their device; raise ValueError likewise."""
    checked = checked_embeddings("embeddings", embeddings, metric)[0]
    return checked, checked_labels("labels", labels, len(embeddings)).to(embeddings.device)


def slices(n: int, step: int) -> list[slice]:
    """Return consecutive slices of `step` rows that cover n rows."""
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def count_reaching(similarity: Tensor, threshold: Tensor, dim: int, memory: Tensor) -> Tensor:
    """Count the similarities along `dim` that reach each query's threshold, int64. Overwrites `memory`."""
    # Floats count exactly up to 2^24, several times as fast as booleans.
    reached = memory[: similarity.numel()].view(similarity.shape)
    torch.ge(similarity, threshold.unsqueeze(dim), out=reached)
    return reached.sum(dim, dtype=torch.float32 if memory.dtype == torch.float16 else None).long()
