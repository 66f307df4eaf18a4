"""Times, memory and errors of quantized denoisers on one GPU, beside what torch itself offers: bfloat16, FP8 and int8.

    python -m tools.bench_gpu                                  # blocks and products, minutes
    python -m tools.bench_gpu --shapes flux --only "bf16 compiled,w4a8" --no-products
    python -m tools.bench_gpu --shapes flux-4096 --no-products --rounds 5    # where attention is most of the time

It needs torch and Triton, nothing else of ditq's dependencies. Weights are generated, and rounded to the nearest level: errors
tell formats apart but say nothing of a recipe's quality.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch

from ditq.kernels.traced import Compiler, inductor
from tools.gpu_models import SHAPES
from tools.gpu_products import peaks, product_rows
from tools.gpu_rows import Row, rows


def main(arguments: list[str] | None = None) -> None:
    """Print what runs where, the measured peaks, the products' lines and the models' table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--shapes", default=",".join(name for name in SHAPES if not SHAPES[name].large), help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument("--only", default="", help="parts of variants' names, by commas; =NAME is that one alone")
    parser.add_argument(
        "--mode",
        default="max-autotune-no-cudagraphs",
        help="of torch.compile; `default` compiles in seconds, not minutes",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-products", action="store_true", help="leave the single products out")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the tool itself")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no NVIDIA GPU; --device cpu --small tries the tool itself")
    unknown = [name for name in given.shapes.split(",") if name not in SHAPES]
    if unknown:
        sys.exit(f"error: --shapes {','.join(unknown)}: choose from {', '.join(SHAPES)}")
    import triton

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"# {where}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    peak = peaks(device, 128 if given.small else 8192)
    for name, value in peak.items():
        print(f"# {name} product of torch: {2e-12 * value:.1f} TFLOP/s")
    if not given.no_products:
        widths = (
            [(8, 64, 64)]
            if given.small
            else [(4608, 12288, 3072), (4608, 3072, 12288), (4608, 3072, 3072), (2048, 4608, 1152)]
        )
        for line in product_rows(device, widths, given.rounds):
            print(line, flush=True)
    print(Row.HEAD, flush=True)
    inner: Compiler = inductor if device.type == "cuda" else (lambda graph, _: copy.deepcopy(graph).forward)
    for name in given.shapes.split(","):
        shape = SHAPES[name].small() if given.small else SHAPES[name]
        for row in rows(
            shape,
            device,
            [part.strip() for part in given.only.split(",") if part.strip()],
            peak,
            given.rounds,
            inner,
            given.mode,
        ):
            print(row, flush=True)


if __name__ == "__main__":
    main()
