"""Whose a call is, what its owner may do, what it got, and what of that is written down.

1. `gate.py` lets no call in without a key that is good for it (`keys.py`: the file behind `--keys`), and says for the
   rest of the call who makes it (`caller.py`).
2. Before a request is started its tenant's limits are asked (`accounts.py`, `buckets.py`). What the request is given
   from its tenant, salt, weight and priority, goes with it into every attempt.
3. When it ends, what was delivered is counted and written to the audit log (`audit.py`), once.

Without `--keys` everybody is `caller.ANYBODY`, who may do everything.
"""
