"""A file for each public operation, a folder for each kernel with its specification and its backends; `call.py` is
what lies between them."""
