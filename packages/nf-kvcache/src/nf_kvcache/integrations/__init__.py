"""nf-kvcache under engines of others; each module needs its engine to be installed."""
