"""From documents to the files of a database, in shards that one process or several work on."""
