"""The histogram loss of Ustinova & Lempitsky (2016), baseline losses, samplers and retrieval; requires only torch."""

from importlib.metadata import PackageNotFoundError, version

from hloss.losses.baselines import BinomialDeviance, Contrastive, LiftedStructure, Quadruplet, SemiHardTriplet, Triplet
from hloss.losses.distributed import global_batch
from hloss.losses.histogram import HistogramLoss, histogram_loss, pair_histograms, pair_slopes, reverse_probability
from hloss.losses.pairs import pair_matrix
from hloss.retrieval.protocols import evaluate
from hloss.retrieval.ranks import recall_at_k
from hloss.samplers import BalancedSampler, ClassShuffleSampler, RandomClassSampler

__all__ = [
    "BalancedSampler",
    "BinomialDeviance",
    "ClassShuffleSampler",
    "Contrastive",
    "HistogramLoss",
    "LiftedStructure",
    "Quadruplet",
    "RandomClassSampler",
    "SemiHardTriplet",
    "Triplet",
    "evaluate",
    "global_batch",
    "histogram_loss",
    "pair_histograms",
    "pair_matrix",
    "pair_slopes",
    "recall_at_k",
    "reverse_probability",
]

try:
    __version__ = version("hloss")
except PackageNotFoundError:  # Imported from its folder without an installation.
    __version__ = "unknown"
