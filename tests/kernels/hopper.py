"""Compiles launches for an H100 where there is none: what the interpreter accepts, a compiler may refuse.

Run in a process of its own with TRITON_INTERPRET=0, as `python -m tests.kernels.hopper`: triton decides at import.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 227 * 1024
"""Bytes that one program can have."""
ELEMENTS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


class Compiled(NamedTuple):
    name: str
    ptx: str
    shared_bytes: int


@contextmanager
def compiled_launches() -> Iterator[list[Compiled]]:
    """While it lasts, kernels are compiled instead of launched, specialised as `triton.jit` does it."""
    launches: list[Compiled] = []

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False))
        given |= {name: options.pop(name) for name in self.arg_names if name in options}
        unspecialised = {param.name for param in self.params if param.do_not_specialize}
        signature, constants, hints = {}, {}, {}
        for index, name in enumerate(self.arg_names):
            value = given[name]
            constant = self.params[index].is_constexpr or (
                name not in unspecialised and isinstance(value, int) and value == 1
            )
            signature[name] = "constexpr" if constant or value is None else _type_of(value)
            if signature[name] == "constexpr":
                constants[(index,)] = value
            elif name not in unspecialised and _divides(value):
                hints[(index,)] = [["tt.divisibility", 16]]
        kernel = compile(
            ASTSource(self, signature, constants, hints), target=GPUTarget("cuda", 90, 32), options=options
        )
        launches.append(Compiled(self.__name__, kernel.asm["ptx"], kernel.metadata.shared))

    original: Callable[..., Any] = JITFunction.run
    JITFunction.run = compile_launch
    try:
        yield launches
    finally:
        JITFunction.run = original


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + ELEMENTS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _divides(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def main() -> None:
    from kernels.gpu.cases import AttentionCase, inputs, run

    decode, prefill, short = (1, 1, 1), (40, 1, 1), (100, 16, 1)
    with compiled_launches() as launches:
        for case in (
            AttentionCase((600, 16, 1), decode),
            AttentionCase((600, 16, 1), prefill),
            AttentionCase((600, 16, 1), decode, fp8_cache=True, window=300, soft_cap=20.0),
            AttentionCase((600, 16, 1), prefill, fp8_cache=True, window=300, soft_cap=20.0),
            AttentionCase(short, decode, head_dim=80, group=7, dtype=torch.float16),
            AttentionCase(short, prefill, head_dim=80, group=7, dtype=torch.float16),
        ):
            run(case, inputs(case, "cpu"))
    for launch in launches:
        instructions = [name for name in ("wgmma", "mma.sync", "cp.async.cg") if name in launch.ptx]
        print(launch.name, launch.shared_bytes, *instructions)


if __name__ == "__main__":
    main()
