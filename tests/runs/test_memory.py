"""Memory of earlier batches: its pairs, its start, and the same result after a kill."""

import json

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.nn import functional as F

from hloss import HistogramLoss, SemiHardTriplet, Triplet, global_batch
from hloss.losses.baselines import BASELINES
from hloss.runs.config import parse_config
from hloss.runs.errors import ConfigError
from hloss.runs.memory import MemoryLoss, takes_references
from hloss.runs.run import run


def batches(n, size=12):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        embeddings = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        yield embeddings.requires_grad_(), torch.randint(4, (size,), generator=generator)


@pytest.mark.parametrize("options", [{}, {"density": "beta"}], ids=str)
def test_the_loss_is_that_of_a_large_batch_without_the_pairs_of_earlier_embeddings(options):
    loss, earlier = HistogramLoss(**options), []
    memory = MemoryLoss(loss, batches=2, start=0)
    for embeddings, labels in batches(5):
        known = [(embeddings, labels), *earlier[-2:]]
        everything, everyone = torch.cat([e for e, _ in known]), torch.cat([y for _, y in known])
        matrix = torch.where(everyone[:, None] == everyone, 1, -1)
        matrix[12:, 12:] = 0
        found, expected = memory(embeddings, labels), loss(everything, matrix)
        assert found.item() == pytest.approx(expected.item(), abs=1e-13)
        gradients = [torch.autograd.grad(x, embeddings)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients, atol=1e-13, rtol=1e-9)
        earlier.append((embeddings.detach(), labels))


@pytest.mark.parametrize("semi_hard", [False, True])
def test_anchors_of_triplets_are_the_whole_batch(semi_hard):
    loss = (SemiHardTriplet if semi_hard else Triplet)(margin=0.3)
    memory = MemoryLoss(loss, batches=1, start=0)
    (earlier, earlier_labels), (embeddings, labels) = batches(2)
    memory(earlier, earlier_labels)
    found = memory(embeddings, labels)
    columns = F.normalize(torch.cat([embeddings, earlier.detach()]))
    column_labels = torch.cat([labels, earlier_labels])
    distance = (columns[:12, None] - columns).square().sum(2)
    hinges = []
    for a in range(12):
        same = [j for j in range(24) if j != a and column_labels[j] == labels[a]]
        other = [j for j in range(24) if column_labels[j] != labels[a]]
        gaps = [distance[a, p] - distance[a, n] for p in same for n in other]
        hinges += [gap + 0.3 for gap in gaps if gap + 0.3 > 0 and (not semi_hard or gap < 0)]
    expected = torch.stack(hinges).mean()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    gradients = [torch.autograd.grad(x, embeddings)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)


def test_the_memory_starts_after_so_many_batches_and_holds_those_before():
    loss = HistogramLoss()
    memory, at_once = MemoryLoss(loss, batches=3, start=2), MemoryLoss(loss, batches=3, start=0)
    for i, (embeddings, labels) in enumerate(batches(5)):
        found, immediate = memory(embeddings, labels), at_once(embeddings, labels)
        assert found == (loss(embeddings, labels) if i < 2 else immediate)
    assert [len(x) for x in memory.embeddings] == [12, 12, 12]
    assert not any(x.requires_grad for x in memory.embeddings)


def test_a_saved_memory_continues(tmp_path):
    memory, other = (MemoryLoss(HistogramLoss(), batches=2, start=1) for _ in range(2))
    *before, last = batches(4)
    for batch in before:
        memory(*batch)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert memory(*last) == other(*last) != HistogramLoss()(*last)


@pytest.fixture
def settings(settings):
    return settings | {"batch_size": 16, "dropout": 0.3, "validate_every": 6, "refit": True}


def losses_of(settings, **more):
    result = run(parse_config({**settings, **more}), lambda line: None)
    return result["network_sha256"]


def test_runs_with_and_without_a_memory(settings):
    plain = losses_of(settings)
    assert losses_of(settings, memory_batches=2, memory_start=12) == plain
    memories = {losses_of(settings, memory_batches=n, memory_start=m) for n, m in ((2, 0), (1, 0), (2, 5))}
    assert len(memories | {plain}) == 4


@pytest.mark.parametrize("more", [{}, {"micro_batch": 5, "batchnorm": "slices", "memory_start": 4}], ids=str)
@pytest.mark.parametrize("at", ["iteration 6/", "refit iteration 6/"])
def test_a_killed_run_continues_with_its_memory(settings, tmp_path, more, at):
    settings |= {"memory_batches": 3, "checkpoint_seconds": 0.0, **more}
    whole = losses_of(settings, runs_dir=str(tmp_path / "whole"))
    config = parse_config(settings)

    def killed(line):
        if line.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, killed)
    checkpoint = torch.load(config.folder / "checkpoint.pt", weights_only=True)
    (state,) = checkpoint["loss"].values()
    assert len(state["embeddings"]) == 3
    lines = []
    assert run(config, lines.append)["network_sha256"] == whole
    assert lines[0].startswith("continued from iteration 5")
    assert json.loads((config.folder / "result.json").read_text())["config"]["memory_batches"] == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_start": 3}, "memory_start=3: there is no memory; set memory_batches to 1 or more"),
        ({"memory_batches": -1}, "memory_batches=-1: .*greater than or equal to 0"),
        ({"memory_batches": 2, "loss": "pml:TripletMarginLoss"}, "loss 'pml:TripletMarginLoss' takes no reference"),
        ({"memory_batches": 2, "loss": "none", "iterations": 0}, "memory_batches=2: loss 'none' takes no reference"),
    ],
    ids=str,
)
def test_a_memory_that_cannot_be_used_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(given)


@pytest.mark.parametrize("loss", BASELINES)
def test_a_baseline_trains_with_a_memory_or_is_refused_by_name(loss):
    config = {"loss": loss, "memory_batches": 1}
    if not takes_references(BASELINES[loss]()):
        with pytest.raises(ConfigError, match=f"loss '{loss}' takes no reference embeddings"):
            parse_config(config)
        return
    memory = parse_config(config).build_loss()
    for embeddings, labels in batches(2):
        memory(embeddings, labels).backward()
        assert embeddings.grad.isfinite().all()


def test_settings_without_a_memory_keep_their_run_id():
    assert parse_config({}).run_id == "96c7caab16b4"  # of the smoke run before there was a memory
    assert "memory_batches" not in parse_config({}).resolved()
    ids = {parse_config({"memory_batches": n, "memory_start": m}).run_id for n, m in ((1, 0), (2, 0), (2, 1))}
    assert len(ids | {parse_config({}).run_id}) == 4


def share_of_two(rank, folder):
    """One of two processes, each with an unequal share of every batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    memory = MemoryLoss(HistogramLoss(), batches=2, start=1)
    criterion, found = global_batch(memory), []
    for embeddings, labels in batches(4):
        own = slice(5) if rank == 0 else slice(5, None)
        share = embeddings[own].detach().requires_grad_()
        value = criterion(share, labels[own])
        found.append((value.item(), torch.autograd.grad(value, share)[0] / 2))  # DistributedDataParallel divides
    torch.save({"found": found, "memory": memory.state_dict()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_one_memory(tmp_path):
    multiprocessing.start_processes(share_of_two, (tmp_path,), nprocs=2, start_method="forkserver")
    answers = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    memory = MemoryLoss(HistogramLoss(), batches=2, start=1)
    for (embeddings, labels), *found in zip(batches(4), *(a["found"] for a in answers), strict=True):
        value = memory(embeddings, labels)
        assert [x for x, _ in found] == pytest.approx([value.item()] * 2, abs=1e-13)
        gradient = torch.cat([g for _, g in found])
        torch.testing.assert_close(gradient, torch.autograd.grad(value, embeddings)[0], atol=1e-13, rtol=1e-9)
    for answer in answers:
        (state,) = answer["memory"].values()
        assert all(torch.equal(one, other) for one, other in zip(state["embeddings"], memory.embeddings, strict=True))
