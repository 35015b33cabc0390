"""The NanoFlow server: an OpenAI-compatible API and the `nanoflow` command line.

Importing this package is cheap: torch, FastAPI and nf-runtime are imported by the modules that
need them, so that `nanoflow --help` answers at once.
"""

__version__ = "0.1.0"
