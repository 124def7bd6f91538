"""Banks between machines: stores, push, pull, catalogue, signatures, reading from afar."""
