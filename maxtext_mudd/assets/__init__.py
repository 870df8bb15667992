"""Files that ship with the package."""

import pathlib

BYTE_TOKENIZER = "maxtext_mudd/byte"  # what a configuration writes as `tokenizer_path`
BYTE_TOKENIZER_FOLDER = pathlib.Path(__file__).parent / "byte_tokenizer"
TASKS = pathlib.Path(__file__).parent / "tasks"  # of the harness that `evaluate` runs
