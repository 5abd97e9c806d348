"""Exceptions that several parts of the package raise."""


class DatabaseError(Exception):
    """A database that is missing, of another version, damaged, in use, or that cannot be built as asked; a tokenizer or
    embedder that is not to be had."""
