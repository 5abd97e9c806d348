"""Searching: exact, FAISS, the choice between them, and how good a search is."""
