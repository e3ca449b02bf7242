"""What the published bindings offer, and which of it our source uses, found by reading both.

`Surface` is the API list of one release. `check` walks a module's syntax tree and follows every
value of TensorRT's through it: from ``api.trt``, from parameters and variables annotated with a
name of `exporter.engine.tensorrt_names`, and through the return types in the bindings' signatures.
Each attribute read, written or called, each argument list and each overridden method is held
against the release. A function marked ``@needs(Capability.X)`` is walked only on releases that have
the name behind ``X``. An attribute of a TensorRT value whose class cannot be found out is a
problem too: nothing is skipped in silence.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from exporter.engine.capabilities import Capability

FOLDER = Path(__file__).parent
RELEASES = (
    "tensorrt-8.6.1",
    "tensorrt-10.3.0",
    "tensorrt-10.16",
    "tensorrt-11.4",
    "tensorrt_rtx-1.7.1",
)
ALIASES = {"IParserError": "ParserError", "IEngineInspector": "EngineInspector"}
OVERLOADED = {
    "Runtime.deserialize_cuda_engine": "ICudaEngine",
    "ICudaEngine.create_execution_context": "IExecutionContext",
}
"""What methods return whose signature the newer bindings do not print; 8.6.1 prints these."""

NAMES = {"Severity": "ILogger.Severity"}


@dataclass(frozen=True)
class Surface:
    """The API list of one release."""

    name: str
    library: str
    version: str
    classes: dict[str, dict[str, str]]
    enums: dict[str, list[str]]

    @classmethod
    def load(cls, name: str) -> Surface:
        content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        return cls(name=name, **content)

    def has(self, path: str) -> bool:
        """Whether the module has this dotted path."""
        first, _, rest = path.partition(".")
        members = self.classes.get(first, self.enums.get(first))
        return members is not None and (not rest or rest in members)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset(c for c in Capability if self.has(c.value))


@dataclass(frozen=True)
class Value:
    """What an expression is: ``kind`` says which sort, ``name`` the class, enum or method."""

    kind: str
    name: str = ""
    items: tuple[Value, ...] = ()


FOREIGN = Value("foreign")
UNKNOWN = Value("unknown")
MODULE = Value("module")
API = Value("api")


@dataclass(frozen=True)
class Use:
    """One attribute of TensorRT's in our source, such as ``IBuilderConfig.set_flag``."""

    path: str
    line: int
    end_column: int
    attribute: str


@dataclass
class Report:
    """What `check` found in one module for one release."""

    uses: list[Use] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def parameters(signature: str) -> tuple[list[str], int] | None:
    """Names of the parameters after self, and how many are required; None if it is not told."""
    match = re.match(r"\w+\((.*)\)(?: -> .*)?$", signature)
    if match is None or match[1].startswith("*args"):
        return None
    parts = [p.strip() for p in re.split(r",\s*(?![^\[]*\])", match[1]) if p.strip()][1:]
    required = sum("=" not in part for part in parts)
    return [part.split(":")[0].strip() for part in parts], required


def return_annotations(sources: dict[str, str]) -> dict[str, ast.expr]:
    """Return annotations of all top-level functions, by name."""
    return {
        node.name: node.returns
        for source in sources.values()
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    }


def check(source: str, surface: Surface, returns: dict[str, ast.expr]) -> Report:
    """Hold the module ``source`` against one release."""
    walker = _Walker(surface, returns)
    walker.block(ast.parse(source).body, {})
    return walker.report


class _Walker:
    def __init__(self, surface: Surface, returns: dict[str, ast.expr]) -> None:
        self.surface = surface
        self.returns = returns
        self.report = Report()

    def problem(self, node: ast.AST, text: str) -> Value:
        self.report.problems.append(f"{self.surface.name}, line {node.lineno}: {text}")
        return FOREIGN

    # Statements

    def block(self, statements: list[ast.stmt], env: dict[str, Value]) -> None:
        for statement in statements:
            self.statement(statement, env)

    def statement(self, node: ast.stmt, env: dict[str, Value]) -> None:
        if isinstance(node, ast.FunctionDef):
            self.function(node, env)
        elif isinstance(node, ast.ClassDef):
            self.subclass(node, env)
        elif isinstance(node, ast.AnnAssign):
            found = self.value(node.value, env) if node.value else FOREIGN
            declared = self.annotated(node.annotation)
            self.bind(node.target, found if declared is FOREIGN else declared, env)
        elif isinstance(node, ast.Assign):
            found = self.value(node.value, env)
            for target in node.targets:
                self.bind(target, found, env)
        elif isinstance(node, ast.For):
            self.bind(node.target, self.element(self.value(node.iter, env)), env)
            self.block(node.body + node.orelse, env)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self.statement(child, env)
                elif isinstance(child, ast.expr):
                    self.value(child, env)
                elif isinstance(child, (ast.ExceptHandler, ast.withitem)):
                    self.others(child, env)

    def others(self, node: ast.AST, env: dict[str, Value]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self.statement(child, env)
            elif isinstance(child, ast.expr):
                self.value(child, env)

    def function(self, node: ast.FunctionDef, env: dict[str, Value]) -> dict[str, Value]:
        """Walk the body; return what its names are in the end."""
        if not self.needed(node) <= self.surface.capabilities:
            return {}
        inner = dict(env)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            known = self.annotated(argument.annotation) if argument.annotation else FOREIGN
            inner[argument.arg] = MODULE if argument.arg == "trt" else known
        self.block(node.body, inner)
        return inner

    def needed(self, node: ast.FunctionDef) -> frozenset[Capability]:
        found = set()
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "needs":
                found |= {
                    Capability[a.attr] for a in decorator.args if isinstance(a, ast.Attribute)
                }
        return frozenset(found)

    def subclass(self, node: ast.ClassDef, env: dict[str, Value]) -> None:
        """A class of ours: what ``__init__`` leaves in ``self`` is known to the other methods."""
        env = dict(env)
        bases = [self.value(base, env) for base in node.bases]
        names = [base.name for base in bases if base.kind == "class"]
        for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
            if names and not method.name.startswith("_"):
                self.override(method, names[0])
            kept = self.function(method, env)
            if method.name == "__init__":
                env |= {name: v for name, v in kept.items() if name.startswith("self.")}

    def override(self, method: ast.FunctionDef, name: str) -> None:
        members = self.surface.classes[name]
        self.used(method, name, method.name)
        if method.name not in members:
            self.problem(method, f"{name} has no method {method.name} to override")
            return
        expected = parameters(members[method.name])
        if expected is not None and len(expected[0]) != len(method.args.args) - 1:
            self.problem(method, f"{name}.{method.name} takes {expected[0]}")

    def bind(self, target: ast.expr, found: Value, env: dict[str, Value]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = found
        elif isinstance(target, ast.Tuple):
            items = found.items or (FOREIGN,) * len(target.elts)
            for part, item in zip(target.elts, items, strict=False):
                self.bind(part, item, env)
        elif ast.unparse(target).startswith("self."):
            env[ast.unparse(target)] = found
        elif isinstance(target, ast.Attribute):
            stored = self.value(target, env)
            if stored.kind == "method":
                self.problem(target, f"{stored.name} is a method and cannot be set")

    # Types

    def annotated(self, node: ast.expr) -> Value:
        if isinstance(node, ast.BinOp):
            left = self.annotated(node.left)
            return self.annotated(node.right) if left is FOREIGN else left
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            items = tuple(self.annotated(part) for part in inner)
            return Value("items", node.value.id, items)
        if isinstance(node, ast.Name):
            return API if node.id == "Api" else self.named(NAMES.get(node.id, node.id))
        return FOREIGN

    def named(self, name: str) -> Value:
        name = ALIASES.get(name, name)
        if name in self.surface.classes:
            return Value("instance", name)
        return Value("member", name) if name in self.surface.enums else FOREIGN

    def element(self, found: Value) -> Value:
        return found.items[0] if found.kind == "items" and found.items else FOREIGN

    # Expressions

    def value(self, node: ast.expr, env: dict[str, Value]) -> Value:
        if isinstance(node, ast.Name):
            return env.get(node.id, FOREIGN)
        if isinstance(node, ast.Attribute):
            known = env.get(ast.unparse(node))
            return known or self.attribute(node, self.value(node.value, env))
        if isinstance(node, ast.Call):
            return self.call(node, env)
        if isinstance(node, ast.IfExp):
            self.value(node.test, env)
            body, other = self.value(node.body, env), self.value(node.orelse, env)
            return other if body is FOREIGN else body
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            inner = dict(env)
            for generator in node.generators:
                found = self.element(self.value(generator.iter, inner))
                self.bind(generator.target, found, inner)
                for condition in generator.ifs:
                    self.value(condition, inner)
            return Value("items", "list", (self.value(node.elt, inner),))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child, env)
            elif isinstance(child, ast.keyword):
                self.value(child.value, env)
        return FOREIGN

    def used(self, node: ast.AST, owner: str, attribute: str) -> None:
        path = f"{owner}.{attribute}".lstrip(".")
        end = node.end_col_offset if isinstance(node, ast.Attribute) else -1
        line = node.end_lineno if isinstance(node, ast.Attribute) else node.lineno
        self.report.uses.append(Use(path, line, end, attribute))

    def attribute(self, node: ast.Attribute, owner: Value) -> Value:
        name = node.attr
        if owner is API:
            return MODULE if name == "trt" else FOREIGN
        if owner is UNKNOWN:
            return self.problem(node, f"{ast.unparse(node)}: annotate the value before {name}")
        kinds = {
            "module": self.of_module,
            "class": self.of_class,
            "enum": self.of_enum,
            "member": self.of_member,
            "instance": self.of_instance,
        }
        return kinds[owner.kind](node, owner.name, name) if owner.kind in kinds else FOREIGN

    def of_class(self, node: ast.Attribute, owner: str, name: str) -> Value:
        nested = f"{owner}.{name}"
        if nested in self.surface.enums:
            return Value("enum", nested)
        return FOREIGN if name == "__init__" else self.of_instance(node, owner, name)

    def of_enum(self, node: ast.Attribute, owner: str, name: str) -> Value:
        self.used(node, owner, name)
        if name in self.surface.enums[owner]:
            return Value("member", owner)
        return self.problem(node, f"{owner} has no {name}")

    def of_member(self, node: ast.Attribute, owner: str, name: str) -> Value:
        self.used(node, owner, name)
        if name in ("name", "value"):
            return FOREIGN
        return self.problem(node, f"a {owner} has no {name}")

    def of_module(self, node: ast.Attribute, _owner: str, name: str) -> Value:
        if name.startswith("__"):
            return FOREIGN
        self.used(node, "", name)
        if name in self.surface.classes:
            return Value("class", name)
        if name in self.surface.enums:
            return Value("enum", name)
        return self.problem(node, f"the module has no {name}")

    def of_instance(self, node: ast.Attribute, owner: str, name: str) -> Value:
        self.used(node, owner, name)
        members = self.surface.classes[owner]
        if name not in members:
            return self.problem(node, f"{owner} has no {name}")
        return Value("method", f"{owner}.{name}") if members[name] else UNKNOWN

    def call(self, node: ast.Call, env: dict[str, Value]) -> Value:
        callee = self.value(node.func, env)
        arguments = [self.value(argument, env) for argument in node.args]
        for keyword in node.keywords:
            self.value(keyword.value, env)
        if callee.kind == "class":
            return Value("instance", callee.name)
        if callee.kind == "method":
            return self.result(node, callee.name)
        if callee is UNKNOWN:
            return self.problem(node, f"{ast.unparse(node.func)} is no method")
        if isinstance(node.func, ast.Name):
            if node.func.id == "getattr" and arguments[0] not in (FOREIGN,):
                dynamic_member = arguments[0].kind == "enum"
                return FOREIGN if dynamic_member else self.problem(node, "getattr on TensorRT")
            annotation = self.returns.get(node.func.id)
            return self.annotated(annotation) if annotation else FOREIGN
        return FOREIGN

    def result(self, node: ast.Call, method: str) -> Value:
        owner, name = method.rsplit(".", 1)
        signature = self.surface.classes[owner][name]
        if signature.partition("(")[2].startswith("*args"):
            return self.named(OVERLOADED.get(method, ""))
        expected = parameters(signature)
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if expected is None:
            return UNKNOWN
        names, required = expected
        given = [keyword.arg for keyword in node.keywords]
        if not set(given) <= set(names):
            self.problem(node, f"{method} takes {names}, not {given}")
        elif not starred and not required <= len(node.args) + len(given) <= len(names):
            self.problem(node, f"{method} takes {names}, given {len(node.args) + len(given)}")
        return self.named(signature.rpartition("-> ")[2].strip())
