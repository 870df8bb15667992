"""Paths of the files that are part of the package: the byte tokenizer, evaluation tasks, PyTorch code and
configuration files."""

import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]

BYTE_TOKENIZER = "maxtext_mudd/byte"  # the value of `tokenizer_path` that names the byte tokenizer
BYTE_TOKENIZER_FOLDER = _PACKAGE / "assets" / "byte_tokenizer"
HUGGING_FACE = _PACKAGE / "assets" / "hugging_face"  # PyTorch code that to-hf writes beside weights
TASKS = _PACKAGE / "assets" / "tasks"  # task files for the harness that `maxtext_mudd.evaluate` runs
# Configuration files. A wheel has them inside the package, and a checkout has them beside it.
CONFIGURATIONS = next((x for x in (_PACKAGE / "yaml", _PACKAGE.parent / "yaml") if x.is_dir()), _PACKAGE / "yaml")
