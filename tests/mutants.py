"""Break ``ppo_kit/functional`` in every small way and see whether ``tests/functional`` notices.

    python tests/mutants.py             # every module
    python tests/mutants.py kl value

A mutant changes one operator, comparison, constant, keyword, branch, selection or check in a copy of the
package in a temporary folder, never the working tree. Each runs in a forked process, the module's own test
file first and then the whole folder, until a test fails. Survivors are listed with their line; some are
equivalent to the original (they change no result), and the rest are missing tests.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("ppo_kit", "functional")
TESTS = {
    "checks": ("policy", "advantages"),
    "entropy": ("entropy", "policy"),
    "sequence_policy": ("policy",),
}
SECONDS_PER_MUTANT = 60  # some mutants loop forever

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr}
NAMES = {
    "maximum": "minimum", "minimum": "maximum", "expm1": "exp", "exp": "expm1", "any": "all",
    "masked_mean": "masked_sum", "masked_sum": "masked_mean", "sum": "mean",
    "ones_like": "zeros_like", "zeros_like": "ones_like",
}  # fmt: skip
KEYWORDS = {"min": "max", "max": "min", "low": "high", "high": "low"}
UNWRAPPED = {"detach", "abs", "square", "sqrt", "rsqrt", "floor", "clamp", "flip", "double"}


def mutants_of(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """What to put in place of ``node``; None deletes a statement."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]]
            yield "comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp):
        yield "sign", node.operand
    elif isinstance(node, ast.BoolOp):
        yield "and/or", ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.IfExp):
        yield "branch", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If):
        yield "branch", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "constant", ast.Constant(node.value + 1)
        if isinstance(node.value, float) and node.value:
            yield "constant", ast.Constant(node.value * 1.5)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "check deleted", None
    elif isinstance(node, ast.Call):
        yield from mutants_of_call(node)


def mutants_of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in NAMES:
        changed = copy.deepcopy(node)
        setattr(changed.func, "attr" if isinstance(node.func, ast.Attribute) else "id", NAMES[name])
        yield f"{name} -> {NAMES[name]}", changed
    if name == "where":
        yield "where swapped", ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)
    if name == "zero_masked":
        yield "mask dropped", node.args[0]
    if name in UNWRAPPED and isinstance(node.func, ast.Attribute):
        yield f"{name} dropped", node.func.value
    for i, keyword in enumerate(node.keywords):
        if keyword.arg in KEYWORDS:
            changed = copy.deepcopy(node)
            changed.keywords[i].arg = KEYWORDS[keyword.arg]
            yield f"{keyword.arg}= -> {KEYWORDS[keyword.arg]}=", changed


class Mutator(ast.NodeTransformer):
    """Number every mutant of a module; with ``chosen``, put that one in place."""

    def __init__(self, chosen: int | None = None) -> None:
        self.chosen = chosen
        self.found: list[tuple[int, str]] = []

    def visit(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.arg)):
            return node
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return node  # a docstring
        for what, replacement in mutants_of(node):
            self.found.append((getattr(node, "lineno", 0), what))
            if self.chosen == len(self.found) - 1:
                return replacement and ast.copy_location(replacement, node)
        if isinstance(node, ast.FunctionDef):
            returns, node.returns = node.returns, None
            node = self.generic_visit(node)
            node.returns = returns
            return node
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                node.value = self.visit(node.value)
            return node
        return self.generic_visit(node)


def run_tests(*paths: str) -> int:
    import pytest

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", *paths]))


def survives(module: str) -> bool:
    """Whether every test passes, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS_PER_MUTANT)
        own = [f"tests/functional/test_{name}.py" for name in TESTS.get(module, (module,))]
        os._exit(run_tests(*own) or run_tests("tests/functional"))
    return os.waitpid(pid, 0)[1] == 0


def main(modules: list[str]) -> None:
    import torch
    from hypothesis import Phase, settings

    torch.set_num_threads(1)
    settings.register_profile(
        "mutants", phases=[Phase.explicit, Phase.generate]
    )  # a failure needs no shrinking
    settings.load_profile("mutants")
    start, total, survivors = time.time(), 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (PACKAGE, Path("tests", "functional")):
            shutil.copytree(ROOT / path, folder / path, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (Path("ppo_kit", "__init__.py"), Path("pyproject.toml")):
            shutil.copy(ROOT / path, folder / path)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        if run_tests("tests/functional"):
            raise SystemExit("the tests fail without a mutant")
        # The forks inherit what that run imported and compiled, but for the package: a compiled module could
        # hide a mutant that was written within the same second.
        for loaded in [name for name in sys.modules if name.split(".")[0] in ("ppo_kit", "tests")]:
            del sys.modules[loaded]
        shutil.rmtree(PACKAGE / "__pycache__", ignore_errors=True)
        sys.dont_write_bytecode = True
        for module in modules or sorted(path.stem for path in (ROOT / PACKAGE).glob("[a-z]*.py")):
            target = PACKAGE / f"{module}.py"
            source = target.read_text(encoding="utf-8")
            everything = Mutator()
            everything.visit(ast.parse(source))
            alive = 0
            for i, (line, what) in enumerate(everything.found):
                mutated = ast.fix_missing_locations(Mutator(chosen=i).visit(ast.parse(source)))
                target.write_text(ast.unparse(mutated), encoding="utf-8")
                if survives(module):
                    alive += 1
                    survivors.append(f"{module}.py:{line}: {what}: {source.splitlines()[line - 1].strip()}")
                    print("survived", survivors[-1], flush=True)
            target.write_text(source, encoding="utf-8")
            total += len(everything.found)
            print(f"{module}: {len(everything.found) - alive} of {len(everything.found)} killed", flush=True)
    killed = total - len(survivors)
    print(f"{killed} of {total} killed ({killed / max(total, 1):.1%}) in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
