"""`patchbank encoders`: what there is."""

from __future__ import annotations


def encoders() -> None:
    """List the encoders that extract knows, with the licence of their weights."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    from patchbank.pipeline.encoders import ENCODER_MODULES

    for name, module in sorted(ENCODER_MODULES.items()):
        found = find_spec(module)
        # The sources are parsed, not imported: a list should not wait for torch.
        tree = ast.parse(Path(found.origin).read_text("utf-8")) if found and found.origin else None
        summary = (ast.get_docstring(tree) or "").splitlines()[0] if tree else ""
        print(f"{name:<14} {_licence(tree):<12} {summary}")


def _licence(tree: object) -> str:
    import ast

    assert tree is None or isinstance(tree, ast.Module)
    for node in tree.body if tree else []:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "LICENCE"
            and isinstance(node.value, ast.Constant)
        ):
            return str(node.value.value)
    return "?"
