"""The executable specification of every model, written once over `backends.nn` and `ops`.

The classes are native modules of the chosen framework. Importing this package chooses the
backend (see `backends.select`), so it is imported only where a model is really wanted.
"""
