"""The oracle with products in bfloat16: the factors are rounded, everything else is float64."""

import ast
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np

from common import oracle

Array = np.ndarray


def rounded(array: Array) -> Array:
    """Round to float32, the dtype of the kernel's factors, and then to bfloat16."""
    return array.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def product(a: Array, b: Array) -> Array:
    """The product of the rounded matrices."""
    return rounded(a) @ rounded(b)


@cache
def rounding_oracle(inputs: bool = True) -> ModuleType:
    """The oracle with `product` in place of @.

    With inputs=False, the product of the inputs and its gradients are not rounded.
    """

    class Replace(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            has_inputs = node.name in ("_forward_direction", "_backward_direction")
            return node if has_inputs and not inputs else self.generic_visit(node)

        def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
            self.generic_visit(node)
            if not isinstance(node.op, ast.MatMult):
                return node
            return ast.Call(ast.Name("product", ast.Load()), [node.left, node.right], [])

    tree = ast.fix_missing_locations(Replace().visit(ast.parse(Path(oracle.__file__).read_text())))
    module = ModuleType("rounding_oracle")
    module.product = product
    sys.modules[module.__name__] = module  # dataclasses look up their module
    exec(compile(tree, oracle.__file__, "exec"), vars(module))
    return module
