"""The decode role: take in offered blocks, decode, and prefill locally when that is better or nothing else is alive.

It must not know the prefill role; the two meet only in the hand-over messages.
"""
