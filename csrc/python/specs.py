"""Generate the C++ structures of the specs from calseg/operations.py: python specs.py OPERATIONS.py SPECS.h

Every class of that file becomes a structure with the same fields, and a function that visits the fields with their
names and places. C++ has no fields for text and for the dtype of a result. The places of the other fields still count
them.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

TYPES = {
    "Scores": "Scores",
    "Indices": "Indices",
    "Classes": "Classes",
    "Reduction": "Reduction",
    "Seed": "uint64_t",
    "Factor": "double",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
}
LEFT_OUT = ("str", "torch.dtype")

Field = tuple[int, str, str]


def fields_of(structure: ast.ClassDef, known: dict[str, str]) -> list[Field]:
    """Return place, C++ type and name of every field that C++ has."""
    fields = []
    annotated = [line for line in structure.body if isinstance(line, ast.AnnAssign)]
    for place, line in enumerate(annotated):
        kind = ast.unparse(line.annotation).removesuffix(" | None")
        name = ast.unparse(line.target)
        if kind in known:
            fields.append((place, known[kind], name))
        elif kind not in LEFT_OUT:
            raise SystemExit(f"{structure.name}.{name}: C++ has no type for {kind}")
    return fields


def make(source: str) -> str:
    """Return the text of the header for the text of operations.py."""
    known = dict(TYPES)
    parts = []
    for structure in ast.parse(source).body:
        if not isinstance(structure, ast.ClassDef):
            continue
        fields = fields_of(structure, known)
        known[structure.name] = structure.name
        members = "".join(f"    {kind} {name}{{}};\n" for _, kind, name in fields)
        visits = "".join(f'    visit({place}, "{name}", structure.{name});\n' for place, _, name in fields)
        parts.append(
            f"struct {structure.name} {{\n{members}}};\n"
            f"template <class Visit>\nvoid visit_fields({structure.name}& structure, Visit&& visit) {{\n{visits}}}\n"
            f'constexpr const char* name_of(const {structure.name}*) {{ return "{structure.name}"; }}\n'
        )
    names = ", ".join(name for name in known if name not in TYPES)
    parts.append(f"// All of them, for the test that compares both lists\nusing Structures = std::tuple<{names}>;\n")
    body = "\n".join(parts)
    return (
        "// Made from calseg/operations.py by csrc/python/specs.py.\n#pragma once\n\n#include <tuple>\n\n"
        f'#include "host/tensor_view.h"\n\nnamespace calseg {{\n\n{body}\n}}  // namespace calseg\n'
    )


if __name__ == "__main__":
    operations, header = map(Path, sys.argv[1:])
    made = make(operations.read_text(encoding="utf-8"))
    if not header.exists() or header.read_text(encoding="utf-8") != made:  # an unchanged header compiles nothing again
        header.write_text(made, encoding="utf-8")
