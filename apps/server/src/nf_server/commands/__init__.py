"""The commands behind `nf_server.cli`; imported when they run."""
