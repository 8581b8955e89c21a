"""The house rules that a machine can check: layering, who may import what, size budgets.

Rules read the syntax tree and answer with a list of complaints; each is also run on a small tree that breaks it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("server", "kernels", "proto", "clients")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6

#: room -> what of loraplex it may import besides itself and FLOOR. Top down; see docs/ARCHITECTURE.md.
FLOOR = ("types", "errors", "config", "json_config", "logs", "__version__")
LAYERS: dict[str, tuple[str, ...]] = {
    "cli": ("commands", "demo", "rpc", "metrics", "text", "engine", "models", "adapters"),
    "commands": ("demo", "rpc", "metrics", "text", "engine", "models", "adapters", "parallel.network"),
    "demo": ("models", "text"),
    "rpc": ("engine", "text", "metrics"),
    "metrics": ("engine.messages",),
    "text": (),
    "engine": ("models", "adapters", "state", "layers", "quant", "parallel"),
    # Siblings meet in descriptions only: sites and specs, never weights. Adapters' tokenizers are tried at load.
    "adapters": ("models.base", "models.sites", "state", "layers", "quant", "parallel", "text"),
    "models": ("layers", "quant", "parallel"),
    "state": ("models.base", "layers", "quant", "parallel"),
    "layers": ("quant", "parallel"),
    "quant": ("parallel",),
    "parallel": (),
    "types": (),
    "errors": (),
    "config": (),
    "logs": (),
    "json_config": (),
}
#: modules (and all they import) that must load without torch: the front end, the scheduler, the client
TORCH_FREE = (
    "loraplex.types",
    "loraplex.errors",
    "loraplex.config",
    "loraplex.metrics",
    "loraplex.cli",
    "loraplex.commands",
    "loraplex.demo.base",
    "loraplex.demo.gallery",
    "loraplex.demo.show",
    "loraplex.rpc",
    "loraplex.text",
    "loraplex.engine.client",
    "loraplex.engine.messages",
    "loraplex.engine.scheduler",
    "loraplex_kernels.segments",
    "loraplex_client",
    "loraplex_proto",
)
#: import -> the only modules that may have it (a prefix of the module's name)
ONLY_IN: dict[str, tuple[str, ...]] = {
    "loraplex_proto": ("loraplex.rpc", "loraplex_proto", "loraplex_client"),
    "google": ("loraplex.rpc", "loraplex_proto", "loraplex_client"),
    "grpc_status": ("loraplex.rpc",),
    "prometheus_client": ("loraplex.metrics",),
    "torch.load": (),
    "pickle": (),
}
#: what the client may import besides the standard library
CLIENT_MAY_IMPORT = ("grpc", "google", "loraplex_proto", "loraplex_client")

SPEAKERS = ("loraplex.cli", "loraplex.commands", "loraplex.demo", "loraplex_client.health")
#: called once by each of our two kinds of process
LOGS = ("loraplex.logs",)
#: call or attribute -> the only modules that may have it
ONLY_CALLED_IN: dict[str, tuple[str, ...]] = {
    "print": SPEAKERS,
    "os.environ": ("loraplex.config",),
    "os.getenv": ("loraplex.config",),
    "logging.basicConfig": LOGS,
    "logging.config.dictConfig": LOGS,
    "logging.config.fileConfig": LOGS,
    "eval": (),
    "exec": (),
}
BANNED_NAMES = ("utils", "util", "common", "misc", "helpers", "helper")
#: "path::function" -> (lines allowed, why)
LONGER: dict[str, tuple[int, str]] = {
    "kernels/loraplex_kernels/lora/triton.py::_expand_item": (85, "one kernel"),
}
#: function -> (parameters allowed, why); by name alone, because every backend of a contract has the same signature
MORE_PARAMETERS: dict[str, tuple[int, str]] = {
    "attend": (8, "q, k, v and where they go; a bundle would be built anew in every layer of every step"),
    "new_cache": (7, "a cache's shape: keyword-only scalars, called once"),
}


@dataclass(frozen=True)
class Module:
    """One hand-written Python file of a source root."""

    name: str  # loraplex.engine.scheduler
    path: Path  # relative to the tree's root
    text: str
    is_package: bool

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))


@dataclass(frozen=True)
class Tree:
    """All hand-written Python under ``root``: the four source roots, and the files beside them (tests, bench)."""

    root: Path

    @cached_property
    def modules(self) -> dict[str, Module]:
        found = {}
        for source_root in SOURCE_ROOTS:
            base = self.root / source_root
            for path in sorted(base.rglob("*.py")):
                if path.stem.endswith(("_pb2", "_pb2_grpc")):
                    continue
                parts = path.relative_to(base).with_suffix("").parts
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                found[name] = Module(name, path.relative_to(self.root), path.read_text(), is_package)
        return found

    @cached_property
    def files(self) -> dict[str, str]:
        """Path -> text of every hand-written Python file, tests and bench included."""
        files = {str(module.path): module.text for module in self.modules.values()}
        for folder in ("tests", "bench"):
            for path in sorted((self.root / folder).rglob("*.py")):
                files[str(path.relative_to(self.root))] = path.read_text()
        return files

    def imports(self, module: Module, *, at_load: bool = False) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of each import; ``at_load`` leaves out those in functions and under TYPE_CHECKING."""
        nodes = _nodes_run_at_load(module.tree) if at_load else ast.walk(module.tree)
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                origin = node.module or ""
                if node.level:
                    parts = module.name.split(".")
                    kept = len(parts) - node.level + (1 if module.is_package else 0)
                    origin = ".".join([*parts[:kept], *([origin] if origin else [])])
                for alias in node.names:
                    yield node.lineno, f"{origin}.{alias.name}"

    def modules_of(self, name: str) -> list[Module]:
        """The modules of ours that importing ``name`` runs: its packages, and itself where it is one."""
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return [self.modules[prefix] for prefix in prefixes if prefix in self.modules]


def _nodes_run_at_load(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _nodes_run_at_load(child)


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


# ---- the rules: Tree -> complaints ----


def layering(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        package, _, inner = module.name.partition(".")
        for line, name in tree.imports(module):
            if package == "loraplex_kernels" and _within(name, ("loraplex",)):
                yield f"{module.path}:{line}: kernels import nothing of the server, yet this imports {name}"
            if package != "loraplex" or not inner or not name.startswith("loraplex."):
                continue
            room, target = inner.split(".")[0], name.removeprefix("loraplex.")
            if room not in LAYERS:
                yield f"{module.path}: '{room}' is no room of the server; the rooms are {', '.join(LAYERS)}"
                break
            if not _within(target, (room, *FLOOR, *LAYERS[room])):
                allowed = ", ".join((*FLOOR, *LAYERS[room]))
                yield f"{module.path}:{line}: {room} may not import {name} (it may: {allowed})"


def floor_stands_alone(tree: Tree) -> Iterator[str]:
    for room in ("types", "errors"):
        if module := tree.modules.get(f"loraplex.{room}"):
            for line, name in tree.imports(module):
                if name.startswith("loraplex"):
                    yield f"{module.path}:{line}: {room} is what everything rests on, yet it imports {name}"


def torch_free(tree: Tree) -> Iterator[str]:
    for start in tree.modules.values():
        if not _within(start.name, TORCH_FREE):
            continue
        came_from: dict[str, str] = {start.name: ""}
        queue = [start, *tree.modules_of(start.name)]
        while queue:
            module = queue.pop()
            for line, name in tree.imports(module, at_load=True):
                if _within(name, ("torch", "transformers", "peft")):
                    yield f"{start.path} must load without torch, yet {module.path}:{line} imports {name}"
                for target in tree.modules_of(name):
                    if target.name not in came_from:
                        came_from[target.name] = module.name
                        queue.append(target)


def imports_in_their_place(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        for line, name in tree.imports(module):
            for owned, owners in ONLY_IN.items():
                if _within(name, (owned,)) and not _within(module.name, owners):
                    yield f"{module.path}:{line}: {owned} may be imported only in {', '.join(owners) or 'no file'}"
            if _within(name, ("triton",)) and module.path.name != "triton.py":
                yield f"{module.path}:{line}: triton may be imported only in files named triton.py"
            if module.name.startswith("loraplex_client"):
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top not in CLIENT_MAY_IMPORT:
                    yield f"{module.path}:{line}: the client imports {top} (it may: {', '.join(CLIENT_MAY_IMPORT)})"


def calls_in_their_place(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute):
                used = ast.unparse(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                used = node.func.id
            else:
                continue
            if used in ONLY_CALLED_IN and not _within(module.name, ONLY_CALLED_IN[used]):
                owners = ", ".join(ONLY_CALLED_IN[used]) or "no file"
                yield f"{module.path}:{node.lineno}: {used} may be used only in {owners}"


def budgets(tree: Tree) -> Iterator[str]:
    for path, text in tree.files.items():
        num_lines = text.count("\n")
        if num_lines > MAX_FILE_LINES:
            yield f"{path}: {num_lines} lines; at most {MAX_FILE_LINES}"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            allowed, _ = LONGER.get(f"{path}::{node.name}", (MAX_FUNCTION_LINES, ""))
            if num_lines > allowed:
                yield f"{path}:{node.lineno}: {node.name} has {num_lines} lines; at most {allowed}"
            parameters = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            num_parameters = len([name for name in parameters if name not in ("self", "cls")])
            allowed, _ = MORE_PARAMETERS.get(node.name, (MAX_PARAMETERS, ""))
            is_kernel = any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
            if num_parameters > allowed and not path.startswith("tests/") and not is_kernel:
                yield f"{path}:{node.lineno}: {node.name} takes {num_parameters} parameters; at most {allowed}"


def names_and_leftovers(tree: Tree) -> Iterator[str]:
    unfinished = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path, text in tree.files.items():
        banned = [part for part in Path(path).with_suffix("").parts if part in BANNED_NAMES]
        if banned:
            yield f"{path}: '{banned[0]}' says nothing; name the file after the noun it owns"
        for number, line in enumerate(text.splitlines(), start=1):
            if match := unfinished.search(line):
                yield f"{path}:{number}: {match.group()} (finish it, or file an issue)"


RULES: tuple[Callable[[Tree], Iterator[str]], ...] = (
    layering,
    floor_stands_alone,
    torch_free,
    imports_in_their_place,
    calls_in_their_place,
    budgets,
    names_and_leftovers,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule: Callable[[Tree], Iterator[str]]) -> None:
    complaints = sorted(set(rule(Tree(ROOT))))
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_rules_see_the_repository() -> None:
    tree = Tree(ROOT)
    assert {"loraplex.types", "loraplex_kernels.segments", "loraplex_client.health"} <= tree.modules.keys()
    assert "tests/test_architecture.py" in tree.files


BROKEN: tuple[tuple[str, Callable[[Tree], Iterator[str]], dict[str, str]], ...] = (
    ("model imports rpc", layering, {"server/loraplex/models/x.py": "from loraplex.rpc import app\n"}),
    ("relative import upward", layering, {"server/loraplex/models/x.py": "from ..rpc import app\n"}),
    ("sibling weights", layering, {"server/loraplex/adapters/x.py": "import loraplex.models.loader\n"}),
    ("unknown room", layering, {"server/loraplex/stuff/x.py": "import loraplex.types\n"}),
    ("kernels import server", layering, {"kernels/loraplex_kernels/x.py": "from loraplex.types import A\n"}),
    ("types import config", floor_stands_alone, {"server/loraplex/types.py": "from loraplex import config\n"}),
    ("torch in scheduler", torch_free, {"server/loraplex/engine/scheduler.py": "import torch.nn\n"}),
    (
        "torch two steps away",
        torch_free,
        {
            "server/loraplex/rpc/app.py": "from loraplex.state.pages import P\n",
            "server/loraplex/state/__init__.py": "from loraplex.state import kv\n",
            "server/loraplex/state/pages.py": "",
            "server/loraplex/state/kv.py": "if True:\n    from torch import nn\n",
        },
    ),
    ("protobuf in engine", imports_in_their_place, {"server/loraplex/engine/x.py": "import loraplex_proto.v1\n"}),
    (
        "protobuf runtime in text",
        imports_in_their_place,
        {"server/loraplex/text/x.py": "from google import protobuf\n"},
    ),
    ("prometheus in rpc", imports_in_their_place, {"server/loraplex/rpc/x.py": "import prometheus_client as p\n"}),
    ("triton elsewhere", imports_in_their_place, {"kernels/loraplex_kernels/lora/cpu.py": "import triton.language\n"}),
    ("client with torch", imports_in_their_place, {"clients/loraplex_client/x.py": "def f():\n    import torch\n"}),
    ("pickle", imports_in_their_place, {"server/loraplex/adapters/x.py": "import pickle\n"}),
    ("environ", calls_in_their_place, {"server/loraplex/engine/x.py": "import os\nA = os.environ['A']\n"}),
    ("logging set up", calls_in_their_place, {"server/loraplex/rpc/x.py": "import logging\nlogging.basicConfig()\n"}),
    ("print", calls_in_their_place, {"server/loraplex/rpc/x.py": "print('x')\n"}),
    ("long file", budgets, {"bench/x.py": "A = 1\n" * (MAX_FILE_LINES + 1)}),
    ("long function", budgets, {"tests/x.py": "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES}),
    ("many parameters", budgets, {"clients/loraplex_client/x.py": "def f(a, b, c, d, *, e, g, h):\n    pass\n"}),
    ("empty name", names_and_leftovers, {"server/loraplex/rpc/utils.py": ""}),
    ("empty folder name", names_and_leftovers, {"bench/common/x.py": ""}),
    ("unfinished", names_and_leftovers, {"tests/x.py": "# TO" + "DO later\n"}),
)


def _write(root: Path, files: dict[str, str]) -> Tree:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return Tree(root)


@pytest.mark.parametrize(("rule", "files"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_rule_complains(tmp_path: Path, rule: Callable[[Tree], Iterator[str]], files: dict[str, str]) -> None:
    assert list(rule(_write(tmp_path, files)))


def test_rules_accept_what_is_allowed(tmp_path: Path) -> None:
    tree = _write(
        tmp_path,
        {
            "server/loraplex/__init__.py": "__version__ = '1'\n",
            "server/loraplex/rpc/convert.py": "import loraplex_proto.v1\nfrom loraplex.engine import client\n",
            "server/loraplex/engine/client.py": "def load() -> None:\n    import torch\n    torch.zeros(1)\n",
            "server/loraplex/engine/core.py": "import torch\nfrom loraplex import __version__\nfrom . import client\n",
            "server/loraplex/config.py": "import os\nA = os.environ.get('A')\n",
            "kernels/loraplex_kernels/lora/triton.py": "import triton\n@triton.jit\ndef f(a, b, c, d, e, g, h): ...\n",
            "clients/loraplex_client/x.py": "import asyncio\nimport grpc.aio\n",
        },
    )
    assert [complaint for rule in RULES for complaint in rule(tree)] == []


def test_exceptions_to_the_budgets_have_a_reason() -> None:
    entries = [*LONGER.values(), *MORE_PARAMETERS.values()]
    assert all(reason for _, reason in entries)
