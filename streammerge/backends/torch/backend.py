"""The backends of torch formulas: the reference on the CPU, and GPUs."""

from __future__ import annotations

from streammerge.algebra.block import Block, BlockMath, operand_bytes
from streammerge.algebra.extent import Extent
from streammerge.backends.base import Backend, TensorFacts
from streammerge.backends.torch.gpu import (
    find_gpu,
    free_memory,
    free_unused,
    share_of_memory,
    synchronize,
    turn_on,
)
from streammerge.numerics.ordered_sum import BLOCK

BLOCK_ELEMENTS = 1 << 16
"""Number of elements per block for formulas that may be split anywhere, on the CPU."""


def torch_workspace(tensor: TensorFacts, n: int) -> int:
    """Return an upper bound, in bytes, of the temporaries of a formula on a block of `n` elements."""
    block = max(n, min(BLOCK_ELEMENTS, tensor.n_elements))
    return block * 8 * (2 * len(tensor.inputs) + 3 * len(tensor.fishers) + 12) + tensor.operator_bytes


def device_block(share: int, n_inputs: int) -> int:
    """Return the number of elements of blocks that fit in `share` bytes of a GPU's memory.

    A formula has up to ``2 * n_inputs + 12`` fp64 temporaries. A block has at most 16M elements, since larger blocks are
    not faster.
    """
    fit = share // (8 * (2 * n_inputs + 12))
    return max(1 << 12, min(1 << 24, fit // BLOCK * BLOCK))


def _workspace(tensor: TensorFacts, n: int, sees: Extent) -> int:
    return torch_workspace(
        tensor, tensor.line_length(sees) if sees == Extent.COLUMN else n
    )  # one row at a time suffices


def _math(block: Block, device: str, sees: Extent) -> BlockMath:
    from streammerge.backends.torch.math import TorchMath

    return TorchMath(block, device, 0 if sees == Extent.TENSOR else BLOCK_ELEMENTS)


def _gpu_workspace(tensor: TensorFacts, n: int, sees: Extent) -> int:
    """Return the bytes of temporaries in this process's memory: sums over one row. All others are in the GPU's."""
    return 72 * tensor.row_length if sees == Extent.ROW else 0


_FUSED_SHARE = 10
"""Times its inputs that a block needs of a GPU's memory for fused kernels: inputs, output, surviving entries, sorted rows."""


def _gpu_math(block: Block, device: str, sees: Extent) -> BlockMath:
    from streammerge.backends.fused.copied import Copied
    from streammerge.backends.fused.math import FusedMath
    from streammerge.backends.fused.tables import CODES
    from streammerge.backends.fused.triton_launcher import TritonLauncher, why_not_amd
    from streammerge.backends.torch.device_block import DeviceHooks
    from streammerge.backends.torch.math import TorchMath

    inputs = [*block.models, *(() if block.base is None else (block.base,))]
    share = share_of_memory(device)
    nbytes = sum(operand_bytes(operand, block.n) for operand in (*inputs, *block.fishers))
    keep = nbytes <= share // 2
    hooks = DeviceHooks(synchronize, free_unused)
    size = device_block(share - nbytes if keep else share, len(inputs))
    eager = TorchMath(block, device, 0 if sees == Extent.TENSOR else size, keep=keep, hooks=hooks)
    narrow = all(operand.dtype in CODES for operand in inputs)
    if narrow and nbytes * _FUSED_SHARE <= share and why_not_amd() is None:
        launcher = TritonLauncher(device)
        return FusedMath(block, launcher, Copied(block, launcher), lambda own: eager)
    return eager


TORCH = Backend("torch", reserve=400 << 20, workspace=_workspace, math=_math)
"""The reserve: that of `cpu`, and torch (CPU build)."""

CUDA = Backend(
    "cuda",
    reserve=1600 << 20,
    workspace=_gpu_workspace,
    math=_gpu_math,
    turn=turn_on,
    device="cuda",
    find=find_gpu,
    on_host=False,
    room=free_memory,
    rate=2.0,
)
"""The reserve: that of `torch`, and a CUDA context, whose libraries are resident. The rate: TIES on an H100 (1.9)."""
