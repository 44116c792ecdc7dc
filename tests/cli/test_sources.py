"""`peftcli.sources` cuts files by their lines; Python's own parser reads the same from them."""

from __future__ import annotations

import ast

import pytest

from peftcli.folders import PACKAGE
from peftcli.sources import source

PATHS = sorted(p for folder in ("core", "methods") for p in (PACKAGE / folder).rglob("*.py"))
MODULES = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in PATHS]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_cut_by_its_lines_is_what_python_parses(module: str) -> None:
    read = source(module)
    assert read is not None
    tree = ast.parse(read.text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert read.docstring == ast.get_docstring(tree)
    assert {a.name: i.module for i in imports for a in i.names}.items() <= read.imports.items()
    assert list(read.classes) == [cls.name for cls in classes]
    for cls in classes:
        found = read.classes[cls.name]
        fields = [item for item in cls.body if isinstance(item, ast.AnnAssign)]
        methods = [item for item in cls.body if isinstance(item, ast.FunctionDef)]
        bases = [base.id for base in cls.bases if isinstance(base, ast.Name)]
        assert [base.rpartition(".")[2] for base in found.bases] == bases
        assert [ast.unparse(field) for field in found.fields.values()] == [
            ast.unparse(field) for field in fields
        ]
        assert list(found.methods) == [method.name for method in methods]
        for method in methods:
            assert list(map(ast.dump, found.method(method.name))) == list(
                map(ast.dump, method.body)
            )
