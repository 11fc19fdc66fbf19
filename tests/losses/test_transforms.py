"""The histogram loss within torch's compilers, exporters, wrappers and global switches: it works, or says why not."""

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hloss import HistogramLoss, pair_histograms, pair_slopes, reverse_probability
from hloss.losses.baselines import BASELINES
from tests.losses.cases import VARIANTS, batch, signs

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_GPU])]


@pytest.fixture
def compiler():
    """torch.compile without the graph breaks that it would pass over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler imports what some versions deprecate
        torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


class Criterion(nn.Module):
    """A layer and the loss of its output."""

    def __init__(self, loss=None, device="cpu", dtype=torch.float64):
        super().__init__()
        self.layer = nn.Linear(6, 5, device=device, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(batch(n=5)[0])
        self.loss = loss or HistogramLoss(50)

    def forward(self, images, labels, *references):
        return self.loss(self.layer(images), labels, *references)


def value_and_gradient(model, *arguments):
    parameters = list(model.parameters())
    value = model(*arguments)
    return value.detach(), *torch.autograd.grad(value, parameters)


def close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", VARIANTS[:-1], ids=str)
def test_a_compiled_loss_is_the_loss(compiler, options, device):
    images, labels = (x.to(device) for x in batch())
    model = Criterion(HistogramLoss(**options), device)
    found = value_and_gradient(compiler(model), images, labels)
    close(found, value_and_gradient(model, images, labels), atol=1e-12, rtol=1e-9)


def test_a_compiled_loss_takes_references_a_matrix_and_other_shapes(compiler):
    loss = HistogramLoss(50)
    model = compiler(lambda *arguments: loss(*arguments))
    for n in (24, 30):  # The second has a shape of its own: it is compiled for all.
        embeddings, labels = batch(n=n)
        references, reference_labels = batch(n=n + 9, seed=5)
        for arguments in ((references, reference_labels), ()):
            sides = [x.requires_grad_() for x in (embeddings, *arguments[:1])]
            found, expected = (torch.autograd.grad(f(embeddings, labels, *arguments), sides) for f in (model, loss))
            close(found, expected, atol=1e-12, rtol=1e-9)
        assert model(embeddings, signs(labels)).item() == pytest.approx(loss(embeddings, labels).item(), abs=1e-14)


def test_a_compiled_loss_keeps_small_gradients_of_half_precision(compiler):
    embeddings, labels = batch(dtype=torch.float16)
    embeddings.requires_grad_()
    loss = HistogramLoss(50)

    def scaled(e):  # as by a GradScaler: the gradient of the loss itself is below the least number of float16
        return loss(1e3 * e, labels) * 2.0**20

    found, expected = (torch.autograd.grad(f(embeddings), embeddings)[0] for f in (compiler(scaled), scaled))
    assert expected.any()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=2e-3)


def test_a_compiled_loss_raises_the_same_errors(compiler):
    embeddings, labels = batch()
    model = compiler(HistogramLoss(50))
    with pytest.raises(ValueError, match="0 positive and 276 negative pairs is undefined"):
        model(embeddings, torch.arange(24))
    with pytest.raises(ValueError, match=r"rows \[3\] are zero"):
        model(embeddings.index_fill(0, torch.tensor([3]), 0), labels)
    zero = compiler(HistogramLoss(50, on_degenerate="zero"))(embeddings.requires_grad_(), torch.arange(24))
    assert zero == 0
    assert not torch.autograd.grad(zero, embeddings)[0].any()


@pytest.mark.filterwarnings("ignore")  # torch warns of what it cannot trace
def test_the_beta_density_is_refused_or_called_uncompiled():
    embeddings, labels = batch()
    loss = HistogramLoss(density="beta")
    told = 'density="beta" cannot be compiled or exported: call the loss outside'
    if torch.__version__ < "2.7":  # its compiler says only that there was an error
        told = "Observed exception"
    with pytest.raises(RuntimeError, match=told):
        torch.export.export(loss, (embeddings, labels))
    assert torch.compile(loss, backend="aot_eager")(embeddings, labels) == loss(embeddings, labels)


@pytest.mark.slow
def test_inductor_compiles_the_network_and_the_loss():
    torch._dynamo.reset()
    images, labels = batch(dtype=torch.float32)
    model = Criterion(dtype=torch.float32)
    close(value_and_gradient(torch.compile(model), images, labels), value_and_gradient(model, images, labels))


def test_an_exported_loss_is_the_loss(tmp_path):
    images, labels = batch()
    model, n = Criterion(), torch.export.Dim("n", min=2)
    program = torch.export.export(model, (images, labels), dynamic_shapes=({0: n}, {0: n}))
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    for size in (24, 17):
        images, labels = batch(n=size)
        assert loaded(images, labels).item() == pytest.approx(model(images, labels).item(), abs=1e-12)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.vmap])
def test_transforms_of_torch_func_are_refused_in_one_line(transform):
    embeddings, labels = batch()
    with pytest.raises(RuntimeError, match=r"^the histogram loss does not support torch.func .*autograd.grad$"):
        transform(lambda e: HistogramLoss()(e, labels))(embeddings[None].expand(2, -1, -1))


@pytest.mark.parametrize("device", DEVICES)
def test_data_parallel(device):
    images, labels = (x.to(device) for x in batch())
    model = Criterion(device=device)
    expected = value_and_gradient(model, images, labels)
    model.layer = nn.DataParallel(model.layer)  # with several devices, the loss is that of their common batch
    close(value_and_gradient(model, images, labels), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, device):
    images, labels = (x.to(device) for x in batch())
    images.requires_grad_()  # Reentrant checkpoints need it.
    model = Criterion(device=device)

    def recomputed(*arguments):
        return checkpoint(model, *arguments, use_reentrant=use_reentrant)

    expected = value_and_gradient(model, images, labels)
    model.zero_grad()
    value = recomputed(images, labels)
    value.backward()
    close((value, *(p.grad for p in model.parameters())), expected)


@pytest.mark.parametrize("default", ["meta", *DEVICES])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_default_device_does_not_matter(default, options):
    embeddings, labels = batch()
    references, reference_labels = batch(n=31, seed=5)
    loss = HistogramLoss(**options)
    cases = [(embeddings, labels), (embeddings, labels, references, reference_labels), (embeddings, signs(labels))]
    expected = [loss(*case) for case in cases]
    model = Criterion(loss)
    with torch.device(default):
        assert [HistogramLoss(**options)(*case) for case in cases] == expected
        assert value_and_gradient(model, embeddings, labels)[1].device.type == "cpu"
        pair_histograms(embeddings, labels, **options)
        pair_slopes(embeddings, labels, **options)
        reverse_probability(embeddings, labels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deterministic_algorithms_give_the_same_bits_again(device, dtype, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it on CUDA
    embeddings, labels = (x.to(device) for x in batch(n=300, d=16, classes=40, dtype=dtype))
    references, reference_labels = (x.to(device) for x in batch(n=500, d=16, classes=40, seed=5, dtype=dtype))
    sides = [embeddings.requires_grad_(), references.requires_grad_()]
    losses = [HistogramLoss(**options) for options in VARIANTS]
    torch.use_deterministic_algorithms(True)
    try:
        for loss in losses:
            first, again = (
                torch.autograd.grad(loss(embeddings, labels, references, reference_labels), sides) for _ in range(2)
            )
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
            loss(embeddings, signs(labels)).backward()
        for baseline in BASELINES.values():
            baseline()(embeddings, labels).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_loss_can_be_pickled():
    embeddings, labels = batch()
    loss = HistogramLoss(50, kernel="gaussian", bandwidth=2.0)
    assert pickle.loads(pickle.dumps(loss))(embeddings, labels) == loss(embeddings, labels)
