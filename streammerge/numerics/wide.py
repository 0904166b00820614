"""A compiler of numba that uses the widest vectors the CPU has."""

from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import BaseNativeLowering, NativeLowering


class _WideLower(Lower):
    """Asks LLVM for vectors of 512 bits, where it prefers 256 on CPUs that have both.

    LLVM's preference spares other code on the core the lower clock of wide instructions; kernels do nothing but work on
    vectors. Where the CPU has none that wide, the attribute changes nothing.
    """

    def setup_function(self, fndesc):
        super().setup_function(fndesc)
        # llvmlite checks names against a list of attributes without values.
        set.add(self.function.attributes, '"prefer-vector-width"="512"')


@register_pass(mutates_CFG=True, analysis_only=False)
class _WideLowering(BaseNativeLowering):
    _name = "wide_native_lowering"

    @property
    def lowering_class(self):
        return _WideLower


class WideCompiler(CompilerBase):
    """The passes of numba's compiler, with a lowering of its own."""

    def define_pipelines(self):
        """Return the one pipeline."""
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [
            (_WideLowering, told) if one is NativeLowering else (one, told) for one, told in pipeline.passes
        ]
        return [pipeline]
