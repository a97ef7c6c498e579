"""Speculative decoding: who guesses the next tokens (`ngram`, `draft_model`), and how many are worth it (`policy`).

A guess is cheap to check: a step over several tokens of a sequence reads the weights once, as a step over one does. The
scheduler puts guesses at the end of a planned sequence, `engine.sampler.verify` keeps those that are what would have
been chosen anyway. So what stands here decides about time alone and never about a token. It knows no request beyond
`engine.plan.DraftRequest`.
"""
