"""Imports run one way, from the commands down to the kernels, and README's tree names every part of the package."""

import ast
import pathlib

import maxtext_mudd
from tests import runs

PACKAGE = pathlib.Path(maxtext_mudd.__file__).parent
# Each part may import those after it.
ORDER = (
  *("train", "post_train", "decode", "train_compile"),
  *("convert", "evaluate", "analyze", "complexity", "cluster", "report", "corpus", "vit"),
  *("runs", "inference", "checkpoints", "plugin", "model", "config", "connections", "blocks", "kernels"),
  *("muddformer", "assets"),
)


def part_of(module: str) -> str | None:
  """The entry of the package that a module belongs to; None for the package itself."""
  names = module.split(".")
  return names[1] if len(names) > 1 else None


def imports(file: pathlib.Path):
  """Parts of the package that a file imports, at its top or inside functions."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "maxtext_mudd":
      modules = [node.module] if part_of(node.module) else [f"maxtext_mudd.{name.name}" for name in node.names]
      yield from map(part_of, modules)


def entries() -> set[str]:
  return {x.stem for x in PACKAGE.iterdir() if x.suffix == ".py" or (x / "__init__.py").exists()} - {"__init__"}


def test_every_part_is_in_the_order_and_in_readme():
  assert entries() == set(ORDER)
  assert len(ORDER) + 1 <= 24  # with __init__.py
  tree = (runs.ROOT / "README.md").read_text().split("Imports go downwards in this list:")[1]
  words = set(tree.replace("/", " ").replace(".py", " ").split())
  assert set(ORDER) <= words


def test_imports_run_one_way():
  for part in ORDER:
    folder = PACKAGE / part
    for file in folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{part}.py"]:
      upward = {other for other in imports(file) if other in ORDER and ORDER.index(other) < ORDER.index(part)}
      assert not upward, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(upward))}"
