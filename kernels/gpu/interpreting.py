"""How kernels learn that they are interpreted on a CPU instead of compiled for a GPU.

Triton's interpreter computes with numpy, which has no bfloat16 and no float8: arithmetic on them is silently wrong
there, while loads, stores and casts are right. So each kernel takes a constexpr `INTERPRETED`, and where it is set
casts what it loads to float32 first. Compiled kernels keep the narrow types, which tensor cores want.
"""

import os

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "y", "yes")
"""Read once, as Triton does: `triton.jit` decides while a kernel's module is imported."""
