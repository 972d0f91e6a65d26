"""Adapters: one file per release, from the folders and tables as downloaded to manifest rows."""
