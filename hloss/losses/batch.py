"""The arguments of a loss over pairs, checked with one read of the device."""

import torch
from torch import Tensor

from hloss.numerics import Prepare, check_embeddings, checked_labels, integers, norm_range, refuse_rows, row_norms


class Batch:
    """Embeddings and their labels, or a matrix of pairs, with or without references. Arguments as for `HistogramLoss`.

    Labels are moved to the embeddings' device. Shapes and dtypes are checked at once, values by `verify`.

    Raises:
        ValueError: a shape or dtype is wrong.
    """

    def __init__(
        self, embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None
    ) -> None:
        check_embeddings("embeddings", embeddings)
        self.embeddings, self.references = embeddings, references
        self.within = references is None  # The pairs i < j of one set.
        if references is not None:
            check_embeddings("reference_embeddings", references)
            if references.shape[1] != embeddings.shape[1] or references.dtype != embeddings.dtype:
                raise ValueError(
                    f"reference_embeddings must be (m, {embeddings.shape[1]}) of {embeddings.dtype}: "
                    f"got {tuple(references.shape)} of {references.dtype}"
                )
        self.shape = len(embeddings), len(embeddings if references is None else references)
        self.labels = self._on_device(integers("labels", labels))
        self.reference_labels = self._checked_reference_labels(reference_labels)

    def _on_device(self, labels: Tensor) -> Tensor:
        return labels.to(self.embeddings.device, non_blocking=self.embeddings.is_cuda)

    def _checked_reference_labels(self, given: Tensor | None) -> Tensor | None:
        n, m = self.shape
        if self.labels.ndim == 2:
            if self.labels.shape != (n, m):
                raise ValueError(f"the matrix of pairs must have shape ({n}, {m}): got {tuple(self.labels.shape)}")
            if given is not None:
                raise ValueError("reference_labels must be None with a matrix of pairs")
            return None
        if self.labels.shape != (n,):
            got = tuple(self.labels.shape)
            raise ValueError(f"labels must have shape ({n},) or be a ({n}, {m}) matrix of pairs: got {got}")
        if self.within:
            if given is not None:
                raise ValueError("reference_labels need reference_embeddings: got none")
            return None
        if given is None:
            raise ValueError(f"reference_labels must be integers of shape ({m},): got None")
        return self._on_device(checked_labels("reference_labels", given, m))

    @property
    def is_matrix(self) -> bool:
        """Whether the pairs are given by a matrix of +1, -1 and 0."""
        return self.labels.ndim == 2

    def verify(self, prepare: Prepare, *numbers: Tensor) -> list[float]:
        """Check the values, and prepare the embeddings for the loss. Synchronises with the device once.

        Args:
            prepare: `to_normalize`, `to_use_raw` or `to_use_as_units`.
            numbers: float64 scalars on the device, to be read at the same time.

        Returns:
            The numbers.

        Raises:
            ValueError: embeddings or entries of the matrix of pairs are refused; rows are named.
        """
        sides = [x for x in (self.embeddings, self.references) if x is not None]
        self.norms = [row_norms(x) for x in sides]
        faults = [mask.any() for _, mask, _ in self._faults()]
        ranges = [end for norms in self.norms for end in norm_range(norms.double())]
        values = torch.stack([*ranges, *faults, *numbers]).tolist()
        names = ("embeddings", "reference_embeddings")
        prepared = [prepare(names[i], x, *values[2 * i : 2 * i + 2]) for i, x in enumerate(sides)]
        self.norms = [old if a is b else row_norms(b) for old, a, b in zip(self.norms, sides, prepared, strict=True)]
        self.embeddings, self.references = prepared[0], None if self.within else prepared[1]
        del values[: 2 * len(sides)]
        if any(values[: len(faults)]):
            for fault in self._faults():
                refuse_rows(*fault)
        return values[len(faults) :]

    def _faults(self) -> list[tuple[str, Tensor, str]]:
        """Return what a matrix of pairs must be, a mask of the rows that are not, and why."""
        if not self.is_matrix:
            return []
        matrix, name = self.labels, "the matrix of pairs"
        values = ((matrix > 1) | (matrix < -1)).any(1)
        faults = [(f"{name} may hold +1, -1 and 0 alone;", values, "hold other values")]
        if self.within:
            faults.append((f"{name} must be symmetric;", (matrix != matrix.T).any(1), "differ from their columns"))
        return faults
