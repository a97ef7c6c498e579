"""The prefill role: compute a prompt's KV, offer its blocks while computing, send the first token.

It must not know the decode role; the two meet only in the hand-over messages.
"""
