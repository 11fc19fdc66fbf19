"""Each protocol against a brute force over all images, and over all drawings where it draws at random."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from hloss.numerics import NotFiniteError
from hloss.retrieval import protocols
from hloss.retrieval.protocols import PROTOCOLS, evaluate
from hloss.retrieval.ranks import first_match_ranks
from hloss.retrieval.similarity import METRICS
from tests.retrieval.oracles import gallery_with_ties, precision_oracle, ranks_of, scores, street, views


def assert_measures(result, all_ranks, k, prefix=""):
    """`all_ranks`: of each query the ranks of its matches, by brute force."""
    matched = [ranks for ranks in all_ranks if ranks]
    for at in k:
        expected = sum(ranks[0] <= at for ranks in matched) / len(matched)
        assert result.metrics[f"{prefix}recall@{at}"] == pytest.approx(expected)
    for name in ("map", "map_trapezoid", "r_precision", "map@r"):
        expected = sum(precision_oracle(ranks)[name] for ranks in matched) / len(matched)
        assert result.metrics[prefix + name] == pytest.approx(expected, rel=1e-12)
    if not prefix:
        assert result.ranks.tolist() == [ranks[0] if ranks else 0 for ranks in all_ranks]
        assert (result.n_queries, result.n_unmatched) == (len(all_ranks), len(all_ranks) - len(matched))


@pytest.mark.parametrize("metric", METRICS)
def test_all_vs_rest_measures_every_match(metric):
    embeddings, labels = gallery_with_ties(90, seed=1, classes=40)
    result = evaluate("all-vs-rest", embeddings, labels, k=(1, 4), metric=metric)
    all_ranks = []
    for i, query in enumerate(embeddings):
        itself = torch.arange(90) == i
        all_ranks.append(ranks_of(scores(query, embeddings, metric), (labels == labels[i]) & ~itself, itself))
    assert_measures(result, all_ranks, (1, 4))
    assert result.n_unmatched > 0
    assert result.query_index.tolist() == list(range(90))
    assert torch.equal(result.ranks, first_match_ranks(embeddings, labels, metric))


def test_average_precision_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(120, 6, generator=generator), torch.arange(120) % 17
    similarity = F.normalize(embeddings.double()) @ F.normalize(embeddings.double()).T
    expected = []
    for i in range(120):
        others = torch.arange(120) != i
        expected.append(metrics.average_precision_score(labels[others] == labels[i], similarity[i, others]))
    result = evaluate("all-vs-rest", embeddings, labels)
    assert result.metrics["map"] == pytest.approx(sum(expected) / 120, rel=1e-12)


def street_oracle(embeddings, labels, cameras, roles, metric, query_of=None):
    all_ranks = []
    for i, role in enumerate(roles):
        if role != "query":
            continue
        query = embeddings[i] if query_of is None else query_of(i)
        similarity, match, ignored = scores(query, embeddings, metric), [], []
        for j in range(len(roles)):
            same = labels[j] == labels[i] and roles[j] == "gallery"
            seen = same and cameras[j] == cameras[i]
            ignored.append(roles[j] not in ("gallery", "distractor") or bool(seen))
            match.append(bool(same) and not seen)
        all_ranks.append(ranks_of(similarity, match, ignored))
    return all_ranks


@pytest.mark.parametrize("protocol", ["market1501", "cuhk03-767-700"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_own_camera_and_junk_are_left_out_and_distractors_are_rivals(protocol, metric, ties):
    embeddings, labels, cameras, roles = street(0, identities=60, ties=ties)
    result = evaluate(protocol, embeddings, labels, (1, 5), metric, cameras, roles)
    assert_measures(result, street_oracle(embeddings, labels, cameras, roles, metric), (1, 5))
    assert result.n_unmatched > 0
    assert [roles[i] for i in result.query_index] == ["query"] * result.n_queries


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("both", [False, True])
def test_query_gallery_ignores_the_query_alone(metric, both):
    embeddings, labels, cameras, roles = street(2, identities=40)
    if both:
        roles = ["both" if role in ("query", "gallery") else role for role in roles]
    all_ranks = []
    for i, role in enumerate(roles):
        if role not in ("query", "both"):
            continue
        known = torch.tensor([other in ("gallery", "both") for other in roles])
        ranked = known | torch.tensor([other == "distractor" for other in roles])
        itself = torch.arange(len(roles)) == i
        match = (labels == labels[i]) & known & ~itself
        all_ranks.append(ranks_of(scores(embeddings[i], embeddings, metric), match, ~ranked | itself))
    result = evaluate("query-gallery", embeddings, labels, (1, 5), metric, roles=roles)
    assert_measures(result, all_ranks, (1, 5))
    with_cameras = evaluate("market1501", embeddings, labels, (1, 5), metric, cameras, roles)
    assert with_cameras.metrics != result.metrics


@pytest.mark.parametrize("metric", METRICS)
def test_multi_query_pools_the_images_of_identity_and_camera(metric):
    embeddings, labels, cameras, roles = street(1)
    result = evaluate("market1501-multi-query", embeddings, labels, (1, 5), metric, cameras, roles)
    unit = F.normalize(embeddings) if metric == "cosine" else embeddings
    is_pool = torch.tensor([role == "pool" for role in roles])

    def members(i):
        return unit[is_pool & (labels == labels[i]) & (cameras == cameras[i])]

    by_mean = street_oracle(embeddings, labels, cameras, roles, metric, lambda i: members(i).mean(0))
    by_maximum = street_oracle(embeddings, labels, cameras, roles, metric, lambda i: members(i).amax(0))
    assert by_mean != by_maximum
    assert_measures(result, by_mean, (1, 5))
    assert_measures(result, by_maximum, (1, 5), prefix="max_")


def test_a_query_without_a_pool_is_refused():
    embeddings, labels, cameras, roles = street(1)
    without = roles.index("pool")
    lonely = [r if r != "pool" or i == without else "junk" for i, r in enumerate(roles)]
    with pytest.raises(ValueError, match="queries have no pool image with the same identity and camera"):
        evaluate("market1501-multi-query", embeddings, labels, cameras=cameras, roles=lonely)


def expected_cmc_by_enumeration(embeddings, labels, cameras, k, a=0, b=1):
    """The mean over every choice of a query and of a gallery of one image per identity."""
    unit = F.normalize(embeddings)
    places = list(zip(labels.tolist(), cameras.tolist(), strict=True))
    images = {v: {i: [j for j, place in enumerate(places) if place == (i, v)] for i, _ in places} for v in (a, b)}
    gallery = [js for js in images[b].values() if js]
    cmc = []
    for identity, own in images[a].items():
        if own and images[b][identity]:
            hits = total = 0
            for query, shots in itertools.product(own, itertools.product(*gallery)):
                match = next(j for j in shots if labels[j] == identity)
                rank = sum(float(unit[query] @ unit[j]) >= float(unit[query] @ unit[match]) for j in shots)
                hits, total = hits + (rank <= k), total + 1
            cmc.append(hits / total)
    return cmc


@pytest.mark.parametrize("seed", [0, 1])
def test_the_single_shot_expectation_is_the_mean_over_all_drawings(seed):
    embeddings, labels, cameras = views(seed, identities=8, most=2)
    one = evaluate("cuhk03-single-shot", embeddings, labels, (1, 3, 20), cameras=cameras)
    two = evaluate("cuhk03-single-shot-two-way", embeddings, labels, (1, 3, 20), cameras=cameras)
    for at in (1, 3, 20):
        there = expected_cmc_by_enumeration(embeddings, labels, cameras, at)
        back = expected_cmc_by_enumeration(embeddings, labels, cameras, at, 1, 0)
        assert one.metrics[f"expected_recall@{at}"] == pytest.approx(sum(there) / len(there), rel=1e-12)
        both = there + back
        assert two.metrics[f"expected_recall@{at}"] == pytest.approx(sum(both) / len(both), rel=1e-12)
    assert 0 < one.metrics["expected_recall@1"] < one.metrics["expected_recall@3"] <= 1
    assert one.metrics["expected_recall@20"] == 1


def test_the_single_shot_expectation_has_its_closed_form():
    """Five identities stand before the match with probability 1/2 each: the CMC is that of Binomial(5, 1/2)."""
    query = torch.tensor([[1.0, 0.0, 0.0]])
    match, nearer, farther = torch.tensor([[0.8, 0.6, 0.0], [0.9, 0.19**0.5, 0.0], [0.0, 0.0, 1.0]]).split(1)
    embeddings = torch.cat([query, match, *[nearer, farther] * 5])
    labels = torch.tensor([0, 0, *torch.arange(1, 6).repeat_interleave(2)])
    cameras = torch.tensor([0] + [1] * 11)
    result = evaluate("cuhk03-single-shot", embeddings, labels, (1, 2, 3, 4, 5, 6), cameras=cameras)
    cumulative = 0.0
    for at in range(1, 7):
        cumulative += math.comb(5, at - 1) / 2**5
        assert result.metrics[f"expected_recall@{at}"] == pytest.approx(cumulative)
        assert (
            abs(result.metrics[f"recall@{at}"] - cumulative) < 4 * (cumulative * (1 - cumulative) / 100) ** 0.5 + 1e-9
        )


@pytest.mark.parametrize("protocol", ["cuhk03-single-shot", "cuhk03-single-shot-two-way"])
def test_single_shot_drawings_are_seeded_ranked_and_near_their_expectation(protocol):
    embeddings, labels, cameras = views(0, identities=60, most=5)
    cameras = 4 + 3 * cameras
    result = evaluate(protocol, embeddings, labels, (1, 5), cameras=cameras)
    again = evaluate(protocol, embeddings, labels, (1, 5), cameras=cameras)
    other = evaluate(protocol, embeddings, labels, (1, 5), cameras=cameras, seed=1)
    assert torch.equal(result.ranks, again.ranks)
    assert torch.equal(result.query_index, again.query_index)
    assert not torch.equal(result.ranks, other.ranks)
    assert other.metrics["expected_recall@1"] == result.metrics["expected_recall@1"]
    directions = 2 if "two-way" in protocol else 1
    assert result.n_queries == directions * 100 * 59
    assert result.n_unmatched == directions * 100
    assert set(cameras[result.query_index].tolist()) == ({4, 7} if directions == 2 else {4})
    for at in (1, 5):
        assert result.metrics[f"recall@{at}"] == pytest.approx(result.metrics[f"expected_recall@{at}"], abs=0.02)
    matched = result.ranks[result.ranks > 0]
    assert result.metrics["recall@5"] == pytest.approx((matched <= 5).double().mean().item())


def test_a_drawing_ranks_as_brute_force_does(monkeypatch):
    monkeypatch.setattr(protocols, "DRAWS", 1)
    embeddings, labels, cameras = views(3, most=1)  # one image each: nothing is left to draw
    result = evaluate("cuhk03-single-shot", embeddings, labels, (1,), cameras=cameras)
    expected = []
    for i in result.query_index:
        ranks = ranks_of(scores(embeddings[i], embeddings, "cosine"), labels == labels[i], cameras == 0)
        expected.append(ranks[0] if ranks else 0)
    assert result.ranks.tolist() == expected


def test_unusable_input_is_refused_by_name():
    embeddings, labels = gallery_with_ties(10, seed=0)
    with pytest.raises(ValueError, match=r"protocol must be one of all-vs-rest, cuhk03-single-shot, .*: got 'cub'"):
        evaluate("cub", embeddings, labels)
    with pytest.raises(ValueError, match="metric must be one of cosine, euclidean: got 'cosin'"):
        evaluate("all-vs-rest", embeddings, labels, metric="cosin")
    with pytest.raises(ValueError, match="labels must be integers"):
        first_match_ranks(embeddings, labels[1:])
    with pytest.raises(NotFiniteError, match=r"rows \[0\]"):
        first_match_ranks(embeddings * torch.tensor([[float("nan")], *[[1.0]] * 9]), labels)
    with pytest.raises(ValueError, match="cameras must be given for protocol 'cuhk03-single-shot'"):
        evaluate("cuhk03-single-shot", embeddings, labels)
    with pytest.raises(ValueError, match=r"exactly two different values for protocol .*: got \[0, 1, 2\]"):
        evaluate("cuhk03-single-shot", embeddings, labels, cameras=torch.arange(10) % 3)
    with pytest.raises(ValueError, match=r"cameras must be integers of shape \(10,\)"):
        evaluate("cuhk03-single-shot", embeddings, labels, cameras=torch.ones(9).long())
    with pytest.raises(ValueError, match="roles must be given for protocol 'market1501'"):
        evaluate("market1501", embeddings, labels, cameras=torch.arange(10))
    with pytest.raises(ValueError, match=r"one of both, query, .* for each of 10 rows: got 10 roles, probe"):
        evaluate("market1501", embeddings, labels, cameras=torch.arange(10), roles=["probe"] * 10)
    with pytest.raises(ValueError, match="needs rows of role query or both: got none"):
        evaluate("market1501", embeddings, labels, cameras=torch.arange(10), roles=["junk"] * 10)


def test_every_protocol_is_documented_by_name():
    assert all(f'"{name}":' in evaluate.__doc__ for name in PROTOCOLS)
