"""Triton's interpreter without work that it does over and over, half of a test's time."""

from __future__ import annotations

from functools import cache
from typing import Any


def make_faster() -> None:
    """Patches `triton.language` once a launch, not member by member in every call of a helper."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # of another release, which may do it in another way
    find = interpreter._get_np_dtype
    of_number = cache(find)

    def in_numpy(dtype: Any) -> Any:
        kind = dtype.scalar
        return find(kind) if kind.is_ptr() else of_number(kind)  # a pointer's has no hash

    interpreter._get_np_dtype = in_numpy
    patch_all = interpreter._patch_lang
    patched: set[Any] = set()  # modules, by the launch that is under way

    @cache
    def modules_of(function: Any) -> set[Any]:
        return {m for m in (tl, tl.core) if any(m is v for v in function.__globals__.values())}

    def patch(function: Any) -> Any:
        modules = modules_of(function)
        if patched and modules <= patched:
            return None  # only a launch restores what it patched
        scope = patch_all(function)
        if not patched:
            restore = scope.restore

            def restore_all() -> None:
                restore()
                patched.clear()

            scope.restore = restore_all
        patched.update(modules)
        return scope

    interpreter._patch_lang = patch
