"""What must be set before anything is imported."""

import os

# Triton decides at import whether its kernels are compiled for a GPU or interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")
