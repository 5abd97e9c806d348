"""The kernel of the absorbed strategy: chunked cross-attention with the projections of keys and values inside."""
