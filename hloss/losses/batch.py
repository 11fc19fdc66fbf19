"""The arguments of a loss over pairs, and checks that synchronise with the device only once."""

from typing import Any

import torch
from torch import Tensor

from hloss.numerics import Prepare, check_embeddings, checked_labels, integers, refuse_rows, row_norms


class Batch:
    """Embeddings with class labels or a matrix of pairs, and optional references, as in `HistogramLoss.forward`.

    The constructor moves labels to the embeddings' device and raises ValueError for a wrong shape or dtype. `verify`
    checks the values.
    """

    def __init__(
        self, embeddings: Tensor, labels: Any, references: Tensor | None = None, reference_labels: Any = None
    ) -> None:
        check_embeddings("embeddings", embeddings)
        self.embeddings, self.references = embeddings, references
        self.within = references is None  # The pairs i < j of one set.
        if references is not None:
            check_embeddings("reference_embeddings", references)
            if references.shape[1] != embeddings.shape[1] or references.dtype != embeddings.dtype:
                needed = f"(m, {embeddings.shape[1]}) of {embeddings.dtype}"
                given = f"{tuple(references.shape)} of {references.dtype}"
                raise ValueError(f"reference_embeddings must be {needed}: got {given}")
        n, m = self.shape = len(embeddings), len(embeddings if references is None else references)
        labels = integers("labels", labels)
        self.is_matrix = labels.ndim == 2  # The pairs are given by a matrix of +1, -1 and 0.
        if labels.shape != ((n, m) if self.is_matrix else (n,)):
            got = tuple(labels.shape)
            raise ValueError(f"labels must have shape ({n},), or ({n}, {m}) as a matrix of pairs: got {got}")
        self.labels, self.reference_labels = self._on_device(labels), None
        if not (self.within or self.is_matrix):
            self.reference_labels = self._on_device(checked_labels("reference_labels", reference_labels, m))
        elif reference_labels is not None:
            pairs = "with a matrix of pairs" if self.is_matrix else "without reference_embeddings"
            raise ValueError(f"reference_labels must be None {pairs}: got {type(reference_labels).__name__}")

    def _on_device(self, labels: Tensor) -> Tensor:
        return labels.to(self.embeddings.device, non_blocking=self.embeddings.is_cuda)

    def verify(self, prepare: Prepare, *numbers: Tensor) -> list[float]:
        """Check the values, and convert the embeddings by `prepare`.

        Args:
            prepare: `to_normalize`, `to_use_raw` or `to_use_as_units` of `hloss.numerics`.
            numbers: float64 scalars on the device. They are read together with the checks, with one synchronisation.

        Returns:
            The values of `numbers`.

        Raises:
            ValueError: rows of the embeddings or of the matrix of pairs are invalid; the message lists these rows.
        """
        sides = [x for x in (self.embeddings, self.references) if x is not None]
        self.norms = [row_norms(x) for x in sides]
        faults = self._faults()
        doubles = [norms.double() for norms in self.norms]
        ranges = [end for x in doubles for end in (x.aminmax() if len(x) else x.new_ones(2))]
        read = iter(torch.stack([*ranges, *(mask.any() for _, mask, _ in faults), *numbers]).tolist())
        names = ("embeddings", "reference_embeddings")[: len(sides)]
        prepared = [prepare(name, x, next(read), next(read)) for name, x in zip(names, sides, strict=True)]
        self.norms = [old if a is b else row_norms(b) for old, a, b in zip(self.norms, sides, prepared, strict=True)]
        self.embeddings, self.references = prepared[0], None if self.within else prepared[1]
        for fault in faults:
            if next(read):
                refuse_rows(*fault)
        return list(read)

    def _faults(self) -> list[tuple[str, Tensor, str]]:
        """Return the requirements of a matrix of pairs: the text, a mask of the rows that fail, and the reason."""
        if not self.is_matrix:
            return []
        matrix, name = self.labels, "the matrix of pairs"
        values = ((matrix > 1) | (matrix < -1)).any(1)
        faults = [(f"{name} must contain only +1, -1 and 0:", values, "contain other values")]
        if self.within:
            asymmetric = (matrix != matrix.T).any(1)
            faults.append((f"{name} must be symmetric:", asymmetric, "differ from the columns of the same index"))
        return faults
