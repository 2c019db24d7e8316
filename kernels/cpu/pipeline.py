"""How Numba compiles kernels: its own pipeline, less what no kernel needs.

By itself Numba optimises each function and makes machine code of it before another one takes it in. Helpers are called by kernels only:
what they are made of is optimised within the kernel, once, and nothing but kernels becomes machine code. Nor does any of it reach
Numba's execution engine.

This is made of Numba's inner parts. A version that is not known here compiles with its own pipeline, and takes longer.
"""

from __future__ import annotations

from typing import Any

from numba import njit, version_info
from numba.core import cgutils
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering

from . import operators  # noqa: F401 (Numba knows of them from here on)


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """A function in LLVM's language, with those that it calls.

    Its function passes stay as Numba has them: without them a gated product of 12 tokens took 6 to 16 % longer.
    """

    def _optimize_final_module(self) -> None:
        """Left to `machine_code`, where a helper is optimised as part of its kernel."""

    def _finalize_final_module(self) -> None:
        self._verify_declare_only_symbols()
        self._finalized = True

    def machine_code(self) -> bytes:
        super()._optimize_final_module()
        self._final_module.verify()
        return bytes(self._codegen._tm.emit_object(self._final_module))


class _Lower(Lower):  # type: ignore[misc]
    """Without the places of variables for debuggers: to know a variable's size, Numba has LLVM read a module."""

    def setup_function(self, fndesc: Any) -> None:
        """Vectors that registers have no room for shall lie in one line of the cache each: the stack that a thread brings is aligned to 16
        bytes, and LLVM makes the best of that.
        """
        super().setup_function(fndesc)
        self.function.attributes.add("nounwind")  # with this set empty, llvmlite forgets the alignment
        self.function.attributes.alignstack = 64

    def alloca_lltype(self, name: str, lltype: Any, datamodel: Any = None) -> Any:
        return cgutils.alloca_once(self.builder, lltype, name=name, zfill=False)

    def storevar(self, value: Any, name: str, argidx: int | None = None) -> None:
        super().storevar(value, name)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):  # type: ignore[misc]
    """To LLVM's language, and no further."""

    _name = "kernel_lowering"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        state.library.finalize()
        # Numba knows a function by its entry point, which has to be a built-in one. This one does nothing, and nobody calls it.
        entry_point = [].clear
        state.targetctx.insert_user_function(entry_point, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=entry_point)
        return True


_NOT_NEEDED = {
    "AnnotateTypes",
    "DumpParforDiagnostics",
    "FindLiterallyCalls",
    "GenericRewrites",
    "IRLegalization",
    "InlineClosureLikes",
    "InlineInlinables",
    "LiteralPropagationSubPipelinePass",
    "LiteralUnroll",
    "MakeFunctionToJitFunction",
    "NoPythonSupportedFeatureValidation",
    "NopythonRewrites",
    "RewriteDynamicRaises",
    "WithLifting",
}
"""Passes for what kernels do not contain: closures, `with`, exceptions, arrays, objects to be counted, constants to index or to raise to
a power; and for reports and checks."""


class _Passes(PassManager):  # type: ignore[misc]
    _ENFORCING = False  # it would analyse the whole function anew after each pass


class _TypingContext:
    """Numba's, for one function: it goes over all calls until no type changes, and here finds those that it has typed before."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._signatures: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def resolve_function_type(self, function: Any, arguments: Any, keywords: Any) -> Any:
        call = (function, tuple(arguments), tuple(keywords.items()))
        if call not in self._signatures:
            self._signatures[call] = self._context.resolve_function_type(function, arguments, keywords)
        return self._signatures[call]


class _Compiler(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        self.state.typingctx = _TypingContext(self.state.typingctx)
        passes = _Passes("kernel")
        for step, text in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            if step.__name__ not in _NOT_NEEDED:
                passes.add_pass(_Lowering if step is NativeLowering else step, text)
        passes.finalize()
        return [passes]


_KNOWN = (0, 61) <= version_info.short <= (0, 68)

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    **({"pipeline_class": _Compiler} if _KNOWN else {}),
}


def compile_function(function: Any, signature: Any) -> tuple[str, bytes]:
    """The symbol and the object file of a kernel."""
    compiled = njit(signature, **OPTIONS)(function)
    (result,) = compiled.overloads.values()
    library = result.library
    return result.fndesc.llvm_func_name, library.machine_code() if _KNOWN else library._get_compiled_object()
