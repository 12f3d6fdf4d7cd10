"""`make coverage`: every model family of three libraries, pruned to half its MACs with random choices and proven exact.

`zoo` names the models, `one` does one model in a process of its own, `peers` does the same with other libraries in an
environment of their own, `__main__` runs all and writes the tables.
"""
