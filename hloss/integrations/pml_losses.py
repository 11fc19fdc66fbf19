"""Losses and miners of pytorch-metric-learning by name: `PMLLoss("TripletMarginLoss", miner="TripletMarginMiner")`.

If an option takes an object, give the name of its class, or the name with options: `{"distance": "CosineSimilarity"}`,
`{"distance": {"LpDistance": {"power": 2}}}`. Losses with proxies or class weights need labels that count from 0, and
the optimiser must get their parameters. Losses that need more than one batch, or that wrap another loss, are excluded.
"""

import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hloss.names import did_you_mean
from hloss.numerics import full_precision

PREFIX = "pml:"
NAMED_PARTS = {"distance": "distances", "reducer": "reducers"}
NAMED_PARTS |= dict.fromkeys(("embedding_regularizer", "weight_regularizer"), "regularizers")
LEFT_OUT = (
    *("BaseLossWrapper", "BaseMetricLossFunction", "BaseMiner", "CrossBatchMemory", "GenericPairLoss", "ManifoldLoss"),
    *("EmbeddingsAlreadyPackagedAsTriplets", "MultipleLosses", "SelfSupervisedLoss", "VICRegLoss"),
)
PROVIDED = ("num_classes", "embedding_size", "descriptors_dim")  # From the data and the network, never an option.


class PMLLoss(nn.Module):
    """A loss of pytorch-metric-learning, on the pairs, triplets or weights of a miner, or on the whole batch.

    Args:
        name: a class of `pytorch_metric_learning.losses`.
        options: arguments of the loss.
        miner: a class of `pytorch_metric_learning.miners`, or None.
        miner_options: arguments of the miner.
        n_classes: number of training classes, for losses with class weights or proxies.
        embedding_dim: dimensions of the embeddings, for the same losses.

    Raises:
        ValueError: a loss, miner or option is unknown or unusable.
        ImportError: pytorch-metric-learning is not installed.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        miner: str | None = None,
        miner_options: Mapping[str, Any] | None = None,
        n_classes: int = 2,
        embedding_dim: int = 2,
    ) -> None:
        super().__init__()
        if find_spec("pytorch_metric_learning") is None:
            raise ImportError(f"loss {PREFIX}{name} needs pytorch-metric-learning: pip install 'hloss[pml]'")
        if miner_options and miner is None:
            raise ValueError(f"miner_options={dict(miner_options)!r}: there is no miner; give a miner's class name")
        provided = {"num_classes": n_classes, "embedding_size": embedding_dim, "descriptors_dim": embedding_dim}
        self.loss = _built("losses", name, options or {}, provided)
        self.miner = None if miner is None else _built("miners", miner, miner_options or {}, {})

    @property
    def metric(self) -> str:
        """Similarity for retrieval: "euclidean" for an LpDistance that does not normalise, else "cosine"."""
        distance: Any = self.loss.distance
        raw = type(distance).__name__ == "LpDistance" and not distance.normalize_embeddings
        return "euclidean" if raw else "cosine"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of floating-point embeddings (n, d) with integer labels (n,)."""
        embeddings = full_precision(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            mined = None if self.miner is None else self.miner(embeddings, labels)
            return self.loss(embeddings, labels, mined)


def pml_metric(options: Mapping[str, Any] | None) -> str:
    """Return `PMLLoss(name, options).metric` without building the loss. All losses normalise by default."""
    distance = (options or {}).get("distance")
    raw = isinstance(distance, Mapping) and not (distance.get("LpDistance") or {}).get("normalize_embeddings", True)
    return "euclidean" if raw else "cosine"


def available(module: str) -> dict[str, type[nn.Module]]:
    """Return the usable classes of a module of pytorch-metric-learning: "losses", "miners", ..."""
    found = vars(import_module(f"pytorch_metric_learning.{module}"))
    classes = {name: c for name, c in found.items() if inspect.isclass(c) and issubclass(c, nn.Module)}
    return {name: classes[name] for name in sorted(classes) if name not in LEFT_OUT}


def _built(module: str, name: str, options: Mapping[str, Any], provided: Mapping[str, Any]) -> nn.Module:
    """Build an object of a module of pytorch-metric-learning from its name and options."""
    classes = available(module)
    _check(f"{PREFIX}{name}" if module == "losses" else name, name, classes, f"pytorch_metric_learning.{module}")
    taken = _parameters(classes[name])
    arguments = {n: value for n, value in provided.items() if n in taken}
    for option, value in options.items():
        _check(f"{option}={value!r}", option, sorted(set(taken) - set(PROVIDED)), name)
        arguments[option] = _part(NAMED_PARTS[option], value) if option in NAMED_PARTS else value
    missing = [n for n, p in taken.items() if p.default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise ValueError(f"{name} needs the options {', '.join(missing)}: got {sorted(options)}")
    try:
        return classes[name](**arguments)
    except (TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot be made with {dict(options)!r}: {error}") from error


def _part(module: str, value: str | Mapping[str, Any]) -> nn.Module:
    """Build a distance, reducer or regulariser from its name or `{name: options}`."""
    named = {value: {}} if isinstance(value, str) else value
    if not isinstance(named, Mapping) or len(named) != 1:
        raise ValueError(
            f"an option from pytorch_metric_learning.{module} must be a name or {{name: options}}: got {value!r}"
        )
    ((name, options),) = named.items()
    return _built(module, name, options or {}, {})


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a class, and those of its bases that it accepts as **kwargs.

    Required arguments of a base are left out, because the class sets them, unless it accepts *args for the base.
    """
    taken: dict[str, inspect.Parameter] = {}
    needed = True
    for base in (b for b in cls.__mro__ if "__init__" in vars(b)):
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {p.kind for p in parameters}
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        taken = {p.name: p for p in named if needed or p.default is not p.empty} | taken
        needed = needed and inspect.Parameter.VAR_POSITIONAL in kinds
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return taken


def _check(shown: str, value: str, allowed: Iterable[str], where: str) -> None:
    if value not in allowed:
        names = sorted(allowed)
        raise ValueError(f"{shown} is unknown to {where}; known are {', '.join(names)}{did_you_mean(value, names)}")
