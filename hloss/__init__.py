"""The histogram loss of Ustinova & Lempitsky (2016) and what it is compared with; needs torch alone."""

from hloss.baselines import BinomialDeviance
from hloss.distributed import global_batch
from hloss.histogram import HistogramLoss, histogram_loss, pair_histograms, pair_slopes, reverse_probability
from hloss.retrieval import recall_at_k
from hloss.samplers import ClassShuffleSampler

__all__ = [
    "BinomialDeviance",
    "ClassShuffleSampler",
    "HistogramLoss",
    "global_batch",
    "histogram_loss",
    "pair_histograms",
    "pair_slopes",
    "recall_at_k",
    "reverse_probability",
]
