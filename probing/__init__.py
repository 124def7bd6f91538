"""From a bank to probes and numbers: no encoder, no audio. Names load on first use."""
