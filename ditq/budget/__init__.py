"""Mixed precision by a budget: which linear gets how many bits, so that the model stays within a size or a quality.

request.py      what is asked for: `size=4.2MB`, `bits=3.5`, `psnr>=24`, `attention_macs=0.3`
attention.py    the last of these, which is no matter of bits: the pass that converts attentions chooses (passes/placement.py)
choices.py      every linear in every candidate format, with what it takes on disk
cost.py         what each of these costs in the end: along_trajectory.py in the last latents, all steps together,
                sensitivity.py in the answers of single calls, where the sampler is none of linear steps
front.py        assignments of least error (numerics/knapsack.py) over all sizes
search.py       the smallest of them whose pictures are good enough; pictures.py draws them
fit.py          all of it: a recipe and a budget -> a plain recipe with rules
"""

from ditq.budget.request import Budget

__all__ = ["Budget"]
