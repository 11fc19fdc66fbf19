"""Similarity of embeddings: the cosine, or minus half the squared Euclidean distance without normalisation.

Similarities are compared in float64. Two similarities are a tie, and count as equal, if they differ by at most `TIE`.
This bound is much larger than their rounding error.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import USUAL, check_embeddings, checked_labels, one_of, refuse_not_finite, row_norms, to_normalize

TIE = 1e-13  # Largest difference of a tie, relative to the squared norms of the two vectors (1 for cosines).
METRICS = ("cosine", "euclidean")
ROWS, GPU_ROWS = 2**10, 2**14  # Rows that are converted at once.
UNDERFLOW = 1e-35  # Bound of the error of a float32 product that terms too small for float32 cause.
SAMPLE = 1024  # If outliers shift the mean, the centre is the median of at most this many rows.


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
        # Seven standard deviations of the rounding error of a float32 product of unit vectors; 0 in float64.
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
        """Return the smallest similarity that is a tie with the given one. `squares` are the queries' squared norms."""
        return similarity - TIE * self._scale(similarity, squares)

    def doubt(self, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Return two thresholds (n,) for approximate similarities, given the `edge` of each row.

        An approximate similarity below the first threshold means that the exact one is below the edge. At or above the
        second, the exact similarity is at least the edge. Between them, the exact similarity decides.
        """
        slack = self.rounding * self._scale(edge, self.squares) + self.underflow
        working = self.vectors.dtype
        return (edge - slack).to(working), (edge + slack).to(working)

    def _scale(self, similarity: Tensor, squares: Tensor) -> Tensor:
        """Return a bound of the squared norms of a query q and of an image with this similarity.

        For the cosine it is 1. For a Euclidean distance D it is 2 |q|^2 + 2 D^2, limited to the largest squared norm.
        """
        if self.metric == "cosine":
            return squares
        return (2 * squares - 4 * similarity).clamp(min=0).minimum(self.squares.max())


def centre(embeddings: Tensor) -> Tensor:
    """Return the mean (d,) in float64. If outliers shift it, return the median of a sample of rows instead.

    Subtracting the centre does not change distances, and products of the differences have smaller rounding errors.
    """
    mean = embeddings.mean(0, dtype=torch.float64)
    sample = embeddings[:: -(-len(embeddings) // SAMPLE)].double()
    median = sample.median(0).values
    spread = (sample - median).square().sum(1).median()
    return mean.where((mean - median).square().sum() <= 100 * spread, median)


def checked_embeddings(name: str, embeddings: Tensor, metric: str) -> tuple[Tensor, float]:
    """Return detached embeddings, and the power of two by which they are multiplied to keep their squares finite.

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
    """Return embeddings from `checked_embeddings`, and labels on their device; raise ValueError if one is invalid."""
    checked = checked_embeddings("embeddings", embeddings, metric)[0]
    return checked, checked_labels("labels", labels, len(embeddings)).to(embeddings.device)


def slices(n: int, step: int) -> list[slice]:
    """Return consecutive slices of `step` rows that cover n rows."""
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def count_reaching(similarity: Tensor, threshold: Tensor, dim: int, memory: Tensor) -> Tensor:
    """Count along `dim`, as int64, the similarities that are at least the query's threshold. Overwrites `memory`."""
    # Sums of floats are exact up to 2^24, and several times as fast as sums of booleans.
    reached = memory[: similarity.numel()].view(similarity.shape)
    torch.ge(similarity, threshold.unsqueeze(dim), out=reached)
    return reached.sum(dim, dtype=torch.float32 if memory.dtype == torch.float16 else None).long()
