"""Ways to copy blocks out of a peer's pool, behind one interface (`base.py`)."""
