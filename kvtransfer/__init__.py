"""Moving KV blocks between processes: shared memory, lanes, leases, offers and their intake.

It must not know requests: a hand-over is an opaque id and a row of blocks.
"""
