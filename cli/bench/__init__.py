"""`baton bench`: a load generator for whatever speaks OpenAI's API, or Baton's gRPC, and what it makes of answers.

It knows nothing of Baton's parts: it measures from outside, as a client, and takes other servers as they are.
"""
