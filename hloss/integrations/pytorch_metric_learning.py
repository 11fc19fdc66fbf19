"""Drop-in replacements for the histogram loss and the cross-batch memory of pytorch-metric-learning.

Change the import alone: `from hloss.integrations.pytorch_metric_learning import HistogramLoss`. Miners, trainers and
DistributedLossWrapper work as before.
"""

from typing import Any

import torch
from torch import Tensor

from hloss.losses import histogram

try:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.losses import CrossBatchMemory as BaseCrossBatchMemory
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_pairs
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs pytorch-metric-learning: pip install 'hloss[pml]'") from error

Indices = tuple[Tensor, ...]


class HistogramLoss(BaseMetricLossFunction):
    """`hloss.HistogramLoss` with the interface of a loss of pytorch-metric-learning.

    Call it as `loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)`. `indices_tuple` holds the
    triplets or pairs of a miner. The value equals that of `pytorch_metric_learning.losses.HistogramLoss`, except that:

    - equal and opposite embeddings are binned; theirs can fail with an index out of range.
    - all pairs count. Theirs drops the negative pairs of two embeddings that are each alone in their class, and each
      pair of a miner whose anchor has no pair of the other kind.
    - `ref_emb` is accepted: the pairs are those between `embeddings` and `ref_emb`.
    - half precision is computed, and returned, in float32.
    - zero embeddings, NaN, and a pair that a miner lists as positive and as negative raise ValueError.
    - settings out of range raise ValueError instead of AssertionError.
    - no call warns.

    A reducer has no effect, as in theirs: the loss is already one number. The distance only names the similarity, so
    it records no statistics. The settings from `kernel` to `density` are those of `hloss.HistogramLoss`.

    Args:
        n_bins: number of intervals of [-1, 1], at least 1. If None, 2 / delta, or 100 without delta.
        delta: width of an interval, 2 / n_bins. None: from n_bins.
        on_degenerate: for a batch without positive or without negative pairs: return "zero", as theirs, or "raise".
        **kwargs: `distance` (CosineSimilarity alone), `reducer`, `embedding_regularizer`, ... of the base class.

    Raises:
        ValueError: a setting is out of range, or the distance is another one.

    Example:
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> HistogramLoss(n_bins=10)(embeddings, labels)
        tensor(0.)
    """

    def __init__(
        self,
        n_bins: int | None = None,
        delta: float | None = None,
        kernel: str = "triangular",
        bandwidth: float | None = None,
        order_cost: str = "step",
        margin: float = 0.0,
        alpha: float = 1.0,
        density: str = "histogram",
        on_degenerate: str = "zero",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        d = self.distance
        if not isinstance(d, CosineSimilarity) or (d.p, d.power) != (2, 1):
            got = f"{type(d).__name__} with p={d.p} and power={d.power}"
            raise ValueError(f"distance must be CosineSimilarity with p=2 and power=1: got {got}")
        self.loss = histogram.HistogramLoss(
            intervals(n_bins, delta), kernel, bandwidth, order_cost, margin, alpha, density, True, on_degenerate
        )
        self.delta = self.loss.settings.delta
        self.add_to_recordable_attributes(name="delta", is_stat=False)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Return the loss as the reducers expect it. Without references, `ref_emb` is `embeddings`."""
        within = ref_emb is embeddings and ref_labels is labels
        if indices_tuple is not None:
            pairs = convert_to_pairs(indices_tuple, labels, ref_labels)
            matrix = matrix_of_pairs(pairs, len(embeddings), len(ref_emb), within).to(embeddings.device)
            value = self.loss(embeddings, matrix, None if within else ref_emb)
        elif labels is None:
            raise ValueError("labels and indices_tuple are both None: give one of them")
        else:
            value = self.loss(embeddings, labels, *(() if within else (ref_emb, ref_labels)))
        return {"loss": {"losses": value, "indices": None, "reduction_type": "already_reduced"}}

    def get_default_distance(self) -> CosineSimilarity:
        """Return the only distance that the loss has."""
        return CosineSimilarity()


class CrossBatchMemory(BaseCrossBatchMemory):
    """Cross-batch memory of pytorch-metric-learning that accepts the `HistogramLoss` of this module.

    Arguments as for `pytorch_metric_learning.losses.CrossBatchMemory`. An `indices_tuple` of `forward` means positions
    in the batch. Theirs takes them for positions in the memory, where they are other embeddings.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        """Return the class names of the losses that can be wrapped."""
        return [*BaseCrossBatchMemory.supported_losses(), HistogramLoss.__name__]

    def create_indices_tuple(
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, given: Indices | None, *rest: Any
    ) -> Indices:
        """Return pairs or triplets of the batch and the memory, with the given ones of the batch."""
        if given is not None:
            anchors = (0, 2) if len(given) == 4 else (0,)
            given = tuple(x if i in anchors else self.curr_batch_idx[x] for i, x in enumerate(given))
        return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, given, *rest)


def intervals(n_bins: int | None, delta: float | None) -> int:
    """Return the number of intervals of [-1, 1] from `n_bins`, from their width `delta`, a divisor of 2, or 100."""
    if delta is None:
        return 100 if n_bins is None else n_bins
    found = round(2 / delta) if 0 < delta <= 2 else 0
    if found < 1 or abs(found * delta - 2) > 1e-6:
        raise ValueError(f"delta must be 2 divided by a whole number: got {delta!r}")
    if n_bins not in (None, found):
        raise ValueError(f"delta must be 2 / n_bins: got {delta!r} with n_bins={n_bins!r}")
    return found


def matrix_of_pairs(pairs: Indices, n: int, m: int, within: bool) -> Tensor:
    """Return the int8 matrix (n, m) of listed pairs: +1 positive, -1 negative, 0 not listed; symmetric if `within`."""
    kinds = torch.zeros(2, n, m, dtype=torch.bool, device=pairs[0].device)
    for kind, rows, columns in zip(kinds, pairs[::2], pairs[1::2], strict=True):
        kind[rows.long(), columns.long()] = True
        if within:
            kind |= kind.T.clone()
    positive, negative = kinds
    both = (positive & negative).nonzero()
    if len(both):
        raise ValueError(f"indices_tuple has pair {tuple(both[0].tolist())} as positive and as negative; list it once")
    return positive.to(torch.int8) - negative.to(torch.int8)
