"""The oracle with products in bfloat16: their factors are rounded, all else is float64."""

import ast
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np

from common import oracle

Array = np.ndarray


def low(array: Array) -> Array:
    """To float32, which is what the kernel rounds, then to bfloat16."""
    return array.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def product(a: Array, b: Array) -> Array:
    """The product of the rounded matrices."""
    return low(a) @ low(b)


@cache
def rounding_oracle(inputs: bool = True) -> ModuleType:
    """The oracle with `product` wherever it says @; but for the product of the inputs, and for its
    gradients, if that is not wanted."""

    class Replace(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            of_inputs = node.name in ("_forward_direction", "_backward_direction")
            return node if of_inputs and not inputs else self.generic_visit(node)

        def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
            self.generic_visit(node)
            if not isinstance(node.op, ast.MatMult):
                return node
            return ast.Call(ast.Name("product", ast.Load()), [node.left, node.right], [])

    tree = ast.fix_missing_locations(Replace().visit(ast.parse(Path(oracle.__file__).read_text())))
    module = ModuleType("rounding_oracle")
    module.product = product
    sys.modules[module.__name__] = module  # for its dataclasses
    exec(compile(tree, oracle.__file__, "exec"), vars(module))
    return module
