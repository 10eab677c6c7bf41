"""What a public docstring must say, checked against the code that it describes."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

PACKAGE = "levelhead"
# There Any stands for a tensor, an array or nested lists, and each function has an example.
ARRAYS = ("levelhead.calibration", "levelhead.objectives")
# What begins so implements a formula of a paper, or measures what one is about.
OF_PAPERS = (
    *ARRAYS,
    "levelhead.ops.api.",
    "levelhead.ops.topk.linear_topk",
    "levelhead.integrations.inductor.inductor_options",
    "levelhead.integrations.patch.api.patch_model",
    "levelhead.scoring.",
    "levelhead.integrations.transformers.CalibrationCallback",
)

SECTIONS = ("Args", "Attributes", "Example", "Raises", "References", "Returns", "Shape", "Yields")
_DIMENSION = r"(?:\.\.\.|\d|[A-Zk](?: \+ 1)?)"
SHAPE = re.compile(
    rf"\(\)|\(\.\.\.\)|\({_DIMENSION},(?: {_DIMENSION},?)*\)"  # (), (...), (N,), (..., D), (B + 1,)
    r"|0-dim|\bscalar\b|[Ss]ame shape|[Ss]hape of\b"
)
DTYPE = re.compile(r"\b(?:float|int)(?:16|32|64)\b|\bbool\b|[Dd]type of\b|\binteger")
SEE = re.compile(r"\b(?:[Aa]s|[Aa]s in|[Aa]s of|[Ss]ee) (?::func:)?`([\w.]+)`")
IN_NATS = re.compile(r"entropy|likelihood|log_prob|logsumexp|(?<!ece_)loss|margin")
PAPER = re.compile(r"[A-Z]\w+.*(?:\b(?:19|20)\d\d\b|\d{4}\.\d{5})", re.DOTALL)


class Public(NamedTuple):
    """A public function, class or member of a class; the function itself, for a property its getter."""

    name: str
    code: Any
    owner: type | None = None

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.code.__doc__ or "")

    @property
    def is_property(self) -> bool:
        return self.owner is not None and isinstance(
            inspect.getattr_static(self.owner, self.code.__name__), property
        )


def public(modules: Iterable[ModuleType]) -> list[Public]:
    """What modules export, in `__all__` or else by defining it, with the members of the classes."""
    found: dict[Any, Public] = {}
    for module in modules:
        own = [name for name, value in vars(module).items() if _defined_in(module, value)]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found.setdefault(value, Public(f"{module.__name__}.{name}", value))
    for named in [item for item in found.values() if inspect.isclass(item.code)]:
        for name, member in _members(named.code).items():
            found.setdefault(member, Public(f"{named.name}.{name}", member, named.code))
    return list(found.values())


def _defined_in(module: ModuleType, value: Any) -> bool:
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    return is_code and value.__module__ == module.__name__ and value.__name__[0] != "_"


def _members(cls: type) -> dict[str, FunctionType]:
    found = {}
    for base in cls.__mro__:
        if not base.__module__.startswith(PACKAGE):
            continue
        for name, member in vars(base).items():
            code = getattr(member, "fget", getattr(member, "__func__", member))
            if inspect.isfunction(code) and (name == "__call__" or name[0] != "_"):
                found.setdefault(name, code)
    return found


@cache
def sections(doc: str) -> dict[str, str]:
    """Each section, by name, without its indentation; it ends before the first line without."""
    _, *found = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    texts = (re.split(r"^(?=\S)", text, maxsplit=1, flags=re.MULTILINE)[0] for text in found[1::2])
    return dict(zip(found[::2], map(inspect.cleandoc, texts), strict=True))


def entries(doc: str, section: str) -> dict[str, str]:
    """The named entries of a section: of an argument, an attribute, an error."""
    found = {}
    for entry in re.split(r"\n(?=\S)", sections(doc).get(section, "")):
        names, colon, text = entry.partition(":")
        if colon:
            found |= {name.strip(" *"): text.strip() for name in names.split(",")}
    return found


def problems(item: Public, named: dict[str, Public] | None = None) -> list[str]:
    """Everything that a public docstring lacks, or says of what is not there.

    `named` holds what a docstring may refer to, by its last name.
    """
    named = named or {}
    found = [*_summary(item)]
    if inspect.isclass(item.code):
        found += _class(item, named)
    elif item.is_property:
        if _is_array(item, _returned(item.code)):
            found += _array("what it is", item.doc, item.doc)
    else:
        found += _parameters(item, item.code, named)
        found += _result(item)
    found += _raises(item)
    found += _units(item)
    where = f"{item.code.__module__}.{item.code.__qualname__}"
    if item.owner is None and where.startswith(OF_PAPERS):
        found += _reference(item)
    if inspect.isfunction(item.code) and where.startswith(ARRAYS) and item.owner is None:
        found += [] if ">>>" in item.doc else ["no Example"]
    return found


def _summary(item: Public) -> Iterator[str]:
    first = item.doc.partition("\n\n")[0]
    if not first or first[-1] not in ".?!":
        yield "no summary that is a sentence"


def _class(item: Public, named: dict[str, Public]) -> Iterator[str]:
    cls = item.code
    attributes = entries(item.doc, "Attributes")
    known = {name for name in attributes if hasattr(cls, name)} | _set_by_init(cls)
    if dataclasses.is_dataclass(cls) or hasattr(cls, "_fields"):
        fields = {n: a for n, a in inspect.get_annotations(cls).items() if n[0] != "_"}
        known |= fields.keys()
        for name, annotation in fields.items():
            if name not in attributes:
                yield f"no entry in Attributes for {name}"
            elif _is_array(item, annotation):
                yield from _array(name, attributes[name], item.doc)
    elif "__init__" in vars(cls):
        yield from _parameters(item, cls.__init__, named)
    for name in attributes.keys() - known:
        yield f"Attributes has an entry for {name}, which is not there"


def _set_by_init(cls: type) -> set[str]:
    nodes = (node for body in _bodies(cls) for node in _nodes(body))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _parameters(item: Public, function: Any, named: dict[str, Public]) -> Iterator[str]:
    args = entries(item.doc, "Args")
    parameters = dict(inspect.signature(function).parameters)
    if item.owner is not None or inspect.isclass(item.code):
        parameters.pop(next(iter(parameters)))
    inherited = _inherited(item)
    if "kwargs" in inherited:  # what a callback is given by keyword is its framework's, too
        return
    for name, parameter in parameters.items():
        if name in args:
            if _is_array(item, parameter.annotation) and not _has_shape(name, args[name], named):
                yield f"no shape for {name}"
        elif name not in inherited:
            yield f"no entry in Args for {name}"
    for name in args.keys() - parameters.keys():
        yield f"Args has an entry for {name}, which is no parameter"


def _inherited(item: Public) -> set[str]:
    """The parameters of what a method overrides, which is documented where it comes from."""
    bases = [] if item.owner is None else item.owner.__mro__[1:]
    methods = [vars(base).get(item.code.__name__) for base in bases]
    return {name for method in methods if method for name in inspect.signature(method).parameters}


def _has_shape(name: str, text: str, named: dict[str, Public]) -> bool:
    if SHAPE.search(text):
        return True
    for other in SEE.findall(text):
        item = named.get(other.rpartition(".")[2])
        texts = {} if item is None else entries(item.doc, "Args") | entries(item.doc, "Attributes")
        if name in texts and _has_shape(name, texts[name], named):
            return True
    return False


def _array(name: str, text: str, doc: str) -> Iterator[str]:
    if not SHAPE.search(text):
        yield f"no shape for {name}"
    if not DTYPE.search(doc):
        yield f"no dtype for {name}"


def _result(item: Public) -> Iterator[str]:
    annotation = _returned(item.code)
    if annotation in (None, "None"):
        return
    text = sections(item.doc).get("Returns") or sections(item.doc).get("Yields")
    if text is None and not re.match("Returns? |Yields? ", item.doc):
        yield "no Returns"
    elif _is_array(item, annotation):
        yield from _array("what it returns", text or item.doc, item.doc)


def _returned(function: Any) -> Any:
    return inspect.signature(function).return_annotation


def _is_array(item: Public, annotation: Any) -> bool:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    is_any = re.fullmatch(r"(typing\.)?Any( \| None)?", text) is not None
    is_like = is_any and item.code.__module__.startswith(ARRAYS)
    return is_like or re.search(r"\bTensor\b", text) is not None


def _units(item: Public) -> Iterator[str]:
    names = {item.code.__name__, *entries(item.doc, "Args"), *entries(item.doc, "Attributes")}
    for name in sorted(names):
        if IN_NATS.search(name) and not re.search(r"\b[Nn]ats\b", item.doc):
            yield f"no unit for {name}"


def _reference(item: Public) -> Iterator[str]:
    modules = [sys.modules[name] for name in (item.code.__module__, item.name.rpartition(".")[0])]
    docs = [item.doc, *(inspect.cleandoc(module.__doc__ or "") for module in modules)]
    if not any(PAPER.search(sections(doc).get("References", "")) for doc in docs):
        yield "no paper in References, nor in those of its module"


def _raises(item: Public) -> Iterator[str]:
    documented = entries(item.doc, "Raises")
    if item.owner is not None and _inherited(item):  # a framework calls it, not its user
        documented |= entries(inspect.cleandoc(item.owner.__doc__ or ""), "Raises")
    raised = set().union(*map(_raised, _reached(_bodies(item.code))))
    for error in sorted(raised - documented.keys()):
        yield f"no entry in Raises for {error}"


def _bodies(code: Any) -> list[FunctionType]:
    """The functions that run when a function or a class is called, as they are written."""
    if inspect.isfunction(code):
        return [inspect.unwrap(code)]
    if not inspect.isclass(code):
        return []
    made = (vars(code).get(name) for name in ("__init__", "__post_init__"))
    return [body for f in made for body in _bodies(f) if body.__code__.co_filename != "<string>"]


def _reached(functions: list[FunctionType]) -> set[FunctionType]:
    """Functions, and those of the package that they call, directly or not."""
    found: set[FunctionType] = set()
    pending = list(functions)
    while pending:
        function = pending.pop()
        if function not in found:
            found.add(function)
            pending += _called(function)
    return found


@cache
def _called(function: FunctionType) -> list[FunctionType]:
    """The functions of the package that a function calls in its own body."""
    calls = [node.func for node in _nodes(function) if isinstance(node, ast.Call)]
    called = [_value(function, node) for node in calls]
    own = [code for code in called if str(getattr(code, "__module__", "")).startswith(PACKAGE)]
    return [body for code in own for body in _bodies(code)]


@cache
def _raised(function: FunctionType) -> set[str]:
    """The errors that a function raises in its own body."""
    found = set()
    for node in _nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = _value(function, node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            if inspect.isfunction(made):  # a helper that makes the error
                made = _returned(made)
            name = getattr(made, "__name__", made)
            found.add(name if isinstance(name, str) else ast.unparse(node))
    return found


def _value(function: FunctionType, node: ast.expr) -> Any:
    """What a name, dotted or not, in a function's body stands for; None where that is not global."""
    if isinstance(node, ast.Attribute):
        return inspect.getattr_static(_value(function, node.value), node.attr, None)
    if not isinstance(node, ast.Name):
        return None
    # A method's own class stands for its instance.
    name = function.__qualname__.partition(".")[0] if node.id == "self" else node.id
    return function.__globals__.get(name, getattr(builtins, name, None))


@cache
def _nodes(function: FunctionType) -> list[ast.AST]:
    """The syntax of a function's own body, without that of functions within it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    found: list[ast.AST] = []
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        found.append(node)
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            pending += ast.iter_child_nodes(node)
    return found
