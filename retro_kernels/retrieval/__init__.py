"""The retrieval database: chunks, their embeddings and the index over them (RETRO, arXiv 2112.04426, section 2.1)."""

from ..errors import DatabaseError
from ..tokenizers import ChunkTokenizer, load_tokenizer, open_tokenizer
from .build.adding import add_documents
from .build.builder import Progress, build_database
from .build.writer import ShardWriter, committed_shard, finish_database
from .database import Database, Source
from .embedders import Embedder, load_embedder, open_embedder
from .exchange import export_parquet, import_database
from .index.index import Index, build_index, open_index, replace_index
from .retriever import Retrieved, Retriever
from .training_data import TrainingData, open_neighbours, precompute_neighbours

__all__ = [
    "ChunkTokenizer",
    "Database",
    "DatabaseError",
    "Embedder",
    "Index",
    "Progress",
    "Retrieved",
    "Retriever",
    "ShardWriter",
    "Source",
    "TrainingData",
    "add_documents",
    "build_database",
    "build_index",
    "committed_shard",
    "export_parquet",
    "finish_database",
    "import_database",
    "load_embedder",
    "load_tokenizer",
    "open_embedder",
    "open_index",
    "open_neighbours",
    "open_tokenizer",
    "precompute_neighbours",
    "replace_index",
]
