"""Text out of files: plain text, Markdown, HTML, JSON Lines and Parquet, as they are or packed with gzip or zstd.

Everything is streamed: what is held in memory is a block of a document, a line of JSON Lines or a few rows of Parquet,
and each of these has a limit. What cannot be read is a `Problem` with one of a few reasons, for the caller to count.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import gzip
import html.parser
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ...errors import DatabaseError

FORMATS = ("text", "html", "jsonl", "parquet", "arrow")
SUFFIXES = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Of Arrow: what reads it takes a file that is cut between two batches for a shorter one."""
UNKNOWN_ENDING = "unknown ending (--format text reads it as text)"
OURS = {
    "manifest.json": ("magic", "retro-kernels retrieval database"),
    "data.json": ("format", "retro-kernels training data"),
}
"""What is no text of anyone's: databases and training data, by a file in them and what it says."""
PACKED = (".gz", ".zst")
BLOCK = 1 << 18
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Problem(Exception):
    """Why a file, or a document in one, was left out. The message is the reason under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of reading files.

    text_field: the field (JSON Lines) or column (Parquet) that holds the text.
    encoding: of text without a byte order mark. record_bytes: the longest line, row or piece of markup that is read;
    it bounds the memory of a build."""

    text_field: str = "text"
    encoding: str = "utf-8"
    record_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding: got {self.encoding!r}; expected a name that Python knows, as utf-8") from None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file, or the part of one that a shard takes: lines that begin in bytes `start` to `stop` of JSON Lines, row
    groups `start` to `stop` of Parquet; stop is -1 for the whole file."""

    path: str
    """The file's absolute path."""
    name: str
    """Its path below the folder that holds all inputs."""
    format: str
    size: int
    """Bytes of this piece, for Parquet before unpacking."""
    file_size: int
    file_time: int
    """Of the whole file, bytes and modification time in ns: a build refuses to go on when they changed."""
    start: int = 0
    stop: int = -1

    @property
    def place(self) -> str:
        """The folder below which `name` is, where the path is not that of a link."""
        return self.path.removesuffix(self.name).rstrip("/")

    def unchanged(self) -> bool:
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (self.file_size, self.file_time)


def find(
    inputs: Sequence[str | os.PathLike[str]], *, format: str | None = None, exclude: Path | None = None
) -> tuple[list[Piece], list[tuple[str, str]]]:
    """All files of the inputs (files, folders, globs), in an order that only names decide, each once however often it
    was named; and what was left out as (name, reason). A name is the path below the deepest folder that holds all
    inputs (of a glob: its part without a pattern), so that no two files share one.

    A file in a folder is left out where its name begins with a dot or its ending is not known; a file named by the
    caller, or any with `format`, is read as text then. Files below `exclude` are never input, nor are databases
    and training data; links to folders are not followed. Raises DatabaseError for an input that is not there,
    ValueError for an unknown format."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: got {format!r}; expected one of {FORMATS}, or None to go by the ending")
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    listed = [(_folder_of(given), given) for given in [os.fspath(one) for one in inputs]]
    try:
        root = os.path.commonpath([folder for folder, _ in listed]) if listed else ""
    except ValueError:  # two drives of Windows
        root = os.path.sep
    found: dict[str, Piece] = {}
    left: list[tuple[str, str]] = []
    out = None if exclude is None else Path(exclude).resolve()
    for folder, given in listed:
        for path, named, problem in _files(given, folder):
            name = Path(os.path.relpath(path, root)).as_posix()
            real = os.path.realpath(path)
            if real in found or (out is not None and Path(real).is_relative_to(out)):
                continue
            if not named and any(part.startswith(".") for part in Path(os.path.relpath(path, folder)).parts):
                left.append((name, "hidden"))
                continue
            if problem is not None:
                left.append((f"{name}/", problem))
                continue
            kind = format or format_of(name) or ("text" if named else None)
            if kind is None:
                left.append((name, UNKNOWN_ENDING))
                continue
            try:
                stat = os.stat(real)
            except OSError:
                left.append((name, "unreadable"))
                continue
            if not os.path.isfile(real):
                left.append((name, "no regular file"))
                continue
            found[real] = Piece(real, name, kind, stat.st_size, stat.st_size, stat.st_mtime_ns)
    return list(found.values()), left


def _folder_of(given: str) -> str:
    """The folder below which an input's files are named."""
    if os.path.isdir(given):
        return os.path.abspath(given)
    if os.path.lexists(given):
        return os.path.dirname(os.path.abspath(given))
    if not glob.has_magic(given):
        raise DatabaseError(f"input: {given!r} does not exist; expected a file, a folder or a glob")
    fixed = list(Path(given).parts[:-1])
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    return os.path.abspath(os.path.join(*fixed) if fixed else ".")


def _files(given: str, folder: str) -> Iterator[tuple[str, bool, str | None]]:
    """(path, was it named by the caller, why it is left out if it is a folder that is) of every file of one input."""
    if os.path.isdir(given):
        unreadable: list[OSError] = []
        for at, below, names in os.walk(folder, onerror=unreadable.append):
            if any(_is_ours(os.path.join(at, name)) for name in OURS.keys() & set(names)):
                below.clear()
                continue
            below.sort()
            for name in sorted(names):
                yield os.path.join(at, name), False, None
            for name in below:
                if os.path.islink(os.path.join(at, name)):
                    yield os.path.join(at, name), False, "link to a folder"
        for error in unreadable:
            yield os.fspath(error.filename), False, "unreadable"
    elif os.path.lexists(given):
        yield os.path.abspath(given), True, None
    else:
        matched = sorted(path for path in glob.glob(given, recursive=True) if not os.path.isdir(path))
        if not matched:
            raise DatabaseError(f"input: nothing matches {given!r}")
        for path in matched:
            yield os.path.abspath(path), True, None


def _is_ours(path: str) -> bool:
    """Is this the file that says that its folder is a database, or training data?"""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(Options.record_bytes))
    except (OSError, ValueError, RecursionError):
        return False
    key, value = OURS[os.path.basename(path)]
    return isinstance(found, dict) and found.get(key) == value


def format_of(name: str) -> str | None:
    """The format that a file's name says, under `.gz` or `.zst` if it has that too; None where it says none."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in PACKED:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix)


def cut(piece: Piece, piece_bytes: int) -> Iterator[Piece]:
    """A file in pieces of about `piece_bytes`, where its format allows it: JSON Lines that are not packed, and Parquet.

    Raises Problem for a file that is no Parquet."""
    if piece.format == "parquet":
        with _parquet(piece) as file:
            groups = [file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)]
        start = size = 0
        for number, group in enumerate(groups):
            if size and size + group > piece_bytes:
                yield dataclasses.replace(piece, start=start, stop=number, size=size)
                start, size = number, 0
            size += group
        yield dataclasses.replace(piece, start=start, stop=len(groups), size=size)
    elif piece.format == "jsonl" and _compression(piece.path) is None and piece.size > piece_bytes and not _wide(piece):
        parts = -(-piece.size // piece_bytes)
        borders = [piece.size * number // parts for number in range(parts + 1)]
        for start, stop in itertools.pairwise(borders):
            yield dataclasses.replace(piece, start=start, stop=stop, size=stop - start)
    else:
        yield piece


@dataclasses.dataclass
class Document:
    """One document: `record` counts within the piece (None where the file is the document). `blocks` can be read once,
    before the next document is asked for, and raises Problem where the document is to be left out."""

    record: int | None
    blocks: Iterator[str]


class Reader:
    """Reads the documents of a piece. After iteration `records` is the number of lines or rows of the piece.

    Iteration raises Problem where the file goes bad so that nothing more of it can be read."""

    def __init__(self, piece: Piece, options: Options) -> None:
        self.piece, self.options, self.records = piece, options, 0

    def __iter__(self) -> Iterator[Document]:
        read = {"text": self._whole, "html": self._whole, "jsonl": self._lines, "parquet": self._rows}
        read["arrow"] = self._arrow_rows
        with _problems_named():
            yield from read[self.piece.format]()

    def _whole(self) -> Iterator[Document]:
        yield Document(None, self._blocks())

    def _blocks(self) -> Iterator[str]:
        with _problems_named(), _open_file(self.piece.path) as file:
            text = _decode(file, self.options.encoding, is_html=self.piece.format == "html")
            yield from _visible(text, self.options.record_bytes) if self.piece.format == "html" else text

    def _lines(self) -> Iterator[Document]:
        piece, limit = self.piece, self.options.record_bytes
        if wide := _wide(piece):
            yield from self._wide_lines(wide)
            return
        with _open_file(piece.path) as file:
            position = piece.start
            if position:
                # The line that reaches over the border belongs to the piece before.
                file.seek(position - 1)
                position += _rest_of_line(file, None if piece.stop < 0 else piece.stop - position + 1) - 1
            while piece.stop < 0 or position < piece.stop:
                line = file.readline(limit + 1)
                if not line:
                    break
                position += len(line)
                long = len(line) > limit and not line.endswith(b"\n")
                if long:
                    position += _rest_of_line(file)
                first = self.records == 0 and piece.start == 0
                if long or line.strip():
                    yield Document(self.records, self._texts_in_line(None if long else line, first))
                self.records += 1

    def _wide_lines(self, encoding: str) -> Iterator[Document]:
        """Lines of UTF-16 or UTF-32, whose ends are no byte of their own."""
        limit = self.options.record_bytes
        with io.TextIOWrapper(_open_file(self.piece.path), encoding, newline="\n") as file:
            while line := file.readline(limit + 1):
                long = len(line) > limit and not line.endswith("\n")
                if long:
                    while (rest := file.readline(BLOCK)) and not rest.endswith("\n"):
                        pass
                if long or line.strip():
                    yield Document(self.records, self._texts_in_line(None if long else line.encode(), False))
                self.records += 1

    def _texts_in_line(self, line: bytes | None, first: bool) -> Iterator[str]:
        if line is None:
            raise Problem(f"longer than {self.options.record_bytes:,} bytes")
        if b"\0" in line:
            raise Problem("binary")
        try:
            text = line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError:
            raise Problem("not utf-8") from None
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise Problem("not JSON") from None
        yield self._text(record.get(self.options.text_field) if isinstance(record, dict) else None)

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise Problem(f"no text in {self.options.text_field!r}")
        # JSON can spell half a surrogate pair, which is no text and cannot be encoded.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _rows(self) -> Iterator[Document]:
        with _parquet(self.piece) as file:
            rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            stop = len(rows) if self.piece.stop < 0 else self.piece.stop
            self.records = sum(rows[: self.piece.start])
            if self.options.text_field not in file.schema_arrow.names:
                raise Problem(f"no column {self.options.text_field!r}")
            batches = file.iter_batches(
                64, row_groups=range(self.piece.start, stop), columns=[self.options.text_field], use_threads=False
            )
            for batch in batches:
                for value in batch.column(0):
                    yield Document(self.records, self._texts_in_row(value))
                    self.records += 1

    def _arrow_rows(self) -> Iterator[Document]:
        with open(self.piece.path, "rb") as raw:
            in_a_file = raw.read(6) == b"ARROW1"  # which says at its end where its batches are
            raw.seek(max(0, self.piece.file_size - len(END_OF_STREAM)))
            if not in_a_file and raw.read() != END_OF_STREAM:
                raise Problem("damaged Arrow or Parquet")
        with _arrow(self.piece, in_a_file) as found:
            if self.options.text_field not in found.schema.names:
                raise Problem(f"no column {self.options.text_field!r}")
            batches = map(found.get_batch, range(found.num_record_batches)) if in_a_file else found
            for batch in batches:
                for value in batch.column(self.options.text_field):
                    yield Document(self.records, self._texts_in_row(value))
                    self.records += 1

    def _texts_in_row(self, value: Any) -> Iterator[str]:
        yield self._text(value.as_py())


class _problems_named:
    """Turns what reading a damaged or forbidden file raises into a Problem."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UnicodeError):
            raise Problem(f"not {getattr(error, 'encoding', 'text')}") from error
        if isinstance(error, PermissionError):
            raise Problem("unreadable") from error
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)) or type(error).__name__ == "ZstdError":
            raise Problem("damaged packing") from error
        if type(error).__module__.startswith("pyarrow") or (isinstance(error, OSError) and error.errno is None):
            raise Problem("damaged Arrow or Parquet") from error


def _compression(path: str) -> str | None:
    suffix = os.path.splitext(path.lower())[1]
    return suffix if suffix in PACKED else None


def _open_file(path: str) -> IO[bytes]:
    packing = _compression(path)
    if packing == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if packing == ".zst":
        return _zstd(path)
    return open(path, "rb")


def _zstd(path: str) -> IO[bytes]:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
    except ImportError:
        try:
            import zstandard  # noqa: F401
        except ImportError:
            raise DatabaseError(
                f"{path}: reading .zst needs the package zstandard: pip install 'retro_kernels[retrieval]'"
            ) from None
        return io.BufferedReader(_ZstdFile(path), BLOCK)
    return zstd.open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Unpacks zstd frame by frame. Raises EOFError where the file ends within one, which the package's own reader takes
    for the end of the text."""

    STEP = 1024
    """Packed bytes at a time: a block of them may hold hundreds of times as many."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self._start = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._packed = self._packed or self._file.read(self.STEP)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._start()
            self._text, self._packed = self._frame.decompress(self._packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _arrow(piece: Piece, in_a_file: bool) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise _no_pyarrow(piece) from None
    return (pyarrow.ipc.open_file if in_a_file else pyarrow.ipc.open_stream)(pyarrow.memory_map(piece.path))


def _no_pyarrow(piece: Piece) -> DatabaseError:
    return DatabaseError(
        f"{piece.path}: reading {piece.format} needs the package pyarrow: pip install 'retro_kernels[retrieval]'"
    )


def _parquet(piece: Piece) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _no_pyarrow(piece) from None
    with _problems_named():
        return parquet.ParquetFile(piece.path, buffer_size=1 << 20, pre_buffer=False)


def _wide(piece: Piece) -> str | None:
    """The encoding that JSON Lines begin with a mark of, where its characters are wider than a byte."""
    with _problems_named(), _open_file(piece.path) as file:
        begin = file.read(4)
    return next((name for mark, name in BOMS if begin.startswith(mark) and name != "utf-8-sig"), None)


def _rest_of_line(file: IO[bytes], enough: int | None = None) -> int:
    """Reads to the end of the line, or through `enough` bytes of it or some more. -> bytes read"""
    read = 0
    while block := file.readline(BLOCK):
        read += len(block)
        if block.endswith(b"\n") or (enough is not None and read >= enough):
            break
    return read


def _decode(file: IO[bytes], encoding: str, *, is_html: bool) -> Iterator[str]:
    """Text of a file in blocks. Raises Problem("binary") at a zero character, UnicodeDecodeError where it is none."""
    block = file.read(BLOCK)
    declared = re.search(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", block[:1024], re.I) if is_html else None
    named = declared.group(1).decode() if declared else encoding
    marked = next((name for mark, name in BOMS if block.startswith(mark)), named)
    try:
        decoder = codecs.getincrementaldecoder(marked)("strict")
    except LookupError:
        raise Problem(f"unknown encoding {marked}") from None
    if marked == named and b"\0" in block and not re.match("utf.?(16|32)", named, re.I):
        raise Problem("binary")
    while block:
        text = decoder.decode(block)
        if "\0" in text:
            raise Problem("binary")
        yield text
        block = file.read(BLOCK)
    yield decoder.decode(b"", final=True)


class _Visible(html.parser.HTMLParser):
    """Collects the text that a page shows: no scripts or styles, one line per block of text, `pre` as it is."""

    HIDDEN = frozenset(("script", "style", "template", "noscript", "svg", "math", "head"))
    INLINE = frozenset(
        ("a", "abbr", "b", "bdi", "bdo", "big", "cite", "code", "del", "dfn", "em", "font", "i", "ins", "kbd", "label")
        + ("mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr")
    )
    UNCLOSED = frozenset(("body",))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._hidden = ""
        self._depth = self._pre = 0
        self._gap = ""
        self._begun = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if self._hidden:
            # An unclosed head ends where the body begins.
            if tag == self._hidden:
                self._depth += 1
            elif self._hidden == "head" and tag in self.UNCLOSED:
                self._hidden = ""
            return
        if tag in self.HIDDEN:
            self._hidden, self._depth = tag, 1
            return
        self._pre += tag == "pre"
        self._block(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        if not self._hidden:
            self._block(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._depth -= tag == self._hidden
            if not self._depth:
                self._hidden = ""
            return
        self._pre = max(0, self._pre - (tag == "pre"))
        self._block(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._pre:
            self.found.append(self._take_gap() + data)
            return
        words = data.split()
        if not words:
            self._gap = self._gap or " " * bool(data)
            return
        if data[0].isspace():
            self._gap = self._gap or " "
        self.found.append(self._take_gap() + " ".join(words))
        self._gap = " " * data[-1].isspace()

    def _block(self, tag: str) -> None:
        if tag not in self.INLINE:
            self._gap = "\n"

    def _take_gap(self) -> str:
        gap, self._gap = self._gap if self._begun else "", ""
        self._begun = True
        return gap


UNFINISHED = 1 << 16
"""Characters of markup that has no end which are looked through once more where a page ends. The parser goes through
them once for every tag that they might begin: 0.45 MB of broken markup took it minutes."""


def _visible(blocks: Iterable[str], limit: int) -> Iterator[str]:
    """The text that HTML shows. Markup without an end hides the rest of the page, as it does in a browser.

    Raises Problem where markup goes on for more than `limit` characters."""
    parser = _Visible()
    waiting, size = [], 0
    for block in blocks:
        # Markup that is not finished is gone through again each time: not before it has doubled.
        waiting.append(block)
        size += len(block)
        if size + len(parser.rawdata) > limit and parser.rawdata:
            raise Problem(f"longer than {limit:,} bytes")
        if size < len(parser.rawdata):
            continue
        parser.feed("".join(waiting))
        waiting, size = [], 0
        if len(parser.rawdata) > limit:
            raise Problem(f"longer than {limit:,} bytes")
        yield "".join(parser.found)
        parser.found.clear()
    parser.feed("".join(waiting))
    if len(parser.rawdata) <= UNFINISHED:
        parser.close()
    yield "".join(parser.found)
