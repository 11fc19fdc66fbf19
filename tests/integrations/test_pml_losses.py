"""Losses and miners of pytorch-metric-learning by name: all of them, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from hloss.integrations.pml_losses import LEFT_OUT, PMLLoss, available
from hloss.losses.baselines import LiftedStructure, SemiHardTriplet

pytest.importorskip("pytorch_metric_learning")
REQUIRED = {"RankedListLoss": {"margin": 0.4, "Tn": 10.0}}
PROXIES = {
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "P2SGradLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
}


def batch():
    embeddings = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    return F.normalize(embeddings).requires_grad_(), torch.arange(32) // 4


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", available("losses"))
def test_every_loss_runs_by_its_name(name):
    embeddings, labels = batch()
    loss = PMLLoss(name, REQUIRED.get(name), n_classes=8, embedding_dim=8)
    value = loss(embeddings, labels)
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.any()
    assert bool(list(loss.parameters())) == (name in PROXIES)


@pytest.mark.parametrize("name", available("miners"))
def test_every_miner_runs_by_its_name(name):
    embeddings, labels = batch()
    loss = PMLLoss("TripletMarginLoss", miner=name)(embeddings, labels)
    loss.backward()
    assert embeddings.grad.any()


def test_what_is_left_out_exists_and_could_not_run():
    import pytorch_metric_learning.losses
    import pytorch_metric_learning.miners

    embeddings, labels = batch()
    for name in LEFT_OUT:
        found = getattr(pytorch_metric_learning.losses, name, None) or getattr(pytorch_metric_learning.miners, name)
        with pytest.raises((TypeError, ValueError, NotImplementedError, AssertionError)):
            found()(embeddings, labels)


def test_options_reach_the_loss_its_distance_and_the_miner():
    embeddings, labels = batch()
    embeddings = embeddings.detach().double()  # in float32 it depends on the machine who violates the margin by a hair
    lifted = PMLLoss("LiftedStructureLoss", {"distance": {"LpDistance": {"normalize_embeddings": False}}})
    torch.testing.assert_close(lifted(3 * embeddings, labels), LiftedStructure()(3 * embeddings, labels))
    squared = {"distance": {"LpDistance": {"power": 2}}}
    options = {"margin": 0.2, "type_of_triplets": "semihard", **squared}
    triplet = PMLLoss("TripletMarginLoss", {"margin": 0.2, **squared}, "TripletMarginMiner", options)
    torch.testing.assert_close(triplet(embeddings, labels), SemiHardTriplet()(embeddings, labels))
    assert (lifted.metric, triplet.metric) == ("euclidean", "cosine")
    assert PMLLoss("ContrastiveLoss", {"distance": "CosineSimilarity"}).metric == "cosine"


def test_half_precision_and_autocast_do_not_change_the_loss():
    embeddings, labels = batch()
    embeddings = embeddings.detach().bfloat16()
    expected = PMLLoss("MultiSimilarityLoss")(embeddings.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PMLLoss("MultiSimilarityLoss")(embeddings, labels) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MultiSimilarityLos",), r"pml:MultiSimilarityLos is unknown .*\(did you mean MultiSimilarityLoss\?\)"),
        (
            ("ContrastiveLoss", {"posmargin": 1}),
            r"posmargin=1 is unknown to ContrastiveLoss; .*did you mean pos_margin",
        ),
        (("ContrastiveLoss", {"distance": "Cosine"}), "Cosine is unknown to pytorch_metric_learning.distances"),
        (("ContrastiveLoss", {"distance": {"LpDistance": {"powr": 2}}}), "powr=2 is unknown to LpDistance.*mean power"),
        (("ContrastiveLoss", {"distance": 2}), r"_learning\.distances must be a name or \{name: options\}: got 2"),
        (("ArcFaceLoss", {"num_classes": 3}), "num_classes=3 is unknown to ArcFaceLoss"),
        (("RankedListLoss",), "RankedListLoss needs the options margin, Tn"),
        (("TripletMarginLoss", {}, "TripletMiner"), "TripletMiner is unknown to pytorch_metric_learning.miners"),
        (("TripletMarginLoss", {}, None, {"margin": 1}), r"miner_options=\{'margin': 1\}: there is no miner; give"),
        (("TripletMarginLoss", {}, "TripletMarginMiner", {"type": "hard"}), "type='hard' is unknown to TripletMargin"),
        (("CrossBatchMemory", {"embedding_size": 8}), "pml:CrossBatchMemory is unknown"),
        (("HistogramLoss", {"n_bins": 5, "delta": 0.1}), "HistogramLoss cannot be made with .*n_bins"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        PMLLoss(*arguments)
