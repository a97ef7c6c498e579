"""Places that keep KV blocks beyond a worker's pool: blocks go in by name and come back checked, or are a miss.

A tier knows neither requests nor the meaning of a block, and it never raises for what a disk or a peer does: the
caller computes again whatever is missing.
"""
