"""The drop-in for pytorch-metric-learning: against a naive oracle, against its own loss, and where the two differ."""

import doctest
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

pml = pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper  # noqa: E402

from hloss.integrations import pytorch_metric_learning  # noqa: E402
from hloss.integrations.pml_losses import available  # noqa: E402
from hloss.integrations.pytorch_metric_learning import CrossBatchMemory, HistogramLoss  # noqa: E402

MINERS = [miners.MultiSimilarityMiner(), miners.TripletMarginMiner(0.1), miners.PairMarginMiner(0.5, 0.5)]


def oracle(embeddings, references, positive, negative, n_bins):
    """Equations 1, 2 and 4 for listed pairs (row, column): each pair weighs the nodes by a triangle around them."""
    if not (positive and negative):
        return 0 * embeddings.sum()
    s = F.normalize(embeddings) @ F.normalize(references).T
    t = torch.linspace(-1, 1, n_bins + 1, dtype=s.dtype)
    h_positive, h_negative = (
        (1 - (s[*torch.tensor(sorted(pairs)).T][:, None] - t).abs() * n_bins / 2).clamp(min=0).mean(0)
        for pairs in (positive, negative)
    )
    return sum(h_negative[r] * h_positive[: r + 1].sum() for r in range(n_bins + 1))


def pairs_of(labels):
    """The positive and negative pairs i < j."""
    pairs = {(i, j) for j in range(len(labels)) for i in range(j)}
    positive = {(i, j) for i, j in pairs if labels[i] == labels[j]}
    return positive, pairs - positive


def listed_pairs(indices, within):
    """The pairs of a miner's triplets or pairs, in one order within a batch."""
    anchors, positives, others, negatives = indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])
    found = [list(zip(a.tolist(), b.tolist(), strict=True)) for a, b in ((anchors, positives), (others, negatives))]
    return [{(min(p), max(p)) if within else p for p in pairs} for pairs in found]


def drawn(random, n, d):
    """Embeddings of which some repeat, exactly or by a factor, or are the opposite of another."""
    embeddings = torch.randn(n, d, generator=random, dtype=torch.float64)
    for _ in range(int(torch.randint(4, (), generator=random))):
        i, j, k = torch.randint(n, (3,), generator=random).tolist()
        embeddings[i] = embeddings[j] * (1.0, 0.7, -1.0)[k % 3]
    return embeddings


def number(random, low, high):
    return int(torch.randint(low, high, (), generator=random))


def some_of(pairs, random):
    """A few of the pairs, of which some may repeat and one stands in both orders."""
    chosen = torch.tensor(sorted(pairs))[torch.randint(len(pairs), (number(random, 1, 9),), generator=random)]
    return torch.cat([chosen, chosen[:1].flip(1)]).T


def random_batch(seed):
    """Arguments of the loss, and the positive and negative pairs that they mean."""
    random = torch.Generator().manual_seed(seed)
    n, d = number(random, 2, 15), number(random, 1, 9)
    embeddings = drawn(random, n, d).requires_grad_()
    labels = torch.randint(number(random, 1, n + 1), (n,), generator=random)
    positive, negative = pairs_of(labels.tolist())
    if seed % 4 == 1:  # references, some equal to rows of the batch
        references = torch.cat([drawn(random, number(random, 1, 15), d), embeddings.detach()[:2]]).requires_grad_()
        reference_labels = torch.randint(n, (len(references),), generator=random)
        pairs = {(i, j) for i in range(n) for j in range(len(references))}
        positive = {(i, j) for i, j in pairs if labels[i] == reference_labels[j]}
        return (embeddings, labels, None, references, reference_labels), positive, pairs - positive
    if seed % 4 == 2:  # a miner's pairs or triplets
        indices = MINERS[seed // 4 % 3](embeddings, labels)
    elif seed % 4 == 3 and positive and negative:
        indices = (*some_of(positive, random), *some_of(negative, random))
    else:
        return (embeddings, labels), positive, negative
    return (embeddings, labels, indices), *listed_pairs(indices, within=True)


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_batches_equal_the_oracle(block):
    for seed in range(100 * block, 100 * (block + 1)):
        arguments, positive, negative = random_batch(seed)
        embeddings, references = arguments[0], arguments[3] if len(arguments) > 3 else arguments[0]
        n_bins = 1 + seed % 59
        found = HistogramLoss(n_bins)(*arguments)
        expected = oracle(embeddings, references, positive, negative, n_bins)
        assert found.item() == pytest.approx(expected.item(), abs=1e-12), seed
        sides = {embeddings, references}
        gradients, wanted = (torch.autograd.grad(x, sides, materialize_grads=True) for x in (found, expected))
        torch.testing.assert_close(gradients, wanted, atol=1e-11, rtol=1e-8, msg=f"seed {seed}")


def batch(n=24, d=6, per_class=4, seed=0, dtype=torch.float64):
    embeddings = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return embeddings.requires_grad_(), torch.arange(n) // per_class


def theirs(*arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Each of its calls warns about indexing with a list.
        return losses.HistogramLoss(**settings)(*arguments)


def test_the_example_prints_what_it_shows():
    assert doctest.testmod(pytorch_metric_learning) == (0, 2)


# What pytorch-metric-learning's own tests of its histogram loss ask.


@pytest.mark.parametrize(("dtype", "n_bins"), [(torch.float16, 4), (torch.float32, 20), (torch.float64, 20)])
def test_five_embeddings_of_three_classes_give_the_loss_of_their_ten_pairs(dtype, n_bins):
    embeddings = F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.tensor([0, 0, 1, 1, 2])
    expected = oracle(embeddings.double(), embeddings.double(), *pairs_of(labels.tolist()), n_bins)
    found = HistogramLoss(n_bins=n_bins)(embeddings, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert theirs(embeddings, labels, n_bins=n_bins).item() == pytest.approx(
        found.item(), rel=1e-2 if dtype == torch.float16 else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [torch.arange(5), torch.zeros(5, dtype=torch.int64)])
def test_a_batch_without_one_kind_of_pair_is_zero(dtype, labels):
    angles = torch.deg2rad(torch.arange(0, 100, 20))
    embeddings = torch.stack([angles.cos(), angles.sin()], 1).to(dtype).requires_grad_()
    loss = HistogramLoss(n_bins=4)(embeddings, labels)
    loss.backward()
    assert loss == theirs(embeddings, labels, n_bins=4) == 0
    assert not embeddings.grad.any()
    with pytest.raises(ValueError, match=r"positive and \d+ negative pairs is undefined"):
        HistogramLoss(n_bins=4, on_degenerate="raise")(embeddings, labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bins": 1, "delta": 0.5}, "delta must be 2 / n_bins: got 0.5 with n_bins=1"),
        ({"n_bins": 10, "delta": 0.4}, "delta must be 2 / n_bins: got 0.4 with n_bins=10"),
        ({"delta": 0.03}, "delta must be 2 divided by a whole number: got 0.03"),
        ({"delta": 0.0}, "delta must be 2 divided by a whole number: got 0.0"),
        ({"n_bins": 0}, "n_bins must be a whole number of at least 1: got 0"),
        ({"distance": distances.LpDistance()}, "distance must be CosineSimilarity .*: got LpDistance with p=2"),
        ({"distance": distances.DotProductSimilarity()}, "got DotProductSimilarity"),
        ({"distance": distances.CosineSimilarity(power=2)}, "got CosineSimilarity with p=2 and power=2"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        HistogramLoss(**settings)


def test_bins_are_given_by_their_number_or_width():
    widths = [HistogramLoss(**s).delta for s in ({}, {"n_bins": 50}, {"delta": 0.04}, {"n_bins": 3, "delta": 2 / 3})]
    assert widths == [0.02, 0.04, 0.04, 2 / 3]
    assert HistogramLoss().delta == losses.HistogramLoss().delta


# Where their loss is right, ours equals it. In float64 theirs still rounds to float32.


@pytest.mark.parametrize("miner", [None, *(m for m in MINERS[:2]), miners.UniformHistogramMiner()], ids=repr)
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_equal_theirs(miner, seed):
    embeddings, labels = batch(seed=seed)
    indices = None if miner is None else miner(embeddings, labels)
    ours, other = HistogramLoss(n_bins=20)(embeddings, labels, indices), theirs(embeddings, labels, indices, n_bins=20)
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (ours, other)]
    assert ours.item() == pytest.approx(other.item(), abs=1e-6)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


# Where the two differ.


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_equal_and_opposite_embeddings_count_where_theirs_crashes(factor):
    half = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    embeddings, labels = torch.cat([half, factor * half]), torch.arange(40).repeat(2)
    found = HistogramLoss(10)(embeddings, labels).item()
    expected = oracle(embeddings.double(), embeddings.double(), *pairs_of(labels.tolist()), 10)
    assert found == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises((RuntimeError, IndexError)):  # Some cosines are beyond 1 or -1 by rounding.
        theirs(embeddings, labels, n_bins=10)


def test_negative_pairs_of_two_singletons_count():
    embeddings, labels = batch(n=6)
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    expected = oracle(embeddings, embeddings, *pairs_of(labels.tolist()), 50).item()
    assert HistogramLoss(50)(embeddings, labels).item() == pytest.approx(expected, abs=1e-12)
    assert abs(theirs(embeddings, labels, n_bins=50).item() - expected) > 1e-3


def test_pairs_whose_anchor_lacks_the_other_kind_count():
    embeddings, labels = batch()
    indices = tuple(torch.tensor(x) for x in ([0, 4], [1, 5], [0, 8], [4, 12]))  # no negative of 4, no positive of 8
    expected = oracle(embeddings, embeddings, *listed_pairs(indices, True), 50).item()
    assert HistogramLoss(50)(embeddings, labels, indices).item() == pytest.approx(expected, abs=1e-12)
    assert abs(theirs(embeddings, labels, indices, n_bins=50).item() - expected) > 1e-3


def test_references_are_accepted_where_theirs_refuses_them():
    embeddings, labels = batch()
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        theirs(embeddings, labels, None, embeddings.detach(), labels)
    same = HistogramLoss()(embeddings, labels, None, embeddings, labels)  # the batch itself: no references
    assert same == HistogramLoss()(embeddings, labels)


def test_a_pair_that_is_positive_and_negative_is_refused():
    embeddings, labels = batch()
    indices = tuple(torch.tensor(x) for x in ([3, 0], [1, 2], [1], [3]))
    with pytest.raises(ValueError, match=r"indices_tuple has pair \(1, 3\) as positive and as negative; list it once"):
        HistogramLoss()(embeddings, labels, indices)
    with pytest.raises(ValueError, match="labels and indices_tuple are both None"):
        HistogramLoss()(embeddings)


# The library around the loss.


@pytest.mark.parametrize("name", available("miners"))
def test_every_miner_is_taken_without_labels_too(name):
    embeddings, labels = batch(dtype=torch.float32)
    indices = available("miners")[name]()(embeddings, labels)
    value = HistogramLoss()(embeddings, labels, indices)
    assert value == HistogramLoss()(embeddings, indices_tuple=indices)
    value.backward()
    assert embeddings.grad.isfinite().all()


def test_settings_and_regularizer_reach_the_loss_and_reducers_do_not_matter():
    from hloss import histogram_loss

    embeddings, labels = batch()
    settings = {"kernel": "gaussian", "bandwidth": 2.0, "order_cost": "linear", "margin": 0.1}
    expected = histogram_loss(embeddings, labels, n_bins=30, **settings)
    assert HistogramLoss(30, **settings)(embeddings, labels) == expected
    for reducer in (reducers.SumReducer(), reducers.ThresholdReducer(low=0.9), reducers.AvgNonZeroReducer()):
        assert HistogramLoss(30, reducer=reducer, **settings)(embeddings, labels) == expected
    regularized = HistogramLoss(
        30, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=2, **settings
    )
    penalty = 2 * embeddings.norm(dim=1).mean()
    torch.testing.assert_close(regularized(embeddings, labels), expected + penalty)


def test_a_memory_of_earlier_batches():
    with pytest.raises(Exception, match="CrossBatchMemory not supported for HistogramLoss"):
        losses.CrossBatchMemory(HistogramLoss(), 6)
    memory = CrossBatchMemory(HistogramLoss(30), embedding_size=6, memory_size=40)
    stored = []
    for seed in range(5):  # The memory of 40 overflows in the fourth batch.
        embeddings, labels = batch(n=12, seed=seed)
        stored = ([None] * 40 + [*stored, *zip(embeddings.detach(), labels.tolist(), strict=True)])[-40:]
        known = [x for x in stored if x is not None]
        references = torch.stack([x for x, _ in known])
        pairs = [(i, j) for i in range(12) for j in range(len(known))]
        itself = {(i, len(known) - 12 + i) for i in range(12)}
        positive = {(i, j) for i, j in pairs if labels[i] == known[j][1]} - itself
        expected = oracle(embeddings, references, positive, set(pairs) - positive - itself, 30)
        found = memory(embeddings, labels)
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(x, embeddings)[0] for x in (found, expected)))


@pytest.mark.parametrize("miner", [miners.TripletMarginMiner(), miners.PairMarginMiner(0.9, 0.1)], ids=repr)
def test_pairs_given_to_the_memory_are_pairs_of_the_batch(miner):
    memory = CrossBatchMemory(HistogramLoss(30), 6, memory_size=30, miner=lambda *_: [torch.tensor([], dtype=int)] * 4)
    for seed in range(4):
        embeddings, labels = batch(n=12, seed=seed)
        indices = miner(embeddings, labels)
        positive, negative = listed_pairs(indices, within=False)
        expected = oracle(embeddings, embeddings.detach(), positive, negative, 30)
        assert memory(embeddings, labels, indices).item() == pytest.approx(expected.item(), abs=1e-12)


def share_of_two(rank, folder):
    """One of two processes, each with half of a batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, labels = batch()
    own = slice(12 * rank, 12 * rank + 12)
    network = DistributedDataParallel(linear())
    found = {}
    for name, loss, efficient in (
        ("all", HistogramLoss(), False),
        ("own", HistogramLoss(), True),
        ("memory", CrossBatchMemory(HistogramLoss(), 3, 48), False),
    ):
        network.zero_grad()
        value = DistributedLossWrapper(loss, efficient=efficient)(network(images[own].detach()), labels[own])
        value.backward()
        found[name] = value.item() / 2, network.module.weight.grad.clone()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 3).double()


def test_the_distributed_wrapper_of_two_processes_is_the_loss_of_the_whole_batch(tmp_path):
    multiprocessing.start_processes(share_of_two, (tmp_path,), nprocs=2, start_method="forkserver")
    images, labels = batch()
    network = linear()
    whole = HistogramLoss()(network(images.detach()), labels)
    (gradient,) = torch.autograd.grad(whole, network.weight)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ("all", "memory"):
        values = [rank[name][0] for rank in found]
        assert values == pytest.approx([whole.item()] * 2, abs=1e-12), name
    torch.testing.assert_close(found[0]["all"][1], gradient)
    everything = network(images.detach())
    matrix = torch.where(labels[:, None] == labels, 1, -1).fill_diagonal_(0)
    for rank in (0, 1):  # "efficient": each process takes the pairs of its own embeddings with all
        own = slice(12 * rank, 12 * rank + 12)
        expected = HistogramLoss().loss(everything[own], matrix[own], everything)
        assert found[rank]["own"][0] == pytest.approx(expected.item(), abs=1e-12)
