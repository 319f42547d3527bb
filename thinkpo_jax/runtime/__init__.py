"""Everything that knows nothing about models.

Typed configuration, command line, processes, mesh and sharding, files and console.
"""
