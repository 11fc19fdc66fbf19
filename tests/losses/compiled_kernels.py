"""The fused kernels compiled ahead of time for GPUs that are not there: `test_fused` runs this as a program.

Each launch of a pass is compiled instead, with the types, constants and alignments it would have.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hloss import HistogramLoss
from hloss.losses import fused, passes, triton_kernels
from hloss.losses.checks import deferred_checks

CAPABILITIES = (80, 90)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.int8: "*i8",
}
compiled: set[str] = set()


def describe(kernel, arguments):
    """Types, constants and alignments as Triton finds them in the arguments of a launch."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        special = not kernel.params[i].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if special and not isinstance(value, torch.Tensor) and value == 1:
            signature[name], constants[name] = "constexpr", 1
        elif isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(name, grid, tile, *arguments, **constants):
    kernel = getattr(triton_kernels, name)
    assert kernel.arg_names[len(arguments) :] == list(constants)  # `_launch` gives them in order
    signature, ones, attributes = describe(kernel, arguments)
    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= ones
    key = str((name, signature, constants, attributes, options))
    if key in compiled:
        return
    compiled.add(key)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    for capability in CAPABILITIES:
        program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(program.asm["cubin"]) > 0
        assert program.metadata.shared <= SHARED_MEMORY[capability]
        print(f"{name} sm_{capability}: {program.metadata.shared} bytes of shared memory", flush=True)


def both_passes(n, d, m=None, dtype=torch.float32, matrix=False, **options):
    embeddings = torch.zeros(n, d, dtype=dtype, requires_grad=True)
    references = None if m is None else torch.zeros(m, d, dtype=dtype, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.int64)
    reference_labels = None if m is None else torch.zeros(m, dtype=torch.int64)
    if matrix:
        labels, reference_labels = torch.zeros(n, m or n, dtype=torch.int8), None
    with deferred_checks() as checks:
        fused.loss(embeddings, labels, references, reference_labels, HistogramLoss(**options).settings).backward()
        checks.pending.clear()


def main():
    passes._launch = compile_launch
    both_passes(256, 512)
    both_passes(1024, 512)
    both_passes(256, 500, m=40, dtype=torch.bfloat16, matrix=True, normalize=False)
    both_passes(100, 512, dtype=torch.float16, kernel="gaussian", bandwidth=2.0)
    fused.PRECISION = "ieee"
    both_passes(256, 512)
    fused.PRECISION = "tf32x3"
    passes.KEPT_PAIRS = 0
    both_passes(1024, 512, m=1000)
    assert {key.split("'")[1] for key in compiled} == {
        name
        for name, kernel in vars(triton_kernels).items()
        if isinstance(kernel, triton.JITFunction) and name[0] != "_"
    }


if __name__ == "__main__":
    sys.exit(main())
