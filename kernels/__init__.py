"""The arithmetic that models need beside matrix products, each with its plain torch reference.

This file imports nothing: `import transformers` executes any top-level `kernels` package it finds.
"""
