"""Pruned, then quantized, in one flow: a sample of the zoo, each saved, reloaded in a fresh process and compared.

`python -m benchmarks.prune_quantize` runs the sample, `.one` is one model, `.table` writes the page.
"""
