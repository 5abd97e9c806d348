"""Documents: the files they are read from, what is dropped, and the chunks they are cut into."""
