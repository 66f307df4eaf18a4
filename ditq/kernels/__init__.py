"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and above, each beside its meaning in plain torch.

In reading order:

    storage.py      how a coded weight lies in GPU memory, so that a byte decodes into different tiles
    decoding.py     codes -> carriers in registers, four a byte permutation, with group multipliers exactly rounded
    matmul.py       the product: int8, FP8 or bfloat16 inputs with weights of 2, 3, 4 or 8 bits; scales, bias, branch at the end
    decode.py       a weight written out in full, for many tokens
    quantize.py     what stands in front of a product in one pass: norm and modulation or activation, transform, rounding
    tuning.py       which way a product runs: measured once a shape and GPU, each way first compared with its meaning
    product.py      the product in that way
    operators.py    both as operators of torch, whole to torch.compile
    fast_linear.py  what stands in a QuantLinear's place
    fast_experts.py what stands in the place of a mixture of experts: each of their linears as one kernel
    on_gpu.py       a whole model of them on a GPU, the rest in bfloat16
    answered_attention.py  windows, linear attention and the like, as an operator
    tiled_attention.py  chosen tiles of large pictures, without gathering their keys
    blocks.py       its blocks compiled each by itself, equal ones once
    traced.py       a block as one graph, in which inputs are quantized once, together with what makes them
    captured.py     its calls as CUDA graphs
    constants.py    what a model computes on the CPU in each call, kept on the GPU
    kernel_times.py what a call runs, and for how long

A QuantLinear's integers are the same here: sums of int8 products are exact. Nothing falls back: without a GPU, the operators
raise an error. docs/gpu.md says what was proven where.
"""
