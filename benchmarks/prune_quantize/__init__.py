"""Pruned, then quantized, in one flow: a sample of the zoo, each saved, reloaded in a fresh process and compared.

`python -m benchmarks.prune_quantize` runs the sample, `.one` one model, `.again` is the fresh process, `.table` writes
the page.
"""
