"""Compile the Triton kernels for an H100, on any machine: prints what each needs, as JSON.

Run by test_triton.py in a process without TRITON_INTERPRET; `--all` compiles every tile that the
tuner may choose, which takes minutes, and needs no GPU either.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_switch_sae.ops.triton import adam as triton_adam
from hf_switch_sae.ops.triton import deviations as triton_deviations
from hf_switch_sae.ops.triton import kernels
from hf_switch_sae.ops.triton import launch as triton_launch
from hf_switch_sae.ops.triton import rows as triton_rows
from hf_switch_sae.ops.triton import sums as triton_sums

TYPES = dict.fromkeys(("rows_ptr", "ids_ptr", "offsets_ptr", "order_ptr", "begins_ptr"), "i64")
TYPES |= {"keys_ptr": "i16", "parts_ptr": "fp32"}
TYPES |= {"counts_ptr": "u8", "mean_ptr": "fp32"}
TYPES |= dict.fromkeys(("step_ptr", "scale_ptr", "lr_ptr"), "fp32")
NUMBERS = dict.fromkeys(("lr", "log_beta1", "log_beta2", "keep1", "keep2", "eps"), "fp32")
SHIFT = {"bf16": 16, "fp32": 0}


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], **options: Any) -> dict[str, Any]:
    options |= triton_launch._FUSED
    kernel = kernel if isinstance(kernel, triton.JITFunction) else kernel.fn  # the tuner's
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{TYPES.get(name, dtype)}"
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = NUMBERS.get(name, "i32")
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"shared": built.metadata.shared, "wgmma": "wgmma.mma_async" in built.asm["ptx"]}


def products(dtype: str, tile: tuple[int, ...], d: int = 768) -> dict[str, Any]:
    rows, cols, depth, warps, stages = tile
    shape = {"E": 16, "m": 1536, "d": d, "EXPERTS": 16, "HAS_ROWS": True, "HAS_BIAS": True}
    blocks = {"BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": depth, "GROUP": 8}
    constants = {**shape, **blocks, "WIDEN": False}
    return compiled(kernels._expert_products, dtype, constants, num_warps=warps, num_stages=stages)


def sums(tile: tuple[int, ...]) -> dict[str, Any]:
    rows, cols, depth, warps, stages = tile
    blocks = {"BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": depth, "GROUP": 8}
    constants = {"E": 16, "m": 1536, "d": 768, "WIDEN": False, **blocks}
    kernel = triton_sums._expert_sums
    return compiled(kernel, "bf16", constants, num_warps=warps, num_stages=stages)


def main() -> None:
    report = {}
    everything = "--all" in sys.argv
    tiles = {"bf16": kernels.TILES_16BIT, "fp32": kernels.TILES_32BIT}
    for dtype in ("bf16", "fp32"):
        for tile in tiles[dtype] if everything else tiles[dtype][1:2]:
            report[f"expert_products {dtype} {tile}"] = products(dtype, tile)
        row = {"m": 1536, "k": 32, "SHIFT": SHIFT[dtype], "BLOCK": 2048, "SLOTS": 32}
        report[f"relu_topk {dtype}"] = compiled(kernels._relu_topk, dtype, row, num_warps=4)
        tiles_of_rows = {
            "gather_sum": triton_rows._whole_rows(768),
            "row_dots": {"BLOCK_K": 16, "BLOCK_D": 256},
            "scatter_sum": {"WINDOW": triton_rows.WINDOW, **triton_rows._whole_rows(768)},
            "long_sums": {"WINDOW": triton_rows.WINDOW, **triton_rows._whole_rows(768)},
        }
        for name, tile in tiles_of_rows.items():
            options = {"num_warps": tile.pop("num_warps")} if "num_warps" in tile else {}
            sizes = {"k": 32, "d": 768, **tile}
            kernel = getattr(triton_rows, f"_{name}")
            report[f"{name} {dtype}"] = compiled(kernel, dtype, sizes, **options)
        spread = {"k": 32, "m": 1536, "BLOCK": 1024}
        report[f"spread {dtype}"] = compiled(triton_sums._spread, dtype, spread)
        rows = {"d": 768, "COUNTED": True, "ROWS": triton_deviations.ROWS, "STEP": 8, "BLOCK": 256}
        for name in ("column_sums", "squared_sums", "scaled_errors"):
            given = {"HAS_HAT": True, "HAS_MEAN": True} if name == "squared_sums" else {}
            kernel = getattr(triton_deviations, f"_{name}")
            report[f"{name} {dtype}"] = compiled(kernel, dtype, {**rows, **given})
        row = {"d": 768, "BLOCK": 1024, "LR_AT": False, "UNIT_ROWS": True}
        report[f"adam_rows {dtype}"] = compiled(triton_adam._adam_rows, dtype, row, num_warps=4)
    for tile in triton_sums.TILES if everything else triton_sums.TILES[:1]:
        report[f"expert_sums bf16 {tile}"] = sums(tile)
    print(json.dumps(report, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
