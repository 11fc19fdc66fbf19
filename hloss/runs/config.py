"""Settings of a run: `RunConfig`, its checks, and the loss and the sampler that it builds."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from hloss.integrations.pml_losses import PREFIX, PMLLoss, pml_metric
from hloss.losses.baselines import BASELINES
from hloss.losses.histogram import HistogramLoss
from hloss.names import did_you_mean
from hloss.retrieval.similarity import METRICS
from hloss.runs.errors import ConfigError, allowed_by
from hloss.runs.files import non_finite, project_path
from hloss.runs.memory import MemoryLoss, takes_references
from hloss.runs.models import (
    BATCHNORMS,
    IMAGENET,
    NETWORKS,
    NO_WEIGHTS,
    TORCHVISION,
    has_pretrained_part,
    is_known_network,
    network_defaults,
    torchvision_names,
)
from hloss.samplers import SAMPLERS, ClassSampler

LOSSES: dict[str, Callable[..., nn.Module]] = {"histogram": HistogramLoss, **BASELINES}
NO_LOSS = "none"  # no training: the untrained-network and the raw-pixels baseline
PRECISIONS = ("32-true", "bf16-mixed", "64-true")
TF32_DEFAULT = "convolutions"
TF32 = ("none", TF32_DEFAULT, "all")
IMAGES = ("auto", "device", "host")
BEST, LAST = CHOICES = ("best", "last")
OLD_NAMES = {
    "fewest_images": "min_images_per_class",
    "mirror": "horizontal_flip",
}  # Old name: new name. The error message gives the new name.


def _in_group(group: str) -> Callable[..., Any]:
    """Return `pydantic.Field` with a group name; `setting_names` selects settings by this name."""
    return functools.partial(Field, json_schema_extra={"group": group})


LossField = _in_group("loss")  # None stands for the default in the signature of the loss class
PMLField = _in_group("pml")
SamplerField = _in_group("sampler")  # None stands for the default in the signature of the sampler class
ExecutionField = _in_group("execution")  # settings that do not affect the result


class RunConfig(BaseModel):
    """Settings of one run; the defaults describe a short test run that takes seconds on a CPU.

    The description of each field states its meaning, unit and allowed values. "None: the default" refers to the default
    of the loss, the network (`hloss.runs.models.network_defaults`) or the sampler. A name in parentheses, such as
    "(binomial)", restricts a setting to that loss or sampler. Use `parse_config` to create a RunConfig from a mapping;
    the constructor itself raises pydantic's ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dataset: str = Field("glyphs", description="name of the prepared dataset, a folder in data_dir")
    crop: int | None = Field(
        None,
        ge=1,
        description="side of the square crop in pixels, random in training and central in evaluation; None: no crop",
    )
    horizontal_flip: bool = Field(False, description="flip each training image left to right with probability 1/2")
    network: str = Field(
        "glyphnet", description="glyphnet, parts, googlenet, torchvision:NAME, or pixels (the raw-pixels baseline)"
    )
    embedding_dim: int | None = Field(
        None, ge=1, description="dimensions of the embedding, at least 1; None: the default"
    )
    weights: str = Field(
        "none",
        description="initial weights of the backbone: none (random), imagenet, or the path of a torchvision state dict",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout probability of the features, in [0, 1); None: the default"
    )
    batchnorm: str | None = Field(
        None,
        description=(
            "BatchNorm statistics: live (of the batch), frozen (running statistics) or slices (of each slice); "
            "None: frozen with pretrained weights, live without"
        ),
    )
    normalize_embeddings: bool | None = Field(
        None, description="L2-normalise the network's output; None: True if the loss trains the cosine similarity"
    )
    loss: str = Field(
        "histogram",
        description="histogram, a baseline (binomial, lifted, triplet, ...), pml:NAME, or none (requires iterations=0)",
    )
    n_bins: int | None = LossField(None, description="intervals of [-1, 1], at least 1 (histogram); None: the default")
    margin: float | None = LossField(
        None,
        description=(
            "similarity (histogram, quadruplet), distance (lifted, contrastive) or squared distance (triplets); "
            "None: the default"
        ),
    )
    alpha: float | None = LossField(
        None, description="steepness, above 0 (binomial; histogram with order_cost softplus); None: the default"
    )
    beta: float | None = LossField(
        None, description="threshold between similarities of positive and negative pairs (binomial); None: the default"
    )
    C: float | None = LossField(
        None, description="factor on the slope for negative pairs, above 0 (binomial); None: the default"
    )
    kernel: str | None = LossField(
        None, description="triangular, gaussian, epanechnikov or uniform (histogram); None: the default"
    )
    bandwidth: float | None = LossField(
        None,
        description="standard deviation of the kernel in nodes, above 0 (histogram); None: for the triangular kernel",
    )
    order_cost: str | None = LossField(None, description="step, linear or softplus (histogram); None: the default")
    density: str | None = LossField(None, description="histogram or beta (histogram); None: the default")
    normalize: bool | None = LossField(
        None, description="L2-normalise embeddings inside the loss (histogram, lifted, contrastive); None: the default"
    )
    on_degenerate: str | None = LossField(
        None,
        description=(
            "for a batch without positive or without negative pairs: raise (an error) or zero (all but pml); "
            "None: the default"
        ),
    )
    loss_options: dict[str, Any] | None = PMLField(
        None, description="arguments of a pml loss, a mapping or JSON text; None: no arguments"
    )
    miner: str | None = PMLField(
        None, description="class name of a pytorch-metric-learning miner (pml); None: no miner"
    )
    miner_options: dict[str, Any] | None = PMLField(
        None, description="arguments of the miner, a mapping or JSON text (pml); None: no arguments"
    )
    metric: str | None = Field(
        None, description="metric of retrieval: cosine or euclidean; None: the metric that the loss trains"
    )
    batch_size: int = Field(128, ge=2, description="images per iteration, over all devices, at least 2")
    images_per_class: int = Field(
        10, ge=2, description="maximum images per visit of a class (balanced: exactly this number), at least 2"
    )
    sampler: str = Field("class-shuffle", description="how batches are drawn: class-shuffle, balanced or random-class")
    min_images_per_class: int | None = SamplerField(
        None, ge=2, description="minimum images per class in a batch, at least 2 (random-class); None: the default"
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="images per slice; slices save memory and keep the gradient of the whole batch; None: no slices",
    )
    memory_batches: int = Field(
        0,
        ge=0,
        description="earlier batches whose embeddings form pairs with the batch, for losses with references; 0: none",
    )
    memory_start: int = Field(
        0,
        ge=0,
        description="number of iterations at the start without memory of earlier batches, at least 0 (memory_batches)",
    )
    devices: int = Field(1, ge=1, description="number of processes, one per GPU, that share each batch")
    iterations: int = Field(60, ge=0, description="training iterations, one batch each; 0 requires loss=none")
    validate_every: int = Field(20, ge=1, description="iterations between two validations, at least 1")
    report_at: list[int] | None = Field(
        None,
        description=(
            "training lengths in iterations, increasing, at most iterations; the test set is evaluated after each and "
            "after iterations; None: after iterations alone"
        ),
    )
    learning_rate: float = Field(1e-3, gt=0, description="initial learning rate of Adam, above 0")
    seed: int = Field(0, ge=0, description="seed of initial weights, batches, augmentation and dropout, at least 0")
    weight_decay: float = Field(
        0.0, ge=0, description="L2 penalty: adds weight_decay times a weight to its gradient, at least 0"
    )
    decay_exempt: str = Field(
        "biases", description="parameters without weight decay: biases (with BatchNorm's scale and shift) or none"
    )
    lr_step: int | None = Field(
        None,
        ge=1,
        description="iterations between two changes of the learning rate, at least 1; None: a constant learning rate",
    )
    lr_step_factor: float = Field(
        0.1, gt=0, description="factor on the learning rate after every lr_step iterations, above 0"
    )
    pretrained_lr_factor: float | None = Field(
        None,
        gt=0,
        description=(
            "learning rate of the backbone divided by learning_rate, above 0; None: 0.1 with pretrained weights, "
            "1 without"
        ),
    )
    refit: bool = Field(
        False,
        description="train a second time, on training and validation classes, for the chosen number of iterations",
    )
    choose: str = Field(
        BEST,
        description=(
            "the network to test: best (at the highest validation Recall@1, the first of equal ones) or last (of the "
            "last iteration, without validation)"
        ),
    )
    precision: str = Field(
        "32-true", description="32-true (float32), bf16-mixed (bfloat16 autocast) or 64-true (float64)"
    )
    tf32: str = Field(
        TF32_DEFAULT,
        description=(
            "TensorFloat-32 of a float32 network on a GPU: none, convolutions (torch's default) or all (also matrix "
            "products); without effect on a CPU"
        ),
    )
    study: str = ExecutionField(
        "notebook", description="name of the study, the folder in runs_dir for the run's folder"
    )
    device: str = ExecutionField("auto", description="auto (a GPU if torch finds one), cpu or cuda")
    images: str = ExecutionField(
        "auto",
        description=(
            "where images are stored: device (all in its memory), host (read batch by batch), or auto (device, if it "
            "is a GPU and the images take at most half of its free memory)"
        ),
    )
    threads: int = ExecutionField(1, ge=1, description="CPU threads of torch per process, at least 1")
    data_dir: str = ExecutionField("data", description="folder of the prepared datasets")
    runs_dir: str = ExecutionField("runs", description="folder of all studies' runs")
    checkpoint_seconds: float = ExecutionField(
        60.0, ge=0, description="seconds of training between two checkpoints, at least 0 (0: after every iteration)"
    )
    keep_network: bool = ExecutionField(True, description="write the trained network's state dict to network.pt")
    record_pairs: bool = ExecutionField(
        False,
        description=(
            "record slopes of the batch's pairs, overlap and probability of reverse at each validation, in "
            "history.parquet; this setting does not repeat a complete run"
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        _check_name("dataset", self.dataset, None)
        _check_name("study", self.study, None)
        if not is_known_network(self.network):
            if self.network.startswith(TORCHVISION):
                _check_name("network", self.network, tuple(f"{TORCHVISION}{name}" for name in torchvision_names()))
            _check_name("network", self.network, (*NETWORKS, f"{TORCHVISION}NAME"))
        if not self.loss.startswith(PREFIX):
            _check_name("loss", self.loss, (*LOSSES, f"{PREFIX}NAME", NO_LOSS))
        _check_name("sampler", self.sampler, tuple(SAMPLERS))
        _check_name("device", self.device, ("auto", "cpu", "cuda"))
        _check_name("precision", self.precision, PRECISIONS)
        _check_name("tf32", self.tf32, TF32)
        _check_name("images", self.images, IMAGES)
        _check_name("decay_exempt", self.decay_exempt, ("biases", "none"))
        _check_name("choose", self.choose, CHOICES)
        if self.metric is not None:
            _check_name("metric", self.metric, METRICS)
        for name in ("loss_options", "miner_options"):
            if wrong := non_finite(getattr(self, name), name):
                raise ValueError(f"{wrong}: all numbers must be finite")
        self.sampler_settings()
        loss = self.build_loss()
        self._check_memory(loss)
        _check_name("batchnorm", self.network_settings()["batchnorm"], BATCHNORMS)
        self._check_pretrained()
        if self.devices > self.batch_size:
            raise ValueError(
                f"devices={self.devices}: more devices than images in a batch; allowed are 1 to "
                f"batch_size={self.batch_size}"
            )
        if self.refit and not self.iterations:
            raise ValueError("refit=True: a run with iterations=0 has no training to repeat; set refit to False")
        if self.refit and self.choose == LAST:
            raise ValueError(
                'refit=True does not fit choose="last": refit trains for the number of iterations that validation '
                "chooses; set refit to False"
            )
        if (self.iterations == 0) != (self.loss == NO_LOSS):
            raise ValueError(
                f"iterations={self.iterations} does not fit loss={self.loss!r}; "
                f'loss "none" requires 0 iterations, every other loss at least 1'
            )
        if self.network == "pixels" and self.iterations:
            raise ValueError(f'iterations={self.iterations}: network "pixels" has no parameters; set iterations to 0')
        self._check_report_at()
        return self

    def _check_report_at(self) -> None:
        """Raise ValueError if the result at a length could differ from that of a run with so many iterations."""
        given = self.report_at
        if given is None:
            return
        if not given or given[0] < 1 or given != sorted(set(given)) or given[-1] > self.iterations:
            raise ValueError(
                f"report_at={given} must be at least one length, in increasing order; allowed are 1 to "
                f"iterations={self.iterations}"
            )
        for length in given:
            if length % self.validate_every and length != self.iterations:
                raise ValueError(
                    f"report_at={given}: no validation takes place after {length} iterations; allowed are multiples of "
                    f"validate_every={self.validate_every}"
                )
        for name, value, unset in (("refit", self.refit, False), ("lr_step", self.lr_step, None)):
            if value != unset and len(self.lengths) > 1:
                raise ValueError(
                    f"report_at={given} does not fit {name}={value}: with {name} the result at a length differs from "
                    f"that of a run of this length; leave {name} at {unset}, or make one run per length"
                )

    def _check_memory(self, loss: nn.Module | None) -> None:
        if self.memory_start and not self.memory_batches:
            raise ValueError(f"memory_start={self.memory_start}: there is no memory; set memory_batches to 1 or more")
        if self.memory_batches and not (isinstance(loss, MemoryLoss) and takes_references(loss.loss)):
            raise ValueError(
                f"memory_batches={self.memory_batches}: loss {self.loss!r} takes no reference embeddings; use another "
                "loss, such as histogram, or leave memory_batches at 0"
            )

    def _check_pretrained(self) -> None:
        if has_pretrained_part(self.network):
            return
        for name, value, unset in (
            ("weights", self.weights, NO_WEIGHTS),
            ("pretrained_lr_factor", self.pretrained_lr_factor, None),
        ):
            if value != unset:
                raise ValueError(
                    f"{name}={value!r}: network {self.network!r} has no pretrained weights; use googlenet or "
                    f"{TORCHVISION}NAME, or leave {name} at {unset!r}"
                )

    def network_settings(self) -> dict[str, Any]:
        """Settings of the network, with None replaced by the network's default.

        Returns:
            `embedding_dim`, `dropout`, `batchnorm`, `pretrained_lr_factor` and `normalize_embeddings`.
        """
        defaults = network_defaults(self.network, self.weights) | {
            "normalize_embeddings": self.trained_metric == "cosine"
        }
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in defaults.items()}

    @property
    def weights_file(self) -> Path | None:
        """Local file of the backbone's initial weights; None for `weights` "none" and "imagenet"."""
        return None if self.weights in (NO_WEIGHTS, IMAGENET) else project_path(self.weights)

    def loss_settings(self) -> dict[str, Any]:
        """Settings of the loss, with None replaced by the default of the loss.

        Returns:
            Arguments of the loss class by name; empty for loss "none".

        Raises:
            ValueError: the loss does not have a setting that is given.
        """
        pml = self.loss.startswith(PREFIX)
        given = {name: getattr(self, name) for name in LOSS_SETTINGS + PML_SETTINGS if getattr(self, name) is not None}
        if pml:
            defaults: dict[str, Any] = dict.fromkeys(PML_SETTINGS)
        elif self.loss == NO_LOSS:
            defaults = {}
        else:
            defaults = _defaults(LOSSES[self.loss], LOSS_SETTINGS)
        for name in given:
            if name not in defaults:
                raise ValueError(
                    f"{name}={given[name]!r}: loss {self.loss!r} has no setting {name}; "
                    f"it has {', '.join(defaults) or 'no settings'}"
                )
        return defaults | given

    def build_loss(self, n_classes: int = 2) -> nn.Module | None:
        """Build the loss of this run.

        The weights of a pytorch-metric-learning loss are drawn on the CPU with the run's seed. The state of torch's
        generator does not change.

        Args:
            n_classes: number of training classes, for losses of pytorch-metric-learning with weights per class.

        Returns:
            A module that maps embeddings (n, d) and labels (n,) to a scalar; None for loss "none". With
            `memory_batches` it also keeps the embeddings of earlier batches.

        Raises:
            ValueError: a setting of the loss is unknown or out of range, or pytorch-metric-learning is not installed.
        """
        settings = self.loss_settings()
        if self.loss == NO_LOSS:
            return None
        if not self.loss.startswith(PREFIX):
            loss = LOSSES[self.loss](**settings)
            return MemoryLoss(loss, self.memory_batches, self.memory_start) if self.memory_batches else loss
        options, miner, miner_options = (settings[name] for name in PML_SETTINGS)
        dimensions = self.embedding_dim or network_defaults(self.network, self.weights)["embedding_dim"]
        # Only the CPU generator is seeded, so only its state must be restored.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            try:
                return PMLLoss(self.loss.removeprefix(PREFIX), options, miner, miner_options, n_classes, dimensions)
            except ImportError as error:
                raise ValueError(str(error)) from None

    @property
    def trained_metric(self) -> str:
        """Metric in which the loss compares embeddings, the metric that it trains: "euclidean" or "cosine".

        "euclidean" means Euclidean distances between embeddings that the loss does not normalise. Reading this property
        does not build the loss.
        """
        if self.loss.startswith(PREFIX):
            return pml_metric(self.loss_options)
        raw = self.loss in BASELINES and self.loss_settings().get("normalize") is False
        return "euclidean" if raw else "cosine"

    def sampler_settings(self) -> dict[str, Any]:
        """Settings that only some samplers have, with None replaced by the default of the sampler.

        Returns:
            Arguments of the sampler class besides labels, batch size, images per class and generator.

        Raises:
            ValueError: the sampler does not have a setting that is given, or the batch size does not fit the sampler.
        """
        defaults = _defaults(SAMPLERS[self.sampler], SAMPLER_SETTINGS)
        for name in SAMPLER_SETTINGS:
            if getattr(self, name) is not None and name not in defaults:
                owners = [
                    f'"{sampler}"'
                    for sampler, called in SAMPLERS.items()
                    if name in inspect.signature(called).parameters
                ]
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: sampler {self.sampler!r} has no setting {name}; "
                    f"use sampler {' or '.join(owners)}"
                )
        if self.sampler == "balanced" and self.batch_size % self.images_per_class:
            raise ValueError(
                f'batch_size={self.batch_size}: sampler "balanced" requires a multiple of '
                f"images_per_class={self.images_per_class}"
            )
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults.items()
        }

    def build_sampler(self, labels: Tensor, generator: torch.Generator) -> ClassSampler:
        """Build the sampler of this run.

        Args:
            labels: integers (n,), the classes of the images to draw from.
            generator: random generator of the sampler, on the CPU.

        Returns:
            An endless iterable over lists of `batch_size` indices into `labels`.

        Raises:
            ConfigError: the sampler cannot fill a batch from these labels.
        """
        own = self.sampler_settings()
        try:
            return SAMPLERS[self.sampler](labels, self.batch_size, self.images_per_class, generator, **own)
        except ValueError as error:
            raise ConfigError(f"sampler={self.sampler!r}: {error}") from None

    def resolved(self) -> dict[str, Any]:
        """All settings that affect the result, with None replaced by the defaults; execution settings are left out.

        `tf32` and `choose` are left out if they have their defaults, so that run ids of earlier versions stay valid.
        `memory_batches` and `memory_start` are left out if `memory_batches` is 0. `report_at` contains all training
        lengths; it is left out if `iterations` is the only one.
        """
        general = {k: v for k, v in self.model_dump().items() if k not in EXECUTION + LOSS_SETTINGS + PML_SETTINGS}
        general["report_at"] = list(self.lengths)
        if len(self.lengths) == 1:
            del general["report_at"]
        for name, default in (("tf32", TF32_DEFAULT), ("choose", BEST)):
            if general[name] == default:
                del general[name]
        if not self.memory_batches:
            del general["memory_batches"], general["memory_start"]
        general["metric"] = self.metric or self.trained_metric
        return general | self.network_settings() | self.loss_settings() | self.sampler_settings()

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the SHA-256 hash of the resolved settings, which include the seed."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Training lengths in iterations that are evaluated on the test set: `report_at` and `iterations`."""
        return tuple(sorted({*(self.report_at or ()), self.iterations}))

    @property
    def slice_size(self) -> int | None:
        """Images per slice; None (no slices) if no process has more than `micro_batch` images of a batch.

        Either all processes embed in slices, or no process does.
        """
        in_slices = self.micro_batch is not None and self.micro_batch * self.devices < self.batch_size
        return self.micro_batch if in_slices else None

    @property
    def folder(self) -> Path:
        """Folder of the run: `runs_dir/study/run_id`."""
        return project_path(self.runs_dir) / self.study / self.run_id

    @property
    def data_folder(self) -> Path:
        """Folder of the prepared dataset: `data_dir/dataset`."""
        return project_path(self.data_dir) / self.dataset


def setting_names(group: str) -> tuple[str, ...]:
    """Names of the settings in a group ("loss", "pml", "sampler" or "execution"), in the order of RunConfig."""
    return tuple(n for n, field in RunConfig.model_fields.items() if field.json_schema_extra == {"group": group})


LOSS_SETTINGS, PML_SETTINGS, SAMPLER_SETTINGS, EXECUTION = map(setting_names, ("loss", "pml", "sampler", "execution"))


@functools.cache
def _signature(called: Callable[..., Any]) -> inspect.Signature:  # a study needs a signature about ten times per run
    return inspect.signature(called)


def _defaults(called: Callable[..., Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Defaults of the arguments of `called` whose names are in `names`."""
    parameters = _signature(called).parameters
    return {name: parameters[name].default for name in names if name in parameters}


def _check_name(name: str, value: str, allowed: tuple[str, ...] | None) -> None:
    if allowed is None:
        if not value or not all(c.isalnum() or c in "-_" for c in value):
            raise ValueError(f"{name}={value!r} must be a name of letters, digits, - and _")
    elif value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(allowed)}{did_you_mean(value, allowed)}")


def parse_config(settings: Mapping[str, Any]) -> RunConfig:
    """Check settings and return them as a RunConfig.

    Integers are accepted for float settings, and JSON text for settings that are mappings.

    Args:
        settings: values by the names of RunConfig's fields; missing ones have their defaults.

    Returns:
        The settings, checked.

    Raises:
        ConfigError: settings are unknown or out of range; the message lists each with its value and the allowed values.
    """
    known = tuple(RunConfig.model_fields)
    problems = [_unknown_setting(name, settings[name], known) for name in settings if name not in known]
    if not problems:
        try:
            return RunConfig(**_mappings(_numbers(settings)))
        except ValidationError as error:
            for e in error.errors():
                name = ".".join(str(part) for part in e["loc"])
                value = str(e["input"]) if isinstance(e["input"], date) else repr(e["input"])
                problems.append(
                    f"{name}={value}: must be {allowed_by(e)}" if name else e["msg"].removeprefix("Value error, ")
                )
    raise ConfigError("; ".join(problems)) from None


def _unknown_setting(name: str, value: Any, known: tuple[str, ...]) -> str:
    if name in OLD_NAMES:
        return f"{name}={value!r}: this setting was renamed; use {OLD_NAMES[name]}"
    return f"{name}={value!r} is not a setting of a run{did_you_mean(name, known)}; settings are {', '.join(known)}"


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert integers to float for float settings, because JSON and the command line may write 1.0 as 1."""
    floats = {n for n, f in RunConfig.model_fields.items() if f.annotation in (float, float | None)}
    return {n: float(v) if n in floats and type(v) is int else v for n, v in settings.items()}


def _mappings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Parse JSON text for settings that are mappings, because papermill's command line passes text."""
    mappings = {n for n, f in RunConfig.model_fields.items() if f.annotation == dict[str, Any] | None}
    return {n: _from_json(v) if n in mappings and isinstance(v, str) else v for n, v in settings.items()}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # The type check of RunConfig then names the setting in its error.


def config_from_notebook(names: Mapping[str, Any]) -> RunConfig:
    """Create a RunConfig from the variables of a notebook's parameters cell and those that papermill injects.

    Args:
        names: the notebook's global variables. Names that begin with "_" and values of other types than str, int,
            float, bool, list, dict and None are ignored.

    Returns:
        The settings, checked.

    Raises:
        ConfigError: a variable is not a setting (papermill only warns about unknown parameters), or is out of range.
    """
    plain = (str, int, float, bool, list, dict, type(None))
    settings = {
        n: v for n, v in names.items() if not n.startswith("_") and isinstance(v, plain) and n not in ("In", "Out")
    }
    return parse_config(settings)
