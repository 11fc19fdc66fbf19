"""The two passes of the fused histogram loss, as launches of Triton kernels.

Forward: `prepare` writes the unit rows and their inverse norms. `bin_pairs` computes tiles of similarities and adds
their pairs to a table of integers. `finish_step` or `finish_matrix` computes the loss and the slopes from the table. A
slope is the derivative of the loss with respect to the similarity of a pair, for each group and interval.

Backward: the matrix of the slopes of all pairs is multiplied by the embeddings. `through_norm` differentiates the
normalisation. For at most KEPT_PAIRS pairs, the forward pass stores the place of each pair, which is the index of its
slope. `multiply` then reads the slopes at these indices. For more pairs, `find_slopes` computes the similarities again.
It fills one block of the matrix of slopes at a time, and cuBLAS multiplies the block, so memory does not grow with the
number of pairs.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hloss.losses.checks import is_deferred, verify_or_defer
from hloss.losses.cuda_forms import swap_cuda_precision
from hloss.losses.densities import FLAGS, LANE_PAIRS, cost_matrix, kernel_matrix
from hloss.losses.settings import LossSettings, missing_pairs
from hloss.losses.streaming import checked_pairs
from hloss.numerics import LONGEST

KEPT_PAIRS = 2**22  # most places that are stored for the backward pass, padding included: 8 MiB of int16
BLOCK_ROWS = 2**13  # most rows of a block of slopes; within one batch, blocks are square
BLOCK_PAIRS = 2**26  # most slopes in a block: 256 MiB
PROGRAMS_PER_PROCESSOR = 4
LANES_BYTES = 2**26  # most bytes of the packed numbers of all programs
LEAST_PART = 64  # fewest columns in the part of a product that one program computes
FORM_TILE = 16, 256  # rows and columns of a matrix of `bilinear_forms` that a program reads at once
HERE = nullcontext()


class Tile(NamedTuple):
    """Shape of the tile of a Triton program, and the options of its compilation."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


SMALL_TILE = Tile(32, 32, 64, 4, 3)  # for similarities with at most SMALL rows and columns
LARGE_TILE = Tile(64, 64, 32, 4, 3)
GRADIENT_TILE = Tile(64, 64, 32, 4, 3)
SMALL = 512
FILL = 64  # `places` is padded to a multiple of this, which the sides of all tiles divide


class Side(NamedTuple):
    """The rows or the columns of the matrix of similarities."""

    units: Tensor  # (n, d) float32
    scales: Tensor  # (n,) float64, inverse norms


class Launch:
    """A kernel and the arguments of its launch, except the tensors. All launches must have tensors of the same dtypes.

    The compiled kernel is stored, because a look-up in Triton's cache takes longer. (In Triton's interpreter, there is
    no compiled kernel.) Tensors must come from `ready`, because Triton compiles another kernel for unaligned addresses.
    """

    def __init__(
        self, name: str, grid: tuple[int, ...], tile: Tile | None, numbers: tuple[Any, ...], **constants: Any
    ) -> None:
        self.name, self.grid, self.tile, self.numbers, self.constants = name, grid, tile, numbers, constants
        self.rest = *numbers, *constants.values()
        self.program: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on these tensors; the first call compiles."""
        if self.program is not None:
            self.program(*tensors, *self.rest)
            return
        compiled = _launch(self.name, self.grid, self.tile, *tensors, *self.numbers, **self.constants)
        if compiled is not None:
            self.program = compiled[(*self.grid, 1, 1)[:3]]


class Product(NamedTuple):
    """The launch of `multiply`, and the shape of its result: parts to be summed, rows, depth."""

    launch: Launch
    shape: tuple[int, int, int]


class Block(NamedTuple):
    """A block of the matrix of slopes and the launch that finds it."""

    launch: Launch
    rows: slice
    columns: slice
    mirrored: bool  # also add the product with the transpose, which is the block below the diagonal


class Plan:
    """All launches of both passes, for batches of the same shapes and types. The tensors are passed later.

    Args:
        shape: of the embeddings.
        reference_shape: of the references, None for the pairs within one batch.
        matrix: whether the labels are a matrix of pairs.
        types: dtypes of the embeddings and of the labels.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        reference_shape: tuple[int, int] | None,
        matrix: bool,
        types: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        s: LossSettings,
        precision: str,
    ) -> None:
        self.device, self.s, self.precision = device, s, precision
        self.within, self.matrix = reference_shape is None, matrix
        self.n, self.depth = shape
        self.m = (reference_shape or shape)[0]
        self.dtype, self.nodes = types[0], s.n_bins + 1
        self.is_copied = is_copied(self.dtype, s.normalize)
        self.places_shape = places_shape(self.n, self.m)
        self.places_dtype = places_dtype(self.nodes)
        self._plan_forward()
        if self.places_shape is None:
            self._plan_blocks()
        else:
            width = self.places_shape[1]
            self.product = self._multiply(self.n, self.m, (width, 1))
            self.column_product = self._multiply(self.m, self.n, (1, width))
        parts = (1, 1) if self.places_shape is None else (self.product.shape[0], self.column_product.shape[0])
        self.through_norm = self._by_rows("through_norm", self.n, (self.n, self.depth, parts[0]))
        self.column_through_norm = self._by_rows("through_norm", self.m, (self.m, self.depth, parts[1]))

    def _plan_forward(self) -> None:
        n, m, nodes, s = self.n, self.m, self.nodes, self.s
        tile = SMALL_TILE if max(n, m) <= SMALL else LARGE_TILE
        down, across = _filled(n) // tile.rows, _filled(m) // tile.rows
        tiles = down * (down + 1) // 2 if self.within else down * across
        programs = max(1, min(tiles, _programs(self.device), LANES_BYTES // (16 * nodes)))
        # 2 * nodes counts, 2 * nodes sums of fractions, the flags, and 2 * nodes packed numbers for each program
        self.table_size = 4 * nodes + FLAGS + programs * 2 * nodes
        self.flags = slice(4 * nodes, 4 * nodes + FLAGS)
        self.prepare = self._prepare(n, m, not self.matrix)
        self.column_prepare = self._prepare(m, n, False)
        stride = 0 if self.places_shape is None else self.places_shape[1]
        self.bin_pairs = Launch(
            "bin_pairs",
            (programs,),
            tile,
            (n, m, self.depth, *self._label_strides(), stride, tiles, across),
            NODES=nodes,
            WITHIN=self.within,
            MATRIX=self.matrix,
            KEEP=self.places_shape is not None,
            TILES_TO_FLUSH=max(1, LANE_PAIRS // tile.rows**2),
            # For a chunk with fewer numbers than threads, Triton would give the same number to several threads.
            CHUNK=max(512, _chunk(2 * nodes)),
            **self._product_constants(tile),
        )
        self.forms: tuple[Tensor, ...] = ()
        if s.kernel == "triangular" and s.order_cost == "step":
            constants = {"NODES": nodes, "SHIFT": s.margin_nodes, "CHUNK": _chunk(nodes)}
            self.finish = Launch("finish_step", (1,), None, (), **constants)
        else:
            self.forms = (bilinear_forms(s, self.device),)
            constants = {"NODES": nodes, "CHUNK": _chunk(nodes), "BR": FORM_TILE[0], "BC": FORM_TILE[1]}
            self.finish = Launch("finish_matrix", (_cdiv(nodes, FORM_TILE[0]) + 1,), None, (), **constants)

    def _plan_blocks(self) -> None:
        """Split the matrix of slopes into blocks.

        Within one batch, only blocks on and above the diagonal are computed; the others are their transposes.
        """
        height = min(BLOCK_ROWS, _filled(self.n))
        width = height if self.within else min(max(FILL, BLOCK_PAIRS // height // FILL * FILL), _filled(self.m))
        self.memory_shape = height, width
        self.blocks = [
            self._block(i, j)
            for i in _blocks(self.n, height)
            for j in _blocks(self.m, width)
            if not self.within or j.start >= i.start
        ]

    def _block(self, i: slice, j: slice) -> Block:
        tile, on_diagonal = LARGE_TILE, self.within and i == j
        down, across = _cdiv(i.stop - i.start, tile.rows), _cdiv(j.stop - j.start, tile.rows)
        launch = Launch(
            "find_slopes",
            (down * (down + 1) // 2 if on_diagonal else down * across,),
            tile,
            (i.start, j.start, i.stop, j.stop, self.depth, *self._label_strides(), self.memory_shape[1], across),
            NODES=self.nodes,
            WITHIN=self.within,
            MATRIX=self.matrix,
            MIRROR=on_diagonal,
            **self._product_constants(tile),
        )
        return Block(launch, i, j, self.within and not on_diagonal)

    def _multiply(self, rows: int, m: int, strides: tuple[int, int]) -> Product:
        """Return the launch for the product of slopes and embeddings, in enough parts to occupy the GPU."""
        tile = GRADIENT_TILE
        grid = _cdiv(rows, tile.rows), _cdiv(self.depth, tile.columns)
        wanted = max(1, _programs(self.device) // (grid[0] * grid[1]))
        part = _cdiv(max(_cdiv(m, wanted), LEAST_PART), tile.depth) * tile.depth
        parts = _cdiv(m, part)
        launch = Launch(
            "multiply",
            (*grid, parts),
            tile,
            (rows, m, self.depth, part, *strides),
            NODES=self.nodes,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            EVEN=self.depth % tile.columns == 0,
            PRECISION=self.precision,
        )
        return Product(launch, (parts, rows, self.depth))

    def _prepare(self, rows: int, others: int, find_groups: bool) -> Launch:
        constants = {"NODES": self.nodes, "FIND_GROUPS": find_groups, "WITHIN": self.within, "WRITE": self.is_copied}
        return self._by_rows("prepare", rows, (rows, others, self.depth, LONGEST), **constants)

    def _by_rows(self, name: str, rows: int, numbers: tuple[Any, ...], **constants: Any) -> Launch:
        constants |= {"NORMALIZE": self.s.normalize, "BR": _row_tile(self.depth), "BD": _chunk(self.depth)}
        return Launch(name, (_cdiv(rows, _row_tile(self.depth)),), None, numbers, **constants)

    def _label_strides(self) -> tuple[int, int]:
        return (self.m, 1) if self.matrix else (0, 0)

    def _product_constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "BM": tile.rows,
            "BK": tile.depth,
            "EVEN": self.depth % tile.depth == 0,
            "PRECISION": self.precision,
        }


_find_plan = lru_cache(maxsize=64)(Plan)


def find_plan(embeddings: Tensor, references: Tensor | None, labels: Tensor, s: LossSettings, precision: str) -> Plan:
    """Return the plan for these inputs. Plans are cached."""
    shape = None if references is None else references.shape
    types = embeddings.dtype, labels.dtype
    return _find_plan(embeddings.shape, shape, labels.ndim == 2, types, embeddings.device, s, precision)


class Kept(NamedTuple):
    """The results of the forward pass that the backward pass needs."""

    rows: Side
    columns: Side | None  # None: the rows
    slopes: Tensor  # (2 n_bins + 3,) float32: of negatives, of positives, and 0 for entries that are no pair
    places: Tensor | None


def forward_pass(
    embeddings: Tensor, references: Tensor | None, labels: Tensor, reference_labels: Tensor | None, plan: Plan
) -> tuple[Tensor, Kept]:
    """Return the loss, a scalar float32, and the results that the backward pass needs."""
    device, s = plan.device, plan.s
    with _on(device):
        table = torch.zeros(plan.table_size, dtype=torch.int64, device=device)
        both_labels = row_labels, column_labels = _both_labels(labels, reference_labels, device)
        rows = _prepare(plan.prepare, embeddings, table, both_labels, plan)
        columns = None
        if references is not None:
            columns = _prepare(plan.column_prepare, references, table, both_labels, plan)
        # Without a matrix of pairs, norms and class labels suffice to check the batch. The host reads these checks
        # before it launches `bin_pairs`, so that it does not wait for the products.
        is_checked = not (plan.matrix or is_deferred() or _is_refused(table[plan.flags]))
        places = None
        if plan.places_shape:
            places = torch.empty(plan.places_shape, dtype=plan.places_dtype, device=device)
        column_units = (columns or rows).units
        plan.bin_pairs(rows.units, column_units, row_labels, column_labels, table, table if places is None else places)
        loss, slopes, checks = _finish(table, plan)
        if not is_checked:
            verify_or_defer(checks, _verify, s, embeddings, labels, references, reference_labels)
    return loss, Kept(rows, columns, slopes, places)


def backward_pass(
    upstream: Tensor,
    kept: Kept,
    labels: Tensor,
    reference_labels: Tensor | None,
    wanted: tuple[bool, bool],
    plan: Plan,
) -> list[Tensor | None]:
    """Return the gradients with respect to embeddings and references, each None if it is not wanted."""
    rows, columns = kept.rows, kept.columns or kept.rows
    with _on(plan.device):
        if kept.places is None:
            sums = _sums_of_blocks(kept, labels, reference_labels, wanted, plan)
        else:
            sums = _sums_of_places(kept, kept.places, wanted, plan)
        upstream = ready(upstream, plan.device)
        return [
            _through_norm(plan.through_norm, sums[0], rows, upstream, plan),
            _through_norm(plan.column_through_norm, sums[1], columns, upstream, plan),
        ]


def _sums_of_places(kept: Kept, places: Tensor, wanted: tuple[bool, bool], plan: Plan) -> list[Tensor | None]:
    """Return the gradients with respect to the unit rows of both inputs, (parts, rows, d), by the stored places."""
    rows, columns = kept.rows, kept.columns or kept.rows
    return [
        _multiply(plan.product, places, kept.slopes, columns) if wanted[0] else None,
        _multiply(plan.column_product, places, kept.slopes, rows) if wanted[1] else None,
    ]


def _multiply(product: Product, places: Tensor, slopes: Tensor, others: Side) -> Tensor:
    parts = torch.empty(product.shape, device=slopes.device)
    product.launch(places, slopes, others.units, parts)
    return parts


def _sums_of_blocks(
    kept: Kept, labels: Tensor, reference_labels: Tensor | None, wanted: tuple[bool, bool], plan: Plan
) -> list[Tensor | None]:
    """Return the gradients with respect to the unit rows of both inputs, (rows, d), from one block of slopes at a time.

    The first product for a row overwrites uninitialised memory (beta = 0). Autocast does not affect in-place products.
    """
    row_labels, column_labels = _both_labels(labels, reference_labels, plan.device)
    rows, columns = kept.rows.units, (kept.columns or kept.rows).units
    memory = torch.empty(plan.memory_shape, device=plan.device)
    by_rows = torch.empty_like(rows) if wanted[0] else None
    by_columns = by_rows if plan.within else torch.empty_like(columns) if wanted[1] else None
    precision = swap_cuda_precision("ieee")
    try:
        for launch, i, j, mirrored in plan.blocks:
            launch(rows, columns, row_labels, column_labels, kept.slopes, memory)
            found = _part(memory, slice(0, i.stop - i.start), slice(0, j.stop - j.start))
            if by_rows is not None:
                _part(by_rows, i).addmm_(found, _part(columns, j), beta=int(j.start > 0))
            if by_columns is not None and (mirrored or not plan.within):
                _part(by_columns, j).addmm_(found.T, _part(rows, i), beta=int(i.start > 0))
    finally:
        swap_cuda_precision(precision)
    return [by_rows, None if plan.within else by_columns]


def _part(x: Tensor, rows: slice, columns: slice | None = None) -> Tensor:
    """Return some rows and columns of x, and x itself for all of them: creating a view takes as long as a launch."""
    if rows.stop - rows.start < x.shape[0]:
        x = x[rows]
    return x if columns is None or columns.stop - columns.start == x.shape[1] else x[:, columns]


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _through_norm(launch: Launch, parts: Tensor | None, side: Side, upstream: Tensor, plan: Plan) -> Tensor | None:
    if parts is None:
        return None
    gradient = torch.empty(side.units.shape, dtype=plan.dtype, device=plan.device)
    launch(parts, side.units, side.scales, upstream, gradient)
    return gradient


def _prepare(launch: Launch, given: Tensor, table: Tensor, labels: tuple[Tensor, Tensor], plan: Plan) -> Side:
    given = ready(given, plan.device)
    units = torch.empty(given.shape, device=plan.device) if plan.is_copied else given
    scales = torch.empty(given.shape[0], dtype=torch.float64, device=plan.device)
    launch(given, units, scales, table, *labels)
    return Side(units, scales)


def _is_refused(flags: Tensor) -> bool:
    """Return whether the flags show an invalid batch: refused rows or entries, or no negative or no positive pair."""
    refused_rows, refused_pairs, some_negative, some_positive = flags.tolist()
    return bool(refused_rows or refused_pairs or not (some_negative and some_positive))


def _finish(table: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, slopes and checks: numbers of negative and positive pairs, refused rows, refused matrix entries."""
    loss, slopes = torch.empty((), device=plan.device), torch.empty(2 * plan.nodes + 1, device=plan.device)
    checks = torch.empty(4, dtype=torch.int64, device=plan.device)
    plan.finish(table, *plan.forms, loss, slopes, checks)
    return loss, slopes, checks


def ready(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device, contiguous, and beginning at a multiple of 16 bytes."""
    if x.device != device:
        x = x.to(device, non_blocking=True)
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _both_labels(labels: Tensor, reference_labels: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    labels = ready(labels, device)
    return labels, labels if reference_labels is None else ready(reference_labels, device)


@lru_cache(maxsize=8)
def bilinear_forms(s: LossSettings, device: torch.device) -> Tensor:
    """Return three matrices from which `finish_matrix` computes the loss and the slopes, float64 (3, nodes, nodes).

    Let n and p be the masses of the negative and positive pairs at the nodes by equation 2. The first matrix A gives
    the loss n' A p. The product of the second matrix and p gives the slopes of the negative pairs. The product of the
    third matrix and n gives the slopes of the positive pairs. `finish_matrix` divides the loss and the slopes by the
    product of the numbers of negative and positive pairs.
    """
    form = cost_matrix(s, device)
    if s.kernel != "triangular":
        kernel = kernel_matrix(s, device)
        form = kernel.T @ form @ kernel
    slopes = [form.diff(dim=0) / s.delta, form.diff(dim=1).T / s.delta]
    return torch.stack([form, *(torch.cat([x, x[-1:]]) for x in slopes)])  # s = 1 has the slope of the last interval


def _verify(
    checks: list[int],
    s: LossSettings,
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
) -> None:
    """Raise ValueError for an invalid batch. `checked_pairs` finds the invalid rows again, for the message."""
    negatives, positives, refused_rows, refused_pairs = checks
    if refused_rows or refused_pairs:
        checked_pairs(embeddings, labels, references, reference_labels, normalize=s.normalize)
    if (undefined := missing_pairs(negatives, positives)) and s.on_degenerate == "raise":
        raise ValueError(undefined)


def is_copied(dtype: torch.dtype, normalize: bool) -> bool:
    """Whether the unit rows are a copy; otherwise they are the embeddings."""
    return normalize or dtype != torch.float32


def places_shape(n: int, m: int) -> tuple[int, int] | None:
    """Return the shape of the stored places, padded to whole tiles; None if there are too many to store."""
    return (_filled(n), _filled(m)) if _filled(n) * _filled(m) <= KEPT_PAIRS else None


def places_dtype(nodes: int) -> torch.dtype:
    """Return the smallest integer dtype that can store all places."""
    return torch.int16 if 2 * nodes < 2**15 else torch.int32


def _filled(size: int) -> int:
    return _cdiv(size, FILL) * FILL


@lru_cache
def _programs(device: torch.device) -> int:
    """Return the number of Triton programs that occupy the GPU."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * PROGRAMS_PER_PROCESSOR


def _row_tile(depth: int) -> int:
    return 2048 // _chunk(depth)


def _chunk(size: int) -> int:
    """Return how many numbers of a vector a program handles at once: a power of two."""
    return min(1024, max(16, 1 << (size - 1).bit_length()))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on `device`: Triton always uses the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(device)


def _launch(name: str, grid: tuple[int, ...], tile: Tile | None, *arguments: Any, **constants: Any) -> Any:
    """Launch a kernel, and return the compiled kernel; None in Triton's interpreter. Constants must be in order."""
    from hloss.losses import triton_kernels  # needs Triton

    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    return getattr(triton_kernels, name)[grid](*arguments, **constants, **options)
