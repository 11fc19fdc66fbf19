"""Networks: parameters, shared weights, initialisation, input scaling and pretrained weights."""

from urllib.error import URLError

import pytest
import torch
from torch.nn import functional as F
from torchvision import models

from hloss.runs.config import parse_config
from hloss.runs.errors import ConfigError
from hloss.runs.models import build_network, embed, training_mode


def images(n, height, width, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, height, width), generator=generator, dtype=torch.uint8)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return build_network("parts", (160, 60, 3), 500, dropout=0.5)


@pytest.fixture(scope="module")
def googlenet_file(tmp_path_factory):
    """A state dict of torchvision's GoogLeNet with its main and auxiliary classifiers, as torchvision publishes it."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("weights") / "googlenet.pth"
    torch.save(models.googlenet(weights=None, aux_logits=True, init_weights=True).state_dict(), file)
    return file


@pytest.mark.parametrize(
    ("name", "shape", "embedding_dim", "parameters"),
    [
        ("glyphnet", (32, 32, 1), 128, 93_296),
        ("parts", (160, 60, 3), 500, 21_917_364),
        ("googlenet", (227, 227, 3), 512, 6_624_904 - 1_025_000 + 1024 * 512 + 512),
        ("torchvision:resnet18", (64, 64, 3), 512, 11_689_512 - 513_000 + 512 * 512 + 512),
        ("torchvision:mobilenet_v3_small", (64, 64, 1), 64, 2_542_856 - 1_025_000 + 1024 * 64 + 64),
    ],
)
def test_network_returns_unit_embeddings_and_has_the_published_number_of_parameters(
    name, shape, embedding_dim, parameters
):
    network = build_network(name, shape, embedding_dim)
    assert n_parameters(network) == parameters
    embeddings = network(images(3, *shape))
    assert embeddings.shape == (3, embedding_dim)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_normalize_false_returns_raw_embeddings():
    torch.manual_seed(0)
    raw = build_network("glyphnet", (32, 32, 1), 16, normalize=False).eval()
    torch.manual_seed(0)
    unit = build_network("glyphnet", (32, 32, 1), 16).eval()
    some = images(5, 32, 32, 1)
    assert not torch.allclose(raw(some).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(F.normalize(raw(some)), unit(some))


def test_parts_network_equals_the_released_definition(parts):
    """Compare with an independent computation after the released definition, in float64."""
    network = parts.double().eval()
    rgb = images(2, 160, 60, 3)
    weights = network.state_dict()
    bgr = rgb.flip(1).double() / 256
    pooled = []
    for part, top in enumerate((0, 50, 100)):
        stripe = bgr[:, :, top : top + 60]
        assert stripe.shape == (2, 3, 60, 60)
        x = F.conv2d(stripe, weights["backbone.conv1.weight"], weights["backbone.conv1.bias"], padding=3)
        x = F.max_pool2d(x.clamp(min=0), 2, 2)
        x = F.conv2d(x, weights[f"backbone.conv2.{part}.weight"], weights[f"backbone.conv2.{part}.bias"], padding=2)
        pooled.append(F.max_pool2d(x.clamp(min=0), 2, 2))
    features = torch.cat(pooled, dim=1)
    assert features.shape == (2, 192, 15, 15)
    embedding = features.reshape(2, 43_200) @ weights["embedding.weight"].T + weights["embedding.bias"]
    torch.testing.assert_close(network(rgb), F.normalize(embedding), rtol=1e-10, atol=1e-12)


def test_stripes_share_conv1_only(parts):
    shapes = {name: tuple(p.shape) for name, p in parts.backbone.named_parameters() if name.endswith("weight")}
    assert shapes == {"conv1.weight": (64, 3, 7, 7)} | {f"conv2.{i}.weight": (64, 64, 5, 5) for i in range(3)}
    stripes = torch.rand(1, 9, 60, 60, dtype=parts.backbone.conv1.weight.dtype)
    with torch.no_grad():
        before = parts.backbone(stripes)
        kept = parts.backbone.conv2[1].weight.clone()
        parts.backbone.conv2[1].weight.zero_()
        changed = (parts.backbone(stripes) != before).flatten(2).any(2)[0]
        parts.backbone.conv2[1].weight.copy_(kept)
        kept = parts.backbone.conv1.weight.clone()
        parts.backbone.conv1.weight.zero_()
        all_changed = (parts.backbone(stripes) != before).flatten(2).any(2)[0]
        parts.backbone.conv1.weight.copy_(kept)
    assert not changed[:64].any()
    assert changed[64:128].any()
    assert not changed[128:].any()
    assert all(all_changed[part * 64 : part * 64 + 64].any() for part in range(3))


def test_parts_network_is_initialised_as_released():
    torch.manual_seed(0)
    network = build_network("parts", (160, 60, 3), 500)
    for layer, std in [
        (network.backbone.conv1, 0.01),
        *((c, 0.01) for c in network.backbone.conv2),
        (network.embedding, 0.001),
    ]:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert layer.bias.std().item() == pytest.approx(std, rel=0.3)
        assert abs(layer.bias.mean().item()) < std


def test_googlenet_features_equal_those_of_torchvision(googlenet_file):
    """torchvision's model takes ImageNet-normalised images and reverts the normalisation; ours takes uint8 images."""
    ours = build_network("googlenet", (96, 96, 3), 512, weights=str(googlenet_file)).eval()
    theirs = models.googlenet(weights=None, aux_logits=True, transform_input=True, init_weights=False)
    theirs.load_state_dict(torch.load(googlenet_file, weights_only=True))
    theirs.fc = torch.nn.Identity()
    some = images(2, 96, 96, 3)
    imagenet = models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (imagenet.mean, imagenet.std))
    pool5 = ours.backbone(ours.scale(some))
    assert pool5.shape == (2, 1024)
    torch.testing.assert_close(pool5, theirs.eval()((some / 255 - mean) / std), rtol=1e-4, atol=1e-4)


def test_torchvision_backbones_are_scaled_as_their_weights_require():
    weights = models.get_model_weights("resnet18").DEFAULT
    network = build_network("torchvision:resnet18", (64, 64, 3), 8)
    grey = torch.full((1, 1, 64, 64), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(weights.transforms().mean)) / torch.tensor(weights.transforms().std)
    torch.testing.assert_close(network.scale(grey)[0, :, 0, 0], expected)


@pytest.mark.parametrize(
    ("name", "side"), [("efficientnet_b0", 32), ("mobilenet_v3_small", 32), ("vgg11", 32), ("inception_v3", 96)]
)
def test_torchvision_dropout_before_the_embedding_is_removed(name, side):
    network = build_network(f"torchvision:{name}", (side, side, 3), 8)
    leaves = [module for module in network.backbone.modules() if not any(module.children())]
    assert isinstance(leaves[-1], torch.nn.Identity)
    body = [leaf for leaf in leaves if not isinstance(leaf, torch.nn.Identity)]
    assert not isinstance(body[-1], torch.nn.Dropout)
    inner = sum(isinstance(leaf, torch.nn.Dropout) for leaf in body)
    assert inner == (1 if name == "vgg11" else 0), "dropout between two remaining layers remains"


def test_weights_of_a_file_are_loaded_completely_or_refused(googlenet_file, tmp_path):
    state = torch.load(googlenet_file, weights_only=True)
    network = build_network("googlenet", (64, 64, 3), 8, weights=str(googlenet_file))
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, state[name])
    other = tmp_path / "other.pth"
    state.pop("conv1.conv.weight")
    torch.save(state, other)
    with pytest.raises(ValueError, match=r"1 tensors are missing \['conv1.conv.weight'\]"):
        build_network("googlenet", (64, 64, 3), 8, weights=str(other))
    with pytest.raises(ValueError, match=r"do not fit: .*; use the state dict of the same torchvision model"):
        build_network("torchvision:resnet18", (64, 64, 3), 8, weights=str(googlenet_file))
    other.write_bytes(b"no state dict")
    with pytest.raises(ValueError, match="is not a readable state dict"):
        build_network("googlenet", (64, 64, 3), 8, weights=str(other))
    with pytest.raises(ValueError, match=r"nowhere\.pth' does not exist; allowed are"):
        build_network("googlenet", (64, 64, 3), 8, weights=str(tmp_path / "nowhere.pth"))


def test_imagenet_weights_are_downloaded_or_the_remedy_is_given(googlenet_file, monkeypatch):
    enum = models.GoogLeNet_Weights
    state = torch.load(googlenet_file, weights_only=True)
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **settings: state)
    network = build_network("googlenet", (64, 64, 3), 8, weights="imagenet")
    assert torch.equal(network.backbone.conv1.conv.weight, state["conv1.conv.weight"])

    def offline(self, **settings):
        raise URLError("no network")

    monkeypatch.setattr(enum, "get_state_dict", offline)
    with pytest.raises(ValueError, match=r"cannot be downloaded .*no network.*set weights to its path"):
        build_network("googlenet", (64, 64, 3), 8, weights="imagenet")


def test_frozen_batchnorm_keeps_statistics_and_trains_scale_and_shift():
    network = build_network("glyphnet", (32, 32, 1), 8)
    before = {k: v.clone() for k, v in network.state_dict().items()}

    def moved(batchnorm):
        training_mode(network, batchnorm)
        network(images(8, 32, 32, 1)).sum().backward()
        return {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}

    assert moved("frozen") == set()
    assert network.backbone[0][1].weight.grad is not None
    assert {name.rsplit(".", 1)[1] for name in moved("live")} == {"running_mean", "running_var", "num_batches_tracked"}


def test_embed_restores_the_modes_of_the_network():
    network = build_network("glyphnet", (32, 32, 1), 8)
    training_mode(network, "frozen")
    modes = [m.training for m in network.modules()]
    found = embed(network, lambda part: images(7, 32, 32, 1)[part], 7, batch=3)
    assert found.shape == (7, 8)
    assert [m.training for m in network.modules()] == modes
    assert not network.backbone[0][1].training


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("parts", (64, 64, 3), r"requires images of shape \(160, 60, 3\): got \(64, 64, 3\)"),
        ("googlenet", (64, 64, 4), "requires images with 1 or 3 channels: got 4"),
        ("torchvision:squeezenet1_0", (64, 64, 3), "no linear layer that the embedding can replace"),
        ("torchvision:vit_b_16", (64, 64, 3), "does not accept images of 64 x 64 pixels"),
    ],
)
def test_refuses_images_and_models_that_do_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_network(name, shape, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"network": "googlenett"}, r"network='googlenett' is unknown.*\(did you mean googlenet\?\)"),
        ({"network": "torchvision:resnet19"}, "network='torchvision:resnet19' is unknown"),
        (
            {"weights": "imagenet"},
            "weights='imagenet': network 'glyphnet' has no pretrained weights; .* leave weights at 'none'",
        ),
        (
            {"network": "parts", "pretrained_lr_factor": 0.1},
            "pretrained_lr_factor=0.1: network 'parts' has no pretr.* leave pretrained_lr_factor at None",
        ),
        ({"batchnorm": "warm"}, "batchnorm='warm' is unknown; allowed are live, frozen, slices"),
    ],
    ids=str,
)
def test_refuses_wrong_settings_of_networks(wrong, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(wrong)


def test_network_settings_default_to_those_of_the_paper():
    def settings(**given):
        return parse_config(given).network_settings()

    assert settings(network="parts")["embedding_dim"] == 500
    assert settings(network="parts")["dropout"] == 0.5
    plain = settings(network="googlenet")
    assert (plain["embedding_dim"], plain["batchnorm"], plain["pretrained_lr_factor"]) == (512, "live", 1.0)
    pretrained = settings(network="googlenet", weights="imagenet")
    assert (pretrained["batchnorm"], pretrained["pretrained_lr_factor"]) == ("frozen", 0.1)
    assert settings(network="googlenet", embedding_dim=64)["embedding_dim"] == 64
