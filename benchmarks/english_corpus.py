"""Builds a corpus of about 100 MB of English text from Debian packages.

    .venv/bin/python benchmarks/english_corpus.py data/english

The text consists of a dictionary, the glosses of WordNet, dictionaries of computing, the sources of the Linux kernel's
documentation, and a few books and quotations, all under free licences. Packages are downloaded and unpacked without
root. The text is not in this repository: `packages.json`, beside the corpus, records the names and versions of the
packages, so that the same corpus can be built again.

Files above DOCUMENT_BYTES are split at blank lines into documents of about that size. A paragraph that has occurred
before, in any document, is dropped. Whole documents go to train or eval by a hash of their names. A row holds at most
255 bytes of one document, as in `maxtext_mudd.corpus`.
"""

from collections.abc import Iterator
import dataclasses
import gzip
import hashlib
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import tqdm

from maxtext_mudd import corpus

DOCUMENT_BYTES = 1 << 18
SHORTEST_DUPLICATE = 60  # characters; shorter paragraphs may recur, as headings do


@dataclasses.dataclass(frozen=True)
class Source:
  """A Debian package and the files in it that are text.

  Attributes:
    package: its name.
    files: pattern of the paths of its text files, from the package's root.
  """

  package: str
  files: str


SOURCES = (
  Source("dict-gcide", "usr/share/dictd/*.dict.dz"),  # the Collaborative International Dictionary of English
  Source("dict-wn", "usr/share/dictd/*.dict.dz"),  # WordNet
  Source("dict-foldoc", "usr/share/dictd/*.dict.dz"),  # the Free On-line Dictionary of Computing
  Source("dict-jargon", "usr/share/dictd/*.dict.dz"),
  Source("dict-devil", "usr/share/dictd/*.dict.dz"),  # The Devil's Dictionary, Ambrose Bierce
  Source("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz"),
  Source("anarchism", "usr/share/doc/anarchism/html/*.html"),  # An Anarchist FAQ
  Source("fortunes", "usr/share/games/fortunes/*"),
)


class NotAvailable(Exception):
  """The packages cannot be downloaded; one sentence that says why and what would work."""


def fetch(folder: pathlib.Path) -> dict[str, str]:
  """Downloads the packages, and unpacks each into `folder`/PACKAGE; returns their versions.

  Raises:
    NotAvailable: this is not a Debian system, or its package lists do not have one of the packages.
  """
  for tool in ("apt-get", "dpkg-deb"):
    if not shutil.which(tool):
      raise NotAvailable(
        f"{tool} was not found: the English corpus comes from Debian packages; `make corpus` builds the Python one "
        "on any system."
      )
  versions = {}
  for source in tqdm.tqdm(SOURCES, desc="packages", disable=None):
    archives = folder / "archives" / source.package
    archives.mkdir(parents=True)
    done = subprocess.run(
      ["apt-get", "download", "--quiet", source.package], cwd=archives, capture_output=True, text=True
    )
    if done.returncode:
      reason = (done.stderr.strip().splitlines() or ["apt-get gave no reason"])[-1].removeprefix("E: ")
      raise NotAvailable(
        f"{source.package}: this Debian package could not be downloaded ({reason}); run `apt-get update` first, "
        "or use the Python corpus, which `make corpus` builds."
      )
    (archive,) = archives.glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", archive, folder / source.package], check=True)
    show = ["dpkg-deb", "--field", archive, "Version"]
    versions[source.package] = subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip()
  return versions


class _Text(html.parser.HTMLParser):
  """Extracts the text of an HTML page, with a blank line where a block begins."""

  _BLOCKS = frozenset({"p", "div", "br", "li", "h1", "h2", "h3", "h4", "blockquote", "tr"})
  _UNREAD = frozenset({"script", "style", "head"})

  def __init__(self):
    super().__init__()
    self.parts, self._unread = [], 0

  def handle_starttag(self, tag, attrs):
    self._unread += tag in self._UNREAD
    if tag in self._BLOCKS:
      self.parts.append("\n\n")

  def handle_endtag(self, tag):
    self._unread -= tag in self._UNREAD

  def handle_data(self, data):
    if not self._unread:
      self.parts.append(re.sub(r"\s+", " ", data))


def text_of(path: pathlib.Path) -> str:
  """The text of a file; bytes that are not UTF-8 become U+FFFD."""
  data = path.read_bytes()
  if path.suffix in (".gz", ".dz"):
    data = gzip.decompress(data)
  text = data.decode(errors="replace")
  if path.suffix == ".html":
    page = _Text()
    page.feed(text)
    text = "".join(page.parts)
  return text


def documents(folder: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  """The documents of the unpacked packages, in a fixed order, as (name, paragraphs)."""
  for source in SOURCES:
    root = folder / source.package
    for path in sorted(root.glob(source.files)):
      if path.suffix in (".dat", ".u8") or not path.is_file() or path.is_symlink():
        continue  # .dat and .u8 are indices of the fortunes
      name, number, size, paragraphs = f"{source.package}/{path.relative_to(root)}", 0, 0, []
      for paragraph in re.split(r"\n\s*\n", text_of(path)):
        paragraphs.append(paragraph.strip("\n"))
        size += len(paragraph)
        if size >= DOCUMENT_BYTES:
          yield f"{name}#{number}", paragraphs
          number, size, paragraphs = number + 1, 0, []
      yield f"{name}#{number}", paragraphs


def distinct(paragraphs: list[str], seen: set[bytes]) -> Iterator[str]:
  """The paragraphs that are valid text and have not occurred before.

  Args:
    seen: digests of the paragraphs that have occurred; those of the new ones are added.
  """
  for paragraph in paragraphs:
    if not paragraph.strip() or "\ufffd" in paragraph or "\0" in paragraph:
      continue
    words = " ".join(paragraph.split())
    if len(words) >= SHORTEST_DUPLICATE:
      digest = hashlib.blake2b(words.lower().encode(), digest_size=12).digest()
      if digest in seen:
        continue
      seen.add(digest)
    yield paragraph


def build(folder: pathlib.Path) -> dict[str, int]:
  """Writes train.parquet, eval.parquet and packages.json into `folder`; returns the bytes of text in each split.

  Raises:
    NotAvailable: as `fetch`.
  """
  rows, seen = {"train": [], "eval": []}, set()
  with tempfile.TemporaryDirectory() as unpacked:
    versions = fetch(pathlib.Path(unpacked))
    for name, paragraphs in tqdm.tqdm(documents(pathlib.Path(unpacked)), desc="documents", disable=None):
      text = "\n\n".join(distinct(paragraphs, seen))
      split = "eval" if corpus.is_eval(pathlib.PurePosixPath(name)) else "train"
      rows[split].extend(corpus.pieces(text))
  sizes = corpus.write(rows, folder)
  (folder / "packages.json").write_text(json.dumps({"packages": versions, "bytes": sizes}, indent=1) + "\n")
  return sizes


def main(arguments: list[str]) -> None:
  if len(arguments) != 1 or arguments[0].startswith("-"):
    sys.exit("usage: python benchmarks/english_corpus.py FOLDER")
  try:
    sizes = build(pathlib.Path(arguments[0]))
  except NotAvailable as error:
    sys.exit(f"maxtext-mudd: {error}")
  print(f"{arguments[0]}: {sizes['train'] / 1e6:.1f} MB to train on, {sizes['eval'] / 1e6:.1f} MB to evaluate on.")


if __name__ == "__main__":
  main(sys.argv[1:])
