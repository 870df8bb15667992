"""Data for fine-tuning."""

import json
import pathlib


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes chat.jsonl and pairs.jsonl, of 64 rows each, and returns the folder."""
  messages = (("user", "Add {} and 1."), ("assistant", "{}"))
  with (folder / "chat.jsonl").open("w") as chat, (folder / "pairs.jsonl").open("w") as pairs:
    for i in range(64):
      contents = [{"role": role, "content": text.format(i + (role == "assistant"))} for role, text in messages]
      chat.write(json.dumps({"messages": contents}) + "\n")
      pairs.write(json.dumps({"prompt": f"Is {i} a number?", "chosen": "yes", "rejected": "no"}) + "\n")
  return folder
