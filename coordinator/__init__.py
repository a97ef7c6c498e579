"""The front door: HTTP/SSE and gRPC, tokenising, admission, routing, delivery, recovery.

It owns how a request ended. It must not know torch, the engine, or how KV blocks move.
"""
