"""Side-by-side measurement of ditq and other quantizers on the same weights, prompts and seeds: `python -m tools.peers`.

`row.py` says what a row of the table is; each file of `methods/` adds the rows of one peer. `bench.py` holds what all rows
share, `measure.py` runs one of them, `page.py` writes the table of docs/peers.md.
"""
