"""The retrieval database: chunks, their embeddings and the index over them (RETRO, arXiv 2112.04426, section 2.1)."""

from .files import DatabaseError
from .store import Database, Source
from .writer import ShardWriter, committed_shard, finish_database

__all__ = ["Database", "DatabaseError", "ShardWriter", "Source", "committed_shard", "finish_database"]
