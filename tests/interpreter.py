"""Triton's interpreter, quicker: what it makes anew at every operation is remembered, and its check of
integer overflow is one of NumPy's. What it computes stays as it is (test_interpreter.py)."""

from __future__ import annotations

import numpy as np

REPLACED: list[tuple[object, str, object]] = []
"""Holder, name and original of each that `quicken` replaced."""


def quicken() -> None:
    """Does nothing where there is no Triton, or one that goes about it otherwise."""
    try:
        from triton import language
        from triton.language import semantic
        from triton.runtime import interpreter

        replaced = (
            (interpreter, "_patch_lang", _replace_the_language_once_a_kernel(interpreter, language)),
            (interpreter, "_get_np_dtype", _remember_numpy_types(interpreter._get_np_dtype)),
            (language.core.block_type, "__init__", _remember_shapes(language.core)),
            (language.core.tensor, "__init__", _remember_shapes_of_tensors(language.core)),
            (semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", _overflow_by_numpy),
        )
        originals = [(holder, name, getattr(holder, name)) for holder, name, _ in replaced]
    except (ImportError, AttributeError):
        return
    REPLACED.extend(originals)
    for holder, name, function in replaced:
        setattr(holder, name, function)


def _replace_the_language_once_a_kernel(interpreter, language):
    """The interpreter replaces the functions of triton.language at every call of a helper, where the kernel that calls
    it has replaced them already."""
    replace, nothing = interpreter._patch_lang, interpreter._LangPatchScope
    in_use: dict[int, set[int]] = {}  # modules that a function's file calls triton.language
    replaced: set[int] = set()

    def replace_once(function):
        names = function.__globals__
        if id(names) not in in_use:
            in_use[id(names)] = {id(x) for x in names.values() if x is language or x is language.core}
        modules = in_use[id(names)]
        if modules <= replaced:
            return nothing()
        scope = replace(function)
        replaced.update(modules)
        restore = scope.restore

        def restore_all():
            restore()
            replaced.clear()

        scope.restore = restore_all
        return scope

    return replace_once


def _remember_numpy_types(numpy_type):
    known = {}

    def remembered(dtype):
        key = (type(dtype), dtype.name)
        if key not in known:
            known[key] = numpy_type(dtype)
        return known[key]

    return remembered


def _remember_shapes(core):
    begin, known = core.block_type.__init__, {}

    def remembered(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            begin(self, element_ty, shape)
            known[key] = (self.shape, self.numel, self.name)
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    return remembered


def _remember_shapes_of_tensors(core):
    begin, known = core.tensor.__init__, {}

    def remembered(self, handle, type):
        shape = type.shape if type.is_block() else None
        found = known.get(id(shape))
        if found is None:
            begin(self, handle, type)
            known[id(shape)] = (self.shape, self.numel, shape)  # and holds the shape, so that none other has its id
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel, _ = found

    return remembered


def _overflow_by_numpy(self, lhs, rhs, binary_op):
    """Triton's own is a dozen interpreted operations for each addition."""
    scalar = lhs.type.scalar
    if scalar.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
    found = operation(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    if found.size and (found.max() > scalar.get_int_max_value() or found.min() < scalar.get_int_min_value()):
        raise AssertionError(f"int{scalar.int_bitwidth} overflow detected for operation {binary_op.__name__}")
