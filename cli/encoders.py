"""`patchbank encoders`: what there is."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from patchbank.cli.listing import print_entry


def encoders() -> None:
    """List the encoders that extract knows, with the licence of their weights."""
    from patchbank.pipeline.encoders import ENCODER_MODULES

    for name, module in sorted(ENCODER_MODULES.items()):
        # The sources are parsed, not imported: a list should not wait for torch.
        found = find_spec(module)
        assert found is not None
        assert found.origin is not None
        tree = ast.parse(Path(found.origin).read_text("utf-8"))
        summary = (ast.get_docstring(tree) or "").splitlines()[0]
        print_entry(name, _licence(tree), summary)


def _licence(tree: ast.Module) -> str:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "LICENCE" in targets:
                return str(node.value.value)
    return "not stated"
