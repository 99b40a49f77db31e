"""Runs whose home is a URL: an object store, or any other file system of fsspec, with a working copy on this machine."""
