"""Code that knows nothing about models: configuration, command line, processes, mesh, sharding, files, console.

Most other files use `ConfigSection` and `UserError` of config.py and `log_info` of console.py.
"""
