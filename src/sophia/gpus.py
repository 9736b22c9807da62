"""GPUs that a plan can be made for."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, as its maker's data sheet has it."""

    name: str
    """Its full name, and which data sheet."""
    memory_gb: float
    """Nominal memory. Drivers report about as many GiB, less one in a hundred."""
    bf16_tflops: float
    """Peak of dense bf16 matrix products with sums in fp32, in 10¹² operations a second; sparsity is not counted."""
    fp32_tflops: float
    """Peak of plain fp32, as PyTorch computes by default: without TF32."""


# Source: NVIDIA's data sheets (for GeForce and RTX A6000 its Ada and Ampere white papers), dense figures.
GPUS: Mapping[str, Gpu] = {
    "b200": Gpu(name="B200 SXM", memory_gb=180, bf16_tflops=2250, fp32_tflops=75),
    "h200": Gpu(name="H200 SXM", memory_gb=141, bf16_tflops=989, fp32_tflops=67),
    "h100": Gpu(name="H100 SXM 80 GB", memory_gb=80, bf16_tflops=989, fp32_tflops=67),
    "h100-pcie": Gpu(name="H100 PCIe 80 GB", memory_gb=80, bf16_tflops=756, fp32_tflops=51),
    "a100-80": Gpu(name="A100 80 GB", memory_gb=80, bf16_tflops=312, fp32_tflops=19.5),
    "a100-40": Gpu(name="A100 40 GB", memory_gb=40, bf16_tflops=312, fp32_tflops=19.5),
    "l40s": Gpu(name="L40S", memory_gb=48, bf16_tflops=362, fp32_tflops=91.6),
    "a6000": Gpu(name="RTX A6000", memory_gb=48, bf16_tflops=155, fp32_tflops=38.7),
    "a10": Gpu(name="A10", memory_gb=24, bf16_tflops=125, fp32_tflops=31.2),
    "l4": Gpu(name="L4", memory_gb=24, bf16_tflops=121, fp32_tflops=30.3),
    "4090": Gpu(name="GeForce RTX 4090", memory_gb=24, bf16_tflops=165, fp32_tflops=82.6),
    "3090": Gpu(name="GeForce RTX 3090", memory_gb=24, bf16_tflops=71, fp32_tflops=35.6),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ValueError: It is not in the table; the message names the nearest, or all.
    """
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? Others are" if near else "there are"
        raise ValueError(
            f"gpu {name!r} is not in the table; {hint} {', '.join(GPUS)}; or give --memory-gb and --peak-tflops"
        )
    return GPUS[name]
