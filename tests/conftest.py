"""What must be set before anything is imported."""

import os

from hypothesis import settings

# Triton decides at import whether its kernels are compiled for a GPU or interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says how busy the machine is; what is tried is the same every time.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
