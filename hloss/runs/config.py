"""What a run is: its configuration, its folder, its result, and where the result came from."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from hloss.losses.baselines import BASELINES
from hloss.losses.histogram import HistogramLoss
from hloss.losses.pml import PREFIX, PMLLoss, pml_metric
from hloss.losses.settings import did_you_mean
from hloss.retrieval.ranks import METRICS
from hloss.runs.errors import ConfigError
from hloss.runs.files import project_path
from hloss.runs.models import (
    BATCHNORMS,
    IMAGENET,
    NETWORKS,
    NO_WEIGHTS,
    TORCHVISION,
    has_pretrained_part,
    is_known_network,
    network_defaults,
)
from hloss.samplers import SAMPLERS, ClassSampler

LOSSES: dict[str, Callable[..., nn.Module]] = {"histogram": HistogramLoss, **BASELINES}
NO_LOSS = "none"  # a network as it is: the untrained and the raw-pixels baselines
PRECISIONS = ("32-true", "bf16-mixed", "64-true")
OLD_NAMES = {"fewest_images": "min_images_per_class", "mirror": "horizontal_flip"}  # refused with the new name


def _in_group(group: str) -> Callable[..., Any]:
    """`pydantic.Field` for the settings of one group, as `setting_names` lists them."""
    return functools.partial(Field, json_schema_extra={"group": group})


LossField = _in_group("loss")  # None: the default of the loss, by the signature of its class
PMLField = _in_group("pml")
SamplerField = _in_group("sampler")  # None: the default of the sampler, by the signature of its class
ExecutionField = _in_group("execution")  # where and how a run is executed; does not affect its result


class RunConfig(BaseModel):
    """One run. The defaults are the smoke run: seconds on a CPU. `None` is the loss's or the network's own default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: str = Field("glyphs", description="name of a prepared dataset in data_dir")
    crop: int | None = Field(
        None, ge=1, description="side in pixels of the crop: random in training, central in testing"
    )
    horizontal_flip: bool = Field(False, description="flip half of the training images left to right")
    network: str = Field(
        "glyphnet", description="glyphnet, parts, googlenet, torchvision:NAME, or pixels for the raw-pixels baseline"
    )
    embedding_dim: int | None = Field(None, ge=1, description="dimensions of the embedding")
    weights: str = Field("none", description="of the backbone: none, imagenet, or a file with torchvision's state dict")
    dropout: float | None = Field(None, ge=0, lt=1, description="share of the features dropped before the embedding")
    batchnorm: str | None = Field(None, description="statistics of BatchNorm: live, frozen or slices")
    normalize_embeddings: bool | None = Field(None, description="to L2 norm 1; None: unless the loss takes them raw")
    loss: str = Field(
        "histogram",
        description="histogram, a baseline (binomial, lifted, triplet, ...), pml:NAME, or none (with 0 iterations)",
    )
    n_bins: int | None = LossField(None, description="intervals of [-1, 1] (histogram)")
    margin: float | None = LossField(None, description="in units of similarity or distance (all but binomial and pml)")
    alpha: float | None = LossField(None, description="steepness (binomial; histogram with order_cost softplus)")
    beta: float | None = LossField(None, description="similarity between positives and negatives (binomial)")
    C: float | None = LossField(None, description="slope for negatives (binomial)")
    kernel: str | None = LossField(None, description="triangular, gaussian, epanechnikov or uniform (histogram)")
    bandwidth: float | None = LossField(None, description="standard deviation of the kernel in nodes (histogram)")
    order_cost: str | None = LossField(None, description="step, linear or softplus (histogram)")
    density: str | None = LossField(None, description="histogram or beta (histogram)")
    normalize: bool | None = LossField(
        None, description="the embeddings within the loss (histogram, lifted, contrastive)"
    )
    on_degenerate: str | None = LossField(None, description="a batch without such pairs is an error (raise), or zero")
    loss_options: dict[str, Any] | None = PMLField(None, description="options of a pml loss, as a mapping or as JSON")
    miner: str | None = PMLField(None, description="name of a miner of pytorch-metric-learning (pml)")
    miner_options: dict[str, Any] | None = PMLField(None, description="options of the miner, as a mapping or as JSON")
    metric: str | None = Field(None, description="of retrieval: cosine or euclidean; None: the one the loss trains")
    batch_size: int = Field(128, ge=2, description="images per iteration")
    images_per_class: int = Field(10, ge=2, description="most images of a class drawn in one visit")
    sampler: str = Field("class-shuffle", description="how a batch is drawn: class-shuffle, balanced or random-class")
    min_images_per_class: int | None = SamplerField(
        None, ge=2, description="least number of images of a class in a batch (random-class)"
    )
    micro_batch: int | None = Field(None, ge=1, description="images embedded at once, for the whole batch's gradient")
    devices: int = Field(1, ge=1, description="processes, each with a share of every batch")
    iterations: int = Field(60, ge=0, description="batches trained on")
    validate_every: int = Field(20, ge=1, description="iterations between two validations")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam")
    seed: int = Field(0, ge=0, description="of initialisation and batches")
    weight_decay: float = Field(0.0, ge=0, description="added to the gradient, times the weight")
    decay_exempt: str = Field("biases", description="what weight_decay spares: biases (and BatchNorm), or none")
    lr_step: int | None = Field(None, ge=1, description="iterations between two steps of the learning rate")
    lr_step_factor: float = Field(0.1, gt=0, description="times the learning rate at each step")
    pretrained_lr_factor: float | None = Field(None, gt=0, description="times learning_rate for the backbone")
    refit: bool = Field(False, description="train again with the validation classes, for the chosen iterations")
    precision: str = Field("32-true", description="32-true, bf16-mixed or 64-true")
    study: str = ExecutionField("notebook", description="folder in runs_dir that the run is written to")
    device: str = ExecutionField("auto", description="auto, cpu or cuda")
    threads: int = ExecutionField(1, ge=1, description="CPU threads of torch, per process")
    data_dir: str = ExecutionField("data", description="folder of the prepared datasets")
    runs_dir: str = ExecutionField("runs", description="folder of the studies' runs")
    checkpoint_seconds: float = ExecutionField(60.0, ge=0, description="seconds of training between two checkpoints")
    keep_network: bool = ExecutionField(True, description="write the trained network's state dict to network.pt")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        _check_name("dataset", self.dataset, None)
        _check_name("study", self.study, None)
        if not is_known_network(self.network):
            _check_name("network", self.network, (*NETWORKS, f"{TORCHVISION}NAME"))
        if not self.loss.startswith(PREFIX):
            _check_name("loss", self.loss, (*LOSSES, f"{PREFIX}NAME", NO_LOSS))
        _check_name("sampler", self.sampler, tuple(SAMPLERS))
        _check_name("device", self.device, ("auto", "cpu", "cuda"))
        _check_name("precision", self.precision, PRECISIONS)
        _check_name("decay_exempt", self.decay_exempt, ("biases", "none"))
        if self.metric is not None:
            _check_name("metric", self.metric, METRICS)
        self.sampler_settings()
        self.build_loss()
        _check_name("batchnorm", self.network_settings()["batchnorm"], BATCHNORMS)
        self._check_pretrained()
        if self.devices > self.batch_size:
            raise ValueError(f"devices={self.devices} cannot share batch_size={self.batch_size} images")
        if self.refit and not self.iterations:
            raise ValueError("refit=True has nothing to repeat with iterations=0")
        if (self.iterations == 0) != (self.loss == NO_LOSS):
            raise ValueError(
                f'iterations={self.iterations} with loss={self.loss!r}: loss "none" and 0 iterations go together'
            )
        if self.network == "pixels" and self.iterations:
            raise ValueError(f'network="pixels" has nothing to train, got iterations={self.iterations}')
        return self

    def _check_pretrained(self) -> None:
        if has_pretrained_part(self.network):
            return
        for name, value, idle in (
            ("weights", self.weights, NO_WEIGHTS),
            ("pretrained_lr_factor", self.pretrained_lr_factor, None),
        ):
            if value != idle:
                raise ValueError(f"{name}={value!r}: network {self.network!r} has no part that comes pretrained")

    def network_settings(self) -> dict[str, Any]:
        """The settings of the network with its own defaults filled in."""
        own = network_defaults(self.network, self.weights) | {"normalize_embeddings": self.trained_metric == "cosine"}
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in own.items()}

    @property
    def weights_file(self) -> Path | None:
        """The local file of the backbone's weights; None where there is none."""
        return None if self.weights in (NO_WEIGHTS, IMAGENET) else project_path(self.weights)

    def loss_settings(self) -> dict[str, Any]:
        """The settings of the loss with its own defaults filled in; a setting the loss does not take is refused."""
        pml = self.loss.startswith(PREFIX)
        given = {name: getattr(self, name) for name in LOSS_SETTINGS + PML_SETTINGS if getattr(self, name) is not None}
        if pml:
            taken: dict[str, Any] = dict.fromkeys(PML_SETTINGS)
        elif self.loss == NO_LOSS:
            taken = {}
        else:
            taken = _defaults(LOSSES[self.loss], LOSS_SETTINGS)
        for name in given:
            if name not in taken:
                raise ValueError(
                    f"{name}={given[name]!r}: loss {self.loss!r} takes no {name}, "
                    f"it takes {', '.join(taken) or 'nothing'}"
                )
        return taken | given

    def build_loss(self, n_classes: int = 2) -> nn.Module | None:
        """The loss of this run; None for the baselines without training.

        n_classes: number of training classes, for losses of pytorch-metric-learning with weights for each. The weights
        are drawn by the run's seed.
        """
        settings = self.loss_settings()
        if self.loss == NO_LOSS:
            return None
        if not self.loss.startswith(PREFIX):
            return LOSSES[self.loss](**settings)
        options, miner, miner_options = (settings[name] for name in PML_SETTINGS)
        dimensions = self.embedding_dim or network_defaults(self.network, self.weights)["embedding_dim"]
        # The weights are drawn on the CPU: no GPU's generator is seeded, so none is to be put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            try:
                return PMLLoss(self.loss.removeprefix(PREFIX), options, miner, miner_options, n_classes, dimensions)
            except ImportError as error:
                raise ValueError(str(error)) from None

    @property
    def trained_metric(self) -> str:
        """The metric that the loss trains: "euclidean" for a loss on embeddings as they are, else "cosine".

        Equals the `metric` of the built loss, without building it.
        """
        if self.loss.startswith(PREFIX):
            return pml_metric(self.loss_options)
        raw = self.loss in BASELINES and self.loss_settings().get("normalize") is False
        return "euclidean" if raw else "cosine"

    def sampler_settings(self) -> dict[str, Any]:
        """The sampler's own settings with its defaults filled in; one that it does not take is refused."""
        taken = _defaults(SAMPLERS[self.sampler], SAMPLER_SETTINGS)
        if self.min_images_per_class is not None and not taken:
            raise ValueError(
                f"min_images_per_class={self.min_images_per_class}: sampler {self.sampler!r} takes no "
                "min_images_per_class"
            )
        if self.sampler == "balanced" and self.batch_size % self.images_per_class:
            raise ValueError(
                f'batch_size={self.batch_size}: sampler "balanced" takes a multiple of '
                f"images_per_class={self.images_per_class}"
            )
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in taken.items()
        }

    def build_sampler(self, labels: Tensor, generator: torch.Generator) -> ClassSampler:
        """The sampler of this run. ConfigError where these labels cannot make such batches."""
        own = self.sampler_settings()
        try:
            return SAMPLERS[self.sampler](labels, self.batch_size, self.images_per_class, generator, **own)
        except ValueError as error:
            raise ConfigError(f"sampler={self.sampler!r}: {error}") from None

    def resolved(self) -> dict[str, Any]:
        """What decides the result: every setting but those of execution, with all defaults filled in."""
        own = {k: v for k, v in self.model_dump().items() if k not in EXECUTION + LOSS_SETTINGS + PML_SETTINGS}
        own["metric"] = self.metric or self.trained_metric
        return own | self.network_settings() | self.loss_settings() | self.sampler_settings()

    @property
    def run_id(self) -> str:
        """Short hash of the resolved settings, seed included."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def slice_size(self) -> int | None:
        """`micro_batch` if any process has more of the batch than that: then all work in slices. None: no one does."""
        in_slices = self.micro_batch is not None and self.micro_batch * self.devices < self.batch_size
        return self.micro_batch if in_slices else None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return project_path(self.runs_dir) / self.study / self.run_id

    @property
    def data_folder(self) -> Path:
        """Where its prepared dataset is."""
        return project_path(self.data_dir) / self.dataset


def setting_names(group: str) -> tuple[str, ...]:
    """The settings of a group (loss, pml, sampler, execution), in the order of RunConfig."""
    return tuple(n for n, field in RunConfig.model_fields.items() if field.json_schema_extra == {"group": group})


LOSS_SETTINGS, PML_SETTINGS, SAMPLER_SETTINGS, EXECUTION = map(setting_names, ("loss", "pml", "sampler", "execution"))

_signature = functools.cache(inspect.signature)  # a study asks for it some ten times per run


def _defaults(called: Callable[..., Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The defaults of those of the named arguments that a class or function takes."""
    parameters = _signature(called).parameters
    return {name: parameters[name].default for name in names if name in parameters}


def _check_name(name: str, value: str, allowed: tuple[str, ...] | None) -> None:
    if allowed is None:
        if not value or not all(c.isalnum() or c in "-_" for c in value):
            raise ValueError(f"{name}={value!r} must be a name of letters, digits, - and _")
    elif value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown, allowed are {', '.join(allowed)}{did_you_mean(value, allowed)}")


def parse_config(settings: Mapping[str, Any]) -> RunConfig:
    """A RunConfig, or one ConfigError that names every wrong setting, its value and what is allowed."""
    known = tuple(RunConfig.model_fields)
    problems = [_unknown_setting(name, settings[name], known) for name in settings if name not in known]
    if not problems:
        try:
            return RunConfig(**_mappings(_numbers(settings)))
        except ValidationError as error:
            for e in error.errors():
                name = ".".join(str(part) for part in e["loc"])
                message = e["msg"].removeprefix("Value error, ")
                problems.append(f"{name}={e['input']!r}: {message}" if name else message)
    raise ConfigError("; ".join(problems)) from None


def _unknown_setting(name: str, value: Any, known: tuple[str, ...]) -> str:
    if name in OLD_NAMES:
        return f"{name}={value!r}: this setting is now called {OLD_NAMES[name]}"
    return f"{name}={value!r} is no setting of a run{did_you_mean(name, known)}; settings are {', '.join(known)}"


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers are numbers: 1 may stand for 1.0 (JSON and the command line write it so)."""
    floats = {n for n, f in RunConfig.model_fields.items() if f.annotation in (float, float | None)}
    return {n: float(v) if n in floats and type(v) is int else v for n, v in settings.items()}


def _mappings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping may be written as JSON, as on papermill's command line."""
    mappings = {n for n, f in RunConfig.model_fields.items() if f.annotation == dict[str, Any] | None}
    return {n: _from_json(v) if n in mappings and isinstance(v, str) else v for n, v in settings.items()}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # refused with its name by the check of its type


def config_from_notebook(names: Mapping[str, Any]) -> RunConfig:
    """The RunConfig from a notebook's variables: those of the parameters cell and those papermill injected.

    Any other plain variable is an unknown setting: papermill itself would only warn about it.
    """
    plain = (str, int, float, bool, list, dict, type(None))
    ours = {n: v for n, v in names.items() if not n.startswith("_") and isinstance(v, plain) and n not in ("In", "Out")}
    return parse_config(ours)
