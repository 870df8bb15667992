"""Files that ship with the package."""

import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]

BYTE_TOKENIZER = "maxtext_mudd/byte"  # what a configuration writes as `tokenizer_path`
BYTE_TOKENIZER_FOLDER = _PACKAGE / "assets" / "byte_tokenizer"
TASKS = _PACKAGE / "assets" / "tasks"  # of the harness that `evaluate` runs
# Configuration files: a wheel has them inside the package, a checkout beside it.
CONFIGURATIONS = next((x for x in (_PACKAGE / "yaml", _PACKAGE.parent / "yaml") if x.is_dir()), _PACKAGE / "yaml")
